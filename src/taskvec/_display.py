"""How a vector shows itself in a notebook."""

from collections.abc import Iterable, Sequence
from html import escape


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
