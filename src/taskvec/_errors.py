"""What can go wrong, by name.

TaskvecError
├── MismatchError    ValueError      names, shapes or bases differ
├── MissingError     KeyError        a name that is not there, a pattern that matches nothing
├── OptionError      TypeError       an option that does not exist or cannot vary here; a model in the wrong mode
├── RangeError       ValueError      an option outside its range
├── DtypeError       TypeError       a dtype this library does not do arithmetic on
├── NonFiniteError   ValueError      NaN or inf where a statistic is taken
├── AliasError       ValueError      two models that share storage
├── DegenerateError  ValueError      an operation that has no answer: a zero vector, nothing to merge
├── RuleError        ValueError      a rule that returned something else than one tensor of the right shape
├── FormatError      ValueError      a file that is damaged, dangerous or not a checkpoint
├── LocationError    FileNotFoundError
└── ExistsError      FileExistsError
"""

import os
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch

__all__ = [
    "AliasError",
    "DegenerateError",
    "DtypeError",
    "ExistsError",
    "FormatError",
    "LocationError",
    "MismatchError",
    "MissingError",
    "NonFiniteError",
    "OptionError",
    "RangeError",
    "RuleError",
    "TaskvecError",
]


class TaskvecError(Exception):
    """The root of every error this library raises on purpose."""


class MismatchError(TaskvecError, ValueError):
    """Names, shapes or bases differ between the inputs."""


class MissingError(TaskvecError, KeyError):
    """A name that is not there, or a pattern that matches nothing."""

    def __str__(self) -> str:  # KeyError would print the message quoted
        return str(self.args[0]) if self.args else ""


class OptionError(TaskvecError, TypeError):
    """An option that does not exist, or that cannot take such a value."""


class RangeError(TaskvecError, ValueError):
    """An option outside its range."""


class DtypeError(TaskvecError, TypeError):
    """A dtype (or kind of tensor) this library does not do arithmetic on."""


class NonFiniteError(TaskvecError, ValueError):
    """NaN or inf where a statistic is taken."""


class AliasError(TaskvecError, ValueError):
    """Two models that share storage: their difference would be zero for ever."""


class DegenerateError(TaskvecError, ValueError):
    """An operation that has no answer: a zero vector, nothing to merge."""


class RuleError(TaskvecError, ValueError):
    """A rule that did not return one tensor of the right shape."""


class FormatError(TaskvecError, ValueError):
    """A file that is damaged, dangerous or not a checkpoint."""


class LocationError(TaskvecError, FileNotFoundError):
    """Nothing is at that place."""


class ExistsError(TaskvecError, FileExistsError):
    """Something is there already, and nobody allowed overwriting it."""


class _HasShape(Protocol):
    @property
    def shape(self) -> torch.Size: ...


def listed(names: Sequence[str], most: int = 4) -> str:
    """`'a', 'b', ... (7 in all)`: a few names, for a message."""
    shown = ", ".join(repr(name) for name in names[:most])
    return shown if len(names) <= most else f"{shown}, ... ({len(names)} in all)"


def check_aligned(sides: Mapping[str, Mapping[str, _HasShape]], doing: str) -> None:
    """Refuse mappings whose names or shapes differ.

    Args:
        sides: what each mapping is called in the message, and name -> anything with a shape.
        doing: the verb for the message, `"merge"`.

    Raises:
        MismatchError: naming the tensors, both sides, and the prefix if that is all that differs.
    """
    (first_label, first), *others = sides.items()
    for label, other in others:
        if first.keys() != other.keys():
            raise MismatchError(f"cannot {doing}: {_name_difference(first_label, first, label, other)}")
        for name, tensor in first.items():
            if tensor.shape != other[name].shape:
                raise MismatchError(
                    f"cannot {doing}: {name!r} is {tuple(tensor.shape)} in {first_label} and "
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
    prefix = _prefix(left, right)
    if prefix:
        longer, prefix = (a, prefix[0]) if prefix[0] else (b, prefix[1])
        hint = f"every name in {longer} begins with {prefix!r}: rename() or rebuild the mapping without it"
    else:
        hint = "select() the names both have, or rename()"
    return f"{' and '.join(parts)}; {hint}"


def _prefix(left: Mapping[str, object], right: Mapping[str, object]) -> tuple[str, str] | None:
    """The prefix that turns one side's names into the other's, as (left's, right's), if one does."""
    for long, short, side in ((left, right, 0), (right, left, 1)):
        shared = os.path.commonprefix(list(long))  # noqa: RUF071 - of characters, as names are compared
        prefix = shared[: shared.rfind(".") + 1]
        while prefix:
            if {name.removeprefix(prefix) for name in long} == set(short):
                return (prefix, "") if side == 0 else ("", prefix)
            prefix = prefix[: prefix.rfind(".", 0, -1) + 1]
    return None
