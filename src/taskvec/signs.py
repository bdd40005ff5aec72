"""Rules about signs: which one wins, and how many vectors have it. `(n, *shape) -> (*shape)`."""

import math
from collections.abc import Callable
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from ._errors import RangeError
from .rules import Place, Scope, Total, over, runs

__all__ = ["agreement", "consistent", "elect"]

By: TypeAlias = Literal["sum", "count"]
Zero: TypeAlias = Literal["nobody", "positive", "majority"]


def majority_sign(total: Total, by: By = "sum", zero: Zero = "nobody") -> float | None:
    """The statistic of `elect`: the sign of the sum of all elected signs over the scope, where zeros take it."""
    return majority_of(total, by) if zero == "majority" else None


def majority_of(total: Total, by: By, trim: Callable[[Tensor, Place], Tensor | list[Tensor]] | None = None) -> float:
    """The sign that most entries of the scope elect: -1, 0 or 1.

    Args:
        total: of a stack.
        by: how one entry elects.
        trim: what is done to a stack's block before the election, if anything.
    """

    def votes(block: Tensor, at: Place) -> Tensor:
        return _vote(block if trim is None else trim(block, at), by).sign().sum(dtype=torch.float64)

    return float(total(votes).sign())


@runs("element", majority=majority_sign)
def elect(
    stack: Tensor,
    *,
    by: By = "sum",
    zero: Zero = "nobody",
    scope: Scope = "global",
    majority: float | None = None,
) -> Tensor:
    """Elect one sign for every entry.

    `sign(sum_i x_i)`, or with `by="count"` the sign that more vectors have, `sign(sum_i sign(x_i))`.

    Args:
        stack: `(n, *shape)` of vectors, any float dtype.
        by: `"sum"` of the values (the TIES paper) or `"count"` of the signs.
        zero: what an exact zero elects: `"nobody"` (0, so that the election is odd), `"positive"` (PEFT, mergekit) or
            `"majority"`: the sign that most entries of the scope elected (the original TIES code).
        scope: over what the majority is taken.
        majority: handed in by the engine.

    Returns:
        `(*shape)` of -1, 0 and 1 in the dtype of the stack.

    Raises:
        RangeError: an unknown choice.

    Example:
        >>> elect(torch.tensor([[1.0, -1.0, -3.0], [2.0, 1.0, 1.0]]))
        tensor([ 1.,  0., -1.])

    Reference:
        Yadav et al., TIES-Merging, 2023, https://arxiv.org/abs/2306.01708 (section 3; it leaves zeros open, the
        authors' code gives them the majority's sign; see conventions)
    """
    if scope == "row" and zero == "majority":
        raise RangeError("a majority over rows is not offered; scope is 'global' or 'tensor' here")
    if zero == "majority" and majority is None:
        majority = majority_sign(over(stack), by, zero)
    return elected(stack, by, zero, majority)


def elected(stack: Tensor | list[Tensor], by: By, zero: Zero, majority: float | None) -> Tensor:
    """`elect` of vectors that need not be stacked, its majority known."""
    if zero not in ("nobody", "positive", "majority"):
        raise RangeError(f"zero elects 'nobody', 'positive' or the 'majority', not {zero!r}")
    signs = _vote(stack, by).sign_()
    if zero == "nobody":
        return signs
    winner = 1.0 if zero == "positive" else majority
    return torch.where(signs == 0, signs.new_full((), winner or 0.0), signs)


def _vote(stack: Tensor | list[Tensor], by: By) -> Tensor:
    """The sum of values or of signs, vector after vector: reducing dim 0 would change bits with the block."""
    if by not in ("sum", "count"):
        raise RangeError(f"signs are elected by 'sum' or 'count', not {by!r}")
    total = stack[0].sign() if by == "count" else stack[0].clone()
    for x in stack[1:]:
        total += x.sign() if by == "count" else x
    return total


@runs("element")
def agreement(stack: Tensor) -> Tensor:
    """The fraction of the vectors that have the elected sign, entry by entry.

    `|{i : sign(x_i) = sign(sum_j x_j)}| / n`; 0 where the sum is zero.

    Args:
        stack: `(n, *shape)`, any float dtype.

    Returns:
        `(*shape)` in [0, 1], the dtype of the stack.

    Example:
        >>> agreement(torch.tensor([[1.0, 1.0, 0.0], [2.0, -3.0, 0.0]]))
        tensor([1.0000, 0.5000, 0.0000])
    """
    return _voters(stack) / len(stack)


@runs("element")
def consistent(stack: Tensor, agree: float = 1.0) -> Tensor:
    """Where enough vectors agree in sign: a mask of 0 and 1.

    Args:
        stack: `(n, *shape)`, any float dtype.
        agree: the fraction of the vectors that must have the elected sign, in (0, 1]; 1 means unanimous.

    Returns:
        `(*shape)` of 0 and 1 in the dtype of the stack; 0 where the sum is zero.

    Raises:
        RangeError: agree outside (0, 1].

    Example:
        >>> consistent(torch.tensor([[1.0, 1.0, 0.0], [2.0, -3.0, 0.0]]))
        tensor([1., 0., 0.])
    """
    if not 0 < agree <= 1:
        raise RangeError(f"agree is the fraction of vectors that must agree, in (0, 1], not {agree!r}")
    # as a number of vectors: agreement() itself is rounded in half precision
    needed = math.ceil(agree * len(stack) - 1e-9)
    return (_voters(stack) >= needed).to(stack.dtype)


def _voters(stack: Tensor) -> Tensor:
    """How many vectors have the elected sign, `(*shape)`."""
    signs = elect(stack)
    voters = torch.zeros_like(signs)
    for x in stack:
        voters += (x.sign() * signs).clamp_(min=0)
    return voters
