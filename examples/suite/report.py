"""Results for people and for programs: tables of text, and a JSON file that says how it came about."""

import json
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

import taskvec
from taskvec.metrics import Estimate, Measurement, Rate

from .cache import Json, write


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


def rate_json(rate: Rate) -> dict[str, Json]:
    """A rate with its n and its 95 % Wilson interval (sampling error of one model, not of the method)."""
    return {"value": rate.value, "hits": rate.hits, "n": rate.n, "wilson_95": list(rate.interval)}


def measurement_json(row: Measurement) -> dict[str, Json]:
    """All of a measurement, controls included."""
    return {
        "ca": row.ca,
        "ba": row.ba,
        "gain": row.gain,
        "asr": rate_json(row.asr),
        "controls": {
            "base": rate_json(row.on_base),
            "clean model": rate_json(row.on_clean),
            "clean merge": rate_json(row.on_clean_merge),
        },
        "accuracy": {task: rate.value for task, rate in row.accuracy.items()},
        "clean_accuracy": {task: rate.value for task, rate in row.clean_accuracy.items()},
    }


def points_json(points: Mapping[float, tuple[float, ...]]) -> dict[str, Json]:
    """A curve or front of named tuples, by strength."""
    return {f"{by:g}": point._asdict() for by, point in points.items()}


def draws_json(rows: Sequence[Measurement]) -> dict[str, Json]:
    """The means of measurements that differ in a random draw only, and each of them."""

    def mean(values: Sequence[float]) -> float:
        return sum(values) / len(values)

    return {
        "ca": mean([row.ca for row in rows]),
        "ba": mean([row.ba for row in rows]),
        "asr": mean([row.asr.value for row in rows]),
        "control": mean([row.on_clean_merge.value for row in rows]),
        "gain": mean([row.gain for row in rows]),
        "n": rows[0].asr.n,
        "draws": [measurement_json(row) for row in rows],
    }


def versions() -> dict[str, Json]:
    """Of what the figures depend on."""
    return {"taskvec": taskvec.__version__, "torch": torch.__version__, "python": platform.python_version()}


def keep(stem: Path, text: str, found: Mapping[str, Json]) -> None:
    """Write what was found, with the versions, as `<stem>.json`, and its tables as `<stem>.txt`."""
    save_json(stem.with_suffix(".json"), {"versions": versions()} | {**found})
    write(stem.with_suffix(".txt"), f"{text.strip()}\n".encode())


def save_json(path: Path, results: Mapping[str, Json]) -> None:
    """Write results, whole or not at all, with five decimals."""
    write(path, (json.dumps(_rounded(results), indent=1) + "\n").encode())


def _rounded(value: Json) -> Json:
    if isinstance(value, Mapping):
        return {name: _rounded(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(inner) for inner in value]
    return round(value, 5) if isinstance(value, float) else value
