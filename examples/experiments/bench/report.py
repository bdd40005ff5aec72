"""Results for people and for programs: tables of text, and lines of JSON that say how they came about."""

import platform
from collections.abc import Mapping, Sequence
from typing import Any

import torch

import taskvec
from taskvec.metrics import Estimate

from . import cells
from .cache import Json


def text_table(title: str, header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A titled table in columns: the first to the left, numbers to the right."""
    cells = [[f"{cell:.1f}" if isinstance(cell, Estimate) else str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    text = [column_is_text(cells[1:], i) for i in range(len(header))]
    lines = [
        "  ".join(c.ljust(w) if left else c.rjust(w) for c, w, left in zip(row, widths, text, strict=True)).rstrip()
        for row in cells
    ]
    return "\n".join([f"\n{title}", "-" * max(map(len, lines)), lines[0], *lines[1:]])


def column_is_text(rows: Sequence[Sequence[str]], column: int) -> bool:
    """Whether a column holds words: any cell that starts with a letter."""
    return any(row[column][:1].isalpha() for row in rows)


def percent(value: float) -> str:
    """A fraction as a percentage with one decimal."""
    return f"{100 * value:.1f}"


def versions() -> dict[str, Json]:
    """Of what the figures depend on."""
    return {"taskvec": taskvec.__version__, "torch": torch.__version__, "python": platform.python_version()}


def keep(name: str, part: str, found: Mapping[str, Json]) -> None:
    """Add what was found for a part of a table, with the versions, to `<name>.jsonl`."""
    told = {"versions": versions()} | {**found}
    cells.append(cells.FOLDER / f"{name}.jsonl", cells.key({"part": part}), [part], told)


def kept(name: str, part: str) -> Mapping[str, Any]:
    """What was found last for a part of a table."""
    return cells.read(cells.FOLDER / f"{name}.jsonl")[cells.key({"part": part})]
