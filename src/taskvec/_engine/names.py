"""Names of tensors: glob patterns, options by name, and mappings whose names or shapes must agree."""

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, Final, Protocol, TypeAlias, TypeVar, cast

from ..errors import MismatchError, MissingError

__all__ = ["ABSENT", "Patterns", "as_patterns", "by_name", "check_aligned", "listed", "matching", "unmatched"]

T = TypeVar("T")

Patterns: TypeAlias = str | Iterable[str]
"""One glob pattern, or several."""

ABSENT: Final = object()
"""What `by_name` returns where neither the name nor a pattern is there."""


class HasShape(Protocol):
    """Anything with a shape."""

    @property
    def shape(self) -> tuple[int, ...]: ...


def listed(names: Sequence[str], most: int = 4) -> str:
    """`'a', 'b', ... (7 in all)`: a few names, for a message."""
    shown = ", ".join(repr(name) for name in names[:most])
    return shown if len(names) <= most else f"{shown}, ... ({len(names)} in all)"


def as_patterns(patterns: Patterns) -> tuple[str, ...]:
    """The patterns, one or several, as a tuple."""
    return (patterns,) if isinstance(patterns, str) else tuple(patterns)


def unmatched(patterns: Iterable[str], names: Sequence[str]) -> list[str]:
    """The patterns that match none of the names: misspellings."""
    known = set(names)
    return [p for p in patterns if p not in known and not any(fnmatchcase(name, p) for name in names)]


def matching(names: Sequence[str], patterns: Patterns, where: str = "") -> list[str]:
    """The names that match any of the patterns, in their own order.

    Raises:
        MissingError: a pattern that matches nothing; the message says `where`.
    """
    wanted = as_patterns(patterns)
    if idle := unmatched(wanted, names):
        raise MissingError(f"the pattern {idle[0]!r} matches no name{where}; the names are {listed(names)}")
    return [name for name in names if any(name == p or fnmatchcase(name, p) for p in wanted)]


def by_name(options: Mapping[str, T], name: str) -> T | Any:
    """The value for a name: that of the name itself, else of the first pattern that matches, else `ABSENT`."""
    if name in options:
        return options[name]
    return next((options[pattern] for pattern in options if fnmatchcase(name, pattern)), ABSENT)


def option_for(value: Any, name: str) -> Any:
    """One tensor's value of an option: a mapping is looked up by name, and so is each mapping of a list."""
    if isinstance(value, Mapping):
        return by_name(cast("Mapping[str, Any]", value), name)
    if isinstance(value, list | tuple):
        items = cast("Sequence[Any]", value)
        if items and all(isinstance(item, Mapping) for item in items):
            found = [by_name(item, name) for item in items]
            return ABSENT if any(item is ABSENT for item in found) else found
    return cast("Any", value)


def check_aligned(sides: Mapping[str, Mapping[str, HasShape]], doing: str) -> None:
    """Refuse mappings whose names or shapes differ.

    Args:
        sides: label -> mapping of names to anything with a shape, such as specs.
        doing: for the message: "cannot {doing}: ...".

    Raises:
        MismatchError: names or shapes differ.
    """
    (label_a, first), *others = sides.items()
    for label, other in others:
        if first.keys() != other.keys():
            raise MismatchError(f"cannot {doing}: {_name_difference(label_a, first, label, other)}")
        for name, spec in first.items():
            if tuple(spec.shape) != tuple(other[name].shape):
                raise MismatchError(
                    f"cannot {doing}: {name!r} is {tuple(spec.shape)} in {label_a} and "
                    f"{tuple(other[name].shape)} in {label}; leave it out with select() or exclude="
                )


def _name_difference(a: str, left: Mapping[str, object], b: str, right: Mapping[str, object]) -> str:
    only_left = [name for name in left if name not in right]
    only_right = [name for name in right if name not in left]
    parts = [
        f"{listed(names)} {'is' if len(names) == 1 else 'are'} only in {label}"
        for names, label in ((only_left, a), (only_right, b))
        if names
    ]
    known = _experts_hint(only_left, only_right) or _prefix_hint(a, only_left, b, only_right)
    return f"{' and '.join(parts)}; {known or 'select() the names both have, or rename()'}"


NUMBERED = re.compile(r"\.experts\.\d+\.")


def _experts_hint(only_left: Sequence[str], only_right: Sequence[str]) -> str:
    """What to do where transformers keeps the experts of a layer in one tensor in memory, and apart on disk."""
    for apart, stacked in ((only_left, only_right), (only_right, only_left)):
        if any(NUMBERED.search(name) for name in apart) and any(
            ".experts." in name and not NUMBERED.search(name) for name in stacked
        ):
            return "experts are stacked in memory and apart on disk: load both as modules, or both as folders"
    return ""


def _prefix_hint(a: str, only_left: Sequence[str], b: str, only_right: Sequence[str]) -> str:
    """What to do where a prefix of one side is all that keeps most of the names apart."""
    for longer, own, others in ((a, only_left, only_right), (b, only_right, only_left)):
        prefix = _prefix(own, set(others))
        if prefix:
            return f"names in {longer} begin with {prefix!r}: rename() or rebuild the mapping without it"
    return ""


def _prefix(long: Sequence[str], short: set[str]) -> str:
    """The prefix without which most names of one side are among the other's, or an empty string."""
    shared = os.path.commonprefix(list(long))  # noqa: RUF071 - of characters, as names are compared
    candidates = {name[: i + 1] for name in [shared, *long[:8]] for i, c in enumerate(name) if c == "."}
    for prefix in sorted(candidates, key=len, reverse=True):
        found = sum(name.startswith(prefix) and name.removeprefix(prefix) in short for name in long)
        if found and 2 * found > max(len(long), len(short)):
            return prefix
    return ""
