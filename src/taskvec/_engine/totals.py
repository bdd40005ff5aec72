"""Sums over everything that a call was given: what most statistics are made of."""

from collections.abc import Callable, Generator
from math import isfinite
from typing import Any, cast

import torch
from torch import Tensor

from ..errors import NonFiniteError, RangeError
from .pieces import Look, Pieces, Place
from .pools import single_thread

__all__ = ["gram", "lockstep", "numbers_in", "of", "over", "sum64"]

COLUMNS = 1 << 16
"""Columns of a stack that are multiplied at once: wider copies in float64 leave the cache."""


def over(f: Callable[..., Any], *args: Any, pieces: Pieces = "element") -> Generator[Look, list[Any], Any]:
    """Add up `f(stack_block, at, *args)` over all blocks of the scope, in a fixed order: a statistic in one line.

    Numbers and tensors add, lists concatenate.

    Args:
        f: a module-level function of a block of the stack, `(n, m)`, and its `Place`.
        *args: further arguments of f.
        pieces: the kind of blocks, as in `runs`.

    Raises:
        RangeError: every tensor of the scope is empty.

    Examples:
        >>> from taskvec.rules import HERE, over
        >>> def block_sums(stack, at):
        ...     return stack.sum(1)
        >>> def sums(n, entries):
        ...     return (yield from over(block_sums))
        >>> HERE.take(sums, torch.ones(2, 3))
        tensor([3., 3.])
    """
    first, *rest = (yield Look(f, args, pieces=pieces)) or [None]
    if first is None:
        raise RangeError("there is nothing to take a statistic over: every tensor is empty")
    for part in rest:
        first = first + part
    return first


def lockstep(*passes: Generator[Look, list[Any], Any]) -> Generator[Look, list[Any], tuple[Any, ...]]:
    """Take several statistics of the same kind of blocks together: one pass serves all that are at the same step."""
    values: list[Any] = [None] * len(passes)
    asked: dict[int, Look] = {}

    def step(i: int, found: list[Any] | None) -> None:
        try:
            asked[i] = passes[i].send(cast("Any", found))
        except StopIteration as end:
            values[i] = end.value

    for i in range(len(passes)):
        step(i, None)
    while asked:
        looks, asked = list(asked.items()), {}
        fs = tuple((look.f, look.args) for _, look in looks)
        sample = max(look.sample for _, look in looks) if all(look.sample for _, look in looks) else 0
        found = yield Look(_all_of, (fs,), sample, looks[0][1].pieces)
        for j, (i, _) in enumerate(looks):
            step(i, [part[j] for part in found])
    return tuple(values)


def _all_of(stack: Tensor, at: Place, fs: tuple[tuple[Callable[..., Any], tuple[Any, ...]], ...]) -> list[Any]:
    return [f(stack, at, *args) for f, args in fs]


def of(
    transform: Callable[..., Tensor], args: tuple[Any, ...], passes: Generator[Look, list[Any], Any]
) -> Generator[Look, list[Any], Any]:
    """Take a statistic of `transform(stack_block, *args)` in place of the stack itself.

    Args:
        transform: a module-level function, entry by entry: `(n, m) -> (k, m)`.
        args: further arguments of it.
        passes: the statistic's.
    """
    found: Any = None
    while True:
        try:
            look = passes.send(found)
        except StopIteration as end:
            return end.value
        found = yield look._replace(f=_of, args=(transform, args, look.f, look.args))


def _of(
    stack: Tensor,
    at: Place,
    transform: Callable[..., Tensor],
    args: tuple[Any, ...],
    f: Callable[..., Any],
    own: tuple[Any, ...],
) -> Any:
    return f(transform(stack, *args), at, *own)


def gram(n: int, entries: int) -> Generator[Look, list[Any], list[list[float]]]:
    """The dot products of all pairs of the n vectors over the scope, in float64."""
    del entries
    flat = yield Look(pair_dots)
    total = [float(sum(column)) for column in zip(*flat, strict=True)] or [0.0] * (n * n)
    return [total[i * n : (i + 1) * n] for i in range(n)]


def pair_dots(stack: Tensor, at: Place) -> list[float]:
    """The dot products of all pairs of a stack's block, `n * n` numbers, in float64."""
    del at
    n = len(stack)
    rows = stack.detach().reshape(n, -1)
    upper = torch.zeros(n * (n + 1) // 2, dtype=torch.float64, device=stack.device)
    for start in range(0, rows.shape[1], COLUMNS):
        wide = rows[:, start : start + COLUMNS].to(torch.float64)
        upper += torch.cat([torch.mv(wide[i:], wide[i]) for i in range(n)])
    total = torch.zeros(n, n, dtype=torch.float64, device=stack.device)
    total[torch.triu_indices(n, n, device=stack.device).unbind()] = upper
    # plain numbers: small tensors that are kept among big temporaries fragment the memory
    numbers = numbers_in((total + total.triu(1).T).reshape(-1))
    if not all(map(isfinite, numbers)):
        raise NonFiniteError("NaN or inf: no statistic can be taken")
    return numbers


def sum64(x: Tensor) -> Tensor:
    """Sum in float64, with the same bits whatever the number of threads.

    Args:
        x: any tensor.

    Returns:
        0-d float64.

    Raises:
        NonFiniteError: the sum is NaN or inf; the engine adds the tensor's name.

    Examples:
        >>> from taskvec.rules import sum64
        >>> sum64(torch.tensor([1.0, 2.5]))
        tensor(3.5000, dtype=torch.float64)
    """
    with single_thread():
        total = x.sum(dtype=torch.float64)
    if not bool(total.isfinite()):
        raise NonFiniteError("NaN or inf: no statistic can be taken")
    return total


def numbers_in(x: Tensor) -> list[float]:
    """The entries of a small `(m,)` tensor as Python numbers."""
    return cast("list[float]", x.tolist())  # pyright: ignore[reportUnknownMemberType]
