"""Marks: how a rule says that it can run on pieces of a tensor, and which statistics it takes."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeAlias, TypeVar

from torch import Tensor

from ..errors import OptionError, RangeError
from .pieces import Pieces, Statistic

__all__ = ["Leaf", "Mark", "Rule", "check_kind_of_rule", "mark_of", "runs", "signature_of"]

Leaf: TypeAlias = Callable[..., Tensor]
"""A function of one tensor, `(*shape) -> (*shape)`: a sparsifier."""

Rule: TypeAlias = Callable[..., Tensor]
"""A function of stacked tensors, `(n, *shape) -> (*shape)`: a merge."""

F = TypeVar("F", bound=Callable[..., Tensor])


class Mark(NamedTuple):
    """The pieces that a rule can run on, and the statistics it takes."""

    pieces: Pieces = "tensor"
    statistics: tuple[Statistic, ...] = ()


def runs(pieces: Pieces, /, *statistics: Statistic) -> Callable[[F], F]:
    """Mark a rule as one that can run on pieces of a tensor.

    A marked rule may take an argument `at`, the `Place` of the piece, through which it asks for statistics and random
    bits; it is not an option of the rule, and its default is `HERE`. Marked rules may run in several threads at once.

    Args:
        pieces: `"element"`: on any flat run of entries, `(n, m)` for a stack and `(m,)` for a leaf;
            `"row"`: on any number of whole rows, `(n, r, ...)` or `(r, ...)`;
            `"tensor"`: on whole tensors only, as an unmarked rule, but with `at` and statistics.
            An element rule called with `scope="row"` is given whole rows too.
        *statistics: what the rule asks for with `at.take`, each a generator of passes over the scope. The engine takes
            them before the pieces run; a later one may ask for an earlier one by its name.

    Returns:
        A decorator that returns the function itself, unwrapped.

    Examples:
        >>> import torch
        >>> from taskvec import TaskVector
        >>> from taskvec.rules import HERE, Look, runs
        >>> def block_peak(stack, at):
        ...     return float(stack.abs().max())
        >>> def peak(n, entries):
        ...     return max((yield Look(block_peak)))
        >>> @runs("element", peak)
        ... def in_units_of_the_peak(x, *, scope="tensor", at=HERE):
        ...     return x / at.take(peak, x[None])
        >>> vector = TaskVector({"a": torch.tensor([1.0, -4.0])})
        >>> vector.map(in_units_of_the_peak)["a"]
        tensor([ 0.2500, -1.0000])
    """
    if pieces not in ("element", "row", "tensor"):
        raise RangeError(f"runs() takes 'element', 'row' or 'tensor', not {pieces!r}; leave other functions unmarked")

    def mark(rule: F) -> F:
        rule.__taskvec_mark__ = Mark(pieces, statistics)  # type: ignore[attr-defined]
        return rule

    return mark


def mark_of(rule: Callable[..., Any]) -> Mark | None:
    """A rule's mark, if it has one; partials are looked through."""
    while isinstance(rule, partial):
        rule = rule.func
    return getattr(rule, "__taskvec_mark__", None)


def signature_of(rule: Callable[..., Any]) -> inspect.Signature | None:
    """The signature of a rule, through partials; None for a callable that has none."""
    try:
        return inspect.signature(rule)
    except (TypeError, ValueError):
        return None


TAKES = {"map": ("x", "one tensor", "vector.map(...)"), "merge": ("stack", "stacked tensors", "merge(vectors, ...)")}


def check_kind_of_rule(rule: object, door: str) -> None:
    """Refuse what is not a function, and in `map` a function of ours of a stack, or in `merge` one of a single tensor.

    Raises:
        OptionError: saying where the function can be used.
    """
    if not callable(rule):
        raise OptionError(
            f"{door}() must be given a function; got {rule!r}; import it: from taskvec.merges import ties"
        )
    signature = signature_of(rule)
    first = next(iter(signature.parameters), "") if signature is not None else ""
    for other, (name, _, use) in TAKES.items():
        if other != door and first == name and _is_ours(rule):
            title = getattr(rule, "__name__", repr(rule))
            raise OptionError(f"{door}() must be given a function of {TAKES[door][1]}; got {title}; use it in {use}")


def _is_ours(rule: Callable[..., Any]) -> bool:
    while isinstance(rule, partial):
        rule = rule.func
    return mark_of(rule) is not None and str(getattr(rule, "__module__", "")).startswith("taskvec.")
