"""TIES: trim each vector, elect a sign for each entry, combine those that agree."""

from collections.abc import Sequence
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from .._engine.pieces import HERE, Place
from .._engine.select import EVERYTHING, Count, Cuts, masked
from .._engine.totals import over
from ..errors import RangeError
from ..rules import Scope, runs
from ..signs import By, Zero, elected, sign, votes
from ..sparsify import Passes, topk, topk_cuts
from ._sums import added, factors_of, total

__all__ = ["disjoint_mean", "ties"]

Reduce: TypeAlias = Literal["mean", "sum", "weighted_mean", "weighted_mean_or_sum"]
"""What is made of the vectors that agree: their sum over their number, their sum, or their weighted sum over the sum of
their weights, which may be 0: then nothing, or the sum."""

NO_WEIGHT = 1e-8  # what mergekit takes for a sum of weights that is 0


@runs("element")
def disjoint_mean(
    stack: Tensor, signs: Tensor, *, weights: Sequence[float] | None = None, reduce: Reduce = "mean"
) -> Tensor:
    """Average the vectors that have a given sign, entry by entry: the last step of TIES.

    `sum_{i in A} w_i x_i / |A|` with `A = {i : sign(x_i) = sign != 0}`; 0 where A is empty.

    Args:
        stack: `(n, *shape)`, any float dtype.
        signs: `(*shape)`, such as `elect(stack)`.
        weights: n numbers multiplied in; 1 by default.
        reduce: `"mean"` divides by the number of those that agree (PEFT), `"weighted_mean"` by the sum of their
            weights (0 where that is 0; `"weighted_mean_or_sum"` divides by nothing there, as mergekit), `"sum"` by
            nothing (BadMerging's and fusion_bench's TIES).

    Returns:
        `(*shape)`, the dtype of the stack.

    Raises:
        RangeError: a wrong number of weights, an unknown reduction.

    Examples:
        >>> stack = torch.tensor([[1.0, -1.0], [3.0, 4.0]])
        >>> disjoint_mean(stack, torch.tensor([1.0, 1.0]))
        tensor([2., 4.])

    References:
        [Yadav et al., TIES-Merging, 2023](https://arxiv.org/abs/2306.01708)
    """
    factors = factors_of(weights, len(stack))
    return _disjoint(stack, signs, factors, factors, reduce)


def _disjoint(
    stack: Tensor, signs: Tensor, factors: Sequence[float], shares: Sequence[float], reduce: Reduce
) -> Tensor:
    """Sum `factor * x` over those that agree; a weighted mean divides by the sum of their shares."""
    if reduce not in get_args(Reduce):
        raise RangeError(f"reduce must be one of {', '.join(map(repr, get_args(Reduce)))}; got {reduce!r}")
    along = (stack * signs).clamp_(min=0)  # positive where a vector agrees; no masks, which cost more
    result = added(along, factors)
    if reduce == "mean":
        result /= total(along.sign_()).clamp_(min=1)
    elif reduce == "weighted_mean":
        agreeing = added(along.sign_(), shares)
        result = masked(result.div_(agreeing), agreeing != 0)
    elif reduce == "weighted_mean_or_sum":
        agreeing = added(along.sign_(), shares)
        size = agreeing.detach().abs()
        nothing = torch.lt(size, NO_WEIGHT, out=torch.empty_like(size))  # 0.0 and 1.0: masks cost three times as much
        result /= agreeing.mul_(1 - nothing).add_(nothing)
    return result.mul_(signs)


def _votes_of_trimmed(stack: Tensor, at: Place, cuts: Cuts, factors: Sequence[float] | None, by: By) -> float:
    return votes(_weighed(cuts.keep(stack, at), factors), by)


def ties_majority(
    n: int,
    entries: int,
    topk_cuts: Cuts,
    weights: Sequence[float] | None = None,
    by: By = "sum",
    zero: Zero = "none",
    weighted_vote: bool = False,
) -> Passes:
    """The second statistic of `ties`: the majority's sign, where zeros take it."""
    del entries
    if zero != "majority":
        return None
    factors = factors_of(weights, n) if weighted_vote else None
    return sign((yield from over(_votes_of_trimmed, topk_cuts, factors, by)))


@runs("element", topk_cuts, ties_majority)
def ties(
    stack: Tensor,
    density: float = 1.0,
    *,
    weights: Sequence[float] | None = None,
    scope: Scope = "global",
    count: Count = "round",
    by: By = "sum",
    zero: Zero = "none",
    weighted_vote: bool = False,
    reduce: Reduce = "mean",
    at: Place = HERE,
) -> Tensor:
    """Trim each vector, elect a sign for each entry, average those that agree: TIES.

    `disjoint_mean(trimmed, elect(trimmed))` with `trimmed_i = topk(x_i, density)`. The paper's coefficient is the scale
    of `apply` (1.0); its density is 0.2.

    Args:
        stack: `(n, *shape)` of task vectors, any float dtype.
        density: fraction kept of each vector, in [0, 1].
        weights: n numbers. They multiply what is averaged and do not vote (PEFT), unless `weighted_vote`.
        scope: of the trim: `"global"` as in the paper, `"tensor"` (PEFT, mergekit) or `"row"`.
        count: how a density becomes a number of entries, see `topk`.
        by: how signs are elected, see `elect`.
        zero: what an exact zero elects, see `elect`.
        weighted_vote: multiply by the weights before the election (mergekit).
        reduce: see `disjoint_mean`.

    Returns:
        `(*shape)`, the dtype of the stack.

    Raises:
        RangeError: density outside [0, 1], a wrong number of weights, an unknown choice.
        NonFiniteError: NaN or inf, where density is below 1.

    Examples:
        >>> ties(torch.tensor([[4.0, -1.0, 0.1, 2.0], [2.0, 0.2, 3.0, -2.5]]), density=0.5)
        tensor([ 4.0000,  0.0000,  3.0000, -2.5000])

    References:
        [Yadav et al., TIES-Merging, 2023](https://arxiv.org/abs/2306.01708). The authors' code keeps one more entry and
        gives exact zeros the majority's sign: `presets.ties_reference`.
    """
    n = len(stack)
    factors = factors_of(weights, n)
    voting = factors if weighted_vote else None
    if scope == "row" and zero == "majority":
        raise RangeError("scope must be 'global' or 'tensor' with zero='majority'; got 'row'")
    if scope == "row":
        cuts = Cuts((EVERYTHING,) * n)
        trimmed = _weighed(torch.stack([topk(x, density, scope=scope, count=count, at=at) for x in stack]), voting)
    else:
        cuts = at.take(topk_cuts, stack, density, count)
        everything = all(key == EVERYTHING for key in cuts.keys)
        trimmed = _weighed(stack if everything else cuts.keep(stack, at), voting)
    winner = at.take(ties_majority, stack, cuts, weights, by, zero, weighted_vote) if zero == "majority" else None
    signs = elected(trimmed, by, zero, winner)
    return _disjoint(trimmed, signs, [1.0] * n if weighted_vote else factors, factors, reduce)


def _weighed(stack: Tensor, factors: Sequence[float] | None) -> Tensor:
    if factors is None or all(factor == 1 for factor in factors):
        return stack
    column = torch.tensor(factors, dtype=torch.promote_types(stack.dtype, torch.float32), device=stack.device)
    return (stack * column.reshape(-1, *[1] * (stack.ndim - 1))).to(stack.dtype)
