"""How a vector shows itself."""

from collections.abc import Callable, Iterable, Sequence
from html import escape

from torch import Tensor

from .._engine.sources import Memory, Source
from ..errors import NonFiniteError


def layer_of(name: str) -> str:
    """The layer a tensor's name belongs to: up to its first number, or its first part."""
    parts = name.split(".")
    for i, part in enumerate(parts[:-1]):
        if part.isdigit():
            return ".".join(parts[: i + 1])
    return parts[0]


def by_layer_name(names: Sequence[str]) -> dict[str, list[str]]:
    """The names of each layer, in order."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(layer_of(name), []).append(name)
    return found


def entries_in(source: Source) -> int:
    """The number of entries of all tensors."""
    return sum(spec.entries for spec in source.specs.values())


def summary(kind: str, source: Source, norm: Callable[[], Tensor]) -> str:
    """A vector in one line; of a lazy one nothing is read."""
    specs = source.specs.values()
    dtypes = ", ".join(sorted({str(spec.dtype).removeprefix("torch.") for spec in specs})) or "no dtype"
    size = f"{len(specs)} tensor{'s' * (len(specs) != 1)}, {entries_in(source):,} entries"
    if not isinstance(source, Memory):
        return f"{kind}({size}, lazy, {dtypes})"
    devices = ", ".join(sorted({str(source.device(name)) for name in source.specs})) or "nowhere"
    return f"{kind}({size}, norm {norm_text(norm)}, {dtypes} on {devices})"


def html_table(title: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A small table under a title, as HTML."""

    def row(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    body = "".join(row(cells, "td") for cells in rows)
    return f"<code>{escape(title)}</code><table><thead>{row(head, 'th')}</thead><tbody>{body}</tbody></table>"


def norm_text(norm: Callable[[], Tensor]) -> str:
    """A norm in four digits; a `repr` must not fail where a norm does."""
    try:
        return f"{float(norm()):.4g}"
    except NonFiniteError:
        return "not finite"


def share_text(part: Callable[[], Tensor], whole: Callable[[], Tensor]) -> str:
    """The share of a part's squared norm."""
    try:
        square = float(whole()) ** 2
        return f"{float(part()) ** 2 / square:.1%}" if square else "-"
    except NonFiniteError:
        return "-"
