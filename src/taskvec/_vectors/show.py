"""How a vector shows itself."""

from collections.abc import Callable, Iterable, Sequence
from html import escape

from torch import Tensor

from ..errors import NonFiniteError


def layer_of(name: str) -> str:
    """The layer a tensor's name belongs to: up to its first number, or its first part."""
    parts = name.split(".")
    for i, part in enumerate(parts[:-1]):
        if part.isdigit():
            return ".".join(parts[: i + 1])
    return parts[0]


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
