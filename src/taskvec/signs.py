"""Rules about signs: the sign that wins, and how many vectors have it. `(n, *shape) -> (*shape)`."""

import math
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from ._engine.pieces import HERE, Place
from ._engine.totals import over
from .errors import RangeError
from .rules import Scope, runs
from .sparsify import Passes

__all__ = ["agreement", "consistent", "elect"]

By: TypeAlias = Literal["sum", "count"]
Zero: TypeAlias = Literal["none", "positive", "majority"]


def majority(n: int, entries: int, by: By = "sum", zero: Zero = "none") -> Passes:
    """The statistic of `elect`: the sign of the sum of all elected signs over the scope, where zeros take it."""
    del n, entries
    return None if zero != "majority" else sign((yield from over(_votes, by)))


def _votes(stack: Tensor, at: Place, by: By) -> float:
    del at
    return votes(stack, by)


def votes(stack: Tensor, by: By) -> float:
    """The sum of all elected signs of a block."""
    return float(_vote(stack, by).sign().sum(dtype=torch.float64))


def sign(x: float) -> float:
    """-1, 0 or 1."""
    return float((x > 0) - (x < 0))


@runs("element", majority)
def elect(stack: Tensor, *, by: By = "sum", zero: Zero = "none", scope: Scope = "global", at: Place = HERE) -> Tensor:
    """Elect one sign for every entry.

    `sign(sum_i x_i)`, or with `by="count"` the sign that more vectors have, `sign(sum_i sign(x_i))`. NaN stays NaN.

    Args:
        stack: `(n, *shape)` of vectors, any float dtype.
        by: `"sum"` of the values (the TIES paper) or `"count"` of the signs.
        zero: what an exact zero elects: `"none"` (0, so that the election is odd), `"positive"` (PEFT, mergekit) or
            `"majority"`: the sign that most entries of the scope elected (the original TIES code).
        scope: over what the majority is taken.

    Returns:
        `(*shape)` of -1, 0 and 1 in the dtype of the stack.

    Raises:
        RangeError: an unknown choice.

    Examples:
        >>> elect(torch.tensor([[1.0, -1.0, -3.0], [2.0, 1.0, 1.0]]))
        tensor([ 1.,  0., -1.])

    References:
        [Yadav et al., TIES-Merging, 2023](https://arxiv.org/abs/2306.01708), section 3. The paper leaves zeros open,
        the authors' code gives them the majority's sign; see the conventions.
    """
    if scope == "row" and zero == "majority":
        raise RangeError("scope must be 'global' or 'tensor' with zero='majority'; got 'row'")
    return elected(stack, by, zero, at.take(majority, stack, by, zero) if zero == "majority" else None)


def elected(stack: Tensor, by: By, zero: Zero, winner: float | None) -> Tensor:
    """`elect`, its majority known."""
    if zero not in ("none", "positive", "majority"):
        raise RangeError(f"zero must elect 'none', 'positive' or the 'majority'; got {zero!r}")
    signs = _sign_of(_vote(stack, by))
    taken = {"none": 0.0, "positive": 1.0, "majority": winner or 0.0}[zero]
    return _sign_of(signs.add_(taken / 2)) if taken else signs  # half a vote, which decides where there is none


def _sign_of(x: Tensor) -> Tensor:
    """-1, 0, 1 or NaN, in place. torch's own sign of NaN is 0, which would hide it."""
    large = torch.finfo(x.dtype).max
    return x.mul_(large).mul_(large).clamp_(-1, 1)


def _vote(stack: Tensor, by: By) -> Tensor:
    """The sum of values or of signs, vector after vector: reducing dim 0 would change bits with the block."""
    if by not in ("sum", "count"):
        raise RangeError(f"by must be 'sum' or 'count'; got {by!r}")
    first, *rest = stack
    total = first.clone() if by == "sum" else _sign_of(first.clone())
    for x in rest:
        total += x if by == "sum" else _sign_of(x.clone())
    return total


@runs("element")
def agreement(stack: Tensor) -> Tensor:
    """Count the vectors that have the elected sign, entry by entry, as a fraction.

    `|{i : sign(x_i) = sign(sum_j x_j)}| / n`; 0 where the sum is zero, NaN where it is NaN.

    Args:
        stack: `(n, *shape)`, any float dtype.

    Returns:
        `(*shape)` in [0, 1], the dtype of the stack.

    Examples:
        >>> agreement(torch.tensor([[1.0, 1.0, 0.0], [2.0, -3.0, 0.0]]))
        tensor([1.0000, 0.5000, 0.0000])
    """
    return _voters(stack) / len(stack)


@runs("element")
def consistent(stack: Tensor, agree: float = 1.0) -> Tensor:
    """Mark the entries in which enough vectors agree in sign, by 1, and all others by 0.

    Args:
        stack: `(n, *shape)`, any float dtype.
        agree: the fraction of the vectors that must have the elected sign, in (0, 1]; 1 means unanimous.

    Returns:
        `(*shape)` of 0 and 1 in the dtype of the stack; 0 where the sum is zero, NaN where it is NaN.

    Raises:
        RangeError: agree outside (0, 1].

    Examples:
        >>> consistent(torch.tensor([[1.0, 1.0, 0.0], [2.0, -3.0, 0.0]]))
        tensor([1., 0., 0.])
    """
    if not 0 < agree <= 1:
        raise RangeError(f"agree must be the fraction of vectors that agree, in (0, 1]; got {agree!r}")
    # as a number of vectors: agreement() itself is rounded in half precision
    needed = math.ceil(agree * len(stack) - 1e-9)
    return (_voters(stack) - (needed - 1)).clamp_(0, 1)


def _voters(stack: Tensor) -> Tensor:
    """How many vectors have the elected sign, `(*shape)`."""
    signs = elected(stack, "sum", "none", None)
    voters = torch.zeros_like(signs)
    for x in stack:
        voters += (x.sign() * signs).clamp_(min=0)
    return voters


def __dir__() -> list[str]:  # completion shows what is public
    return __all__
