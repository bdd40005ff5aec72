"""Elementwise merge rules: `(n, *shape) -> (*shape)`.

They add vector after vector and never reduce over dim 0, whose sums change bits with the length of a block. All keep
the dtype and never touch their input. `weights` are n numbers, one a vector. For `scope`, see `taskvec.rules`.
"""

from collections.abc import Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from ._errors import DegenerateError, RangeError
from ._random import fold
from ._select import EVERYTHING, Count, Cut
from .rules import Place, Scope, Total, over, runs
from .signs import By, Zero, consistent, elect, elected, majority_of
from .sparsify import (
    Rescale,
    band,
    band_cuts,
    drop,
    l1_factor,
    rank_drop,
    rank_l1_factor,
    topk,
    topk_cut,
)

__all__ = [
    "breadcrumbs",
    "consensus",
    "dare",
    "della",
    "disjoint_mean",
    "magmax",
    "mean",
    "ties",
    "total",
    "weighted",
]

Reduce: TypeAlias = Literal["mean", "sum", "weighted_mean"]
"""What is made of the vectors that agree: their sum over their number, their sum, or their weighted sum over the sum of
their weights."""


@runs("element")
def mean(stack: Tensor, weights: Sequence[float] | None = None) -> Tensor:
    """The mean, `sum_i w_i x_i / sum_i w_i`: weight averaging, model soups.

    Args:
        stack: `(n, *shape)`, any float dtype.
        weights: n numbers whose sum is not zero; equal by default.

    Returns:
        `(*shape)`, the dtype of the stack.

    Raises:
        RangeError: a wrong number of weights.
        DegenerateError: weights that sum to zero.

    Example:
        >>> mean(torch.tensor([[1.0, 2.0], [3.0, 6.0]]), weights=[3, 1])
        tensor([1.5000, 3.0000])

    Reference:
        Wortsman et al., Model soups, 2022, https://arxiv.org/abs/2203.05482
    """
    if weights is None:
        return total(stack) / len(stack)
    scale = sum(check_weights(weights, len(stack)))
    if scale == 0:
        raise DegenerateError(f"weights {list(weights)} sum to zero: no mean; weighted() takes their sum as it is")
    return weighted(stack, weights) / scale


@runs("element")
def total(stack: Tensor) -> Tensor:
    """The sum, `sum_i x_i`: task arithmetic, whose coefficient is the scale of `apply`.

    Args:
        stack: `(n, *shape)`, any float dtype.

    Returns:
        `(*shape)`, the dtype of the stack.

    Example:
        >>> total(torch.tensor([[1.0, 2.0], [3.0, 6.0]]))
        tensor([4., 8.])

    Reference:
        Ilharco et al., Editing Models with Task Arithmetic, 2022, https://arxiv.org/abs/2212.04089
    """
    result = stack[0].clone()
    for x in stack[1:]:
        result += x
    return result


@runs("element")
def weighted(stack: Tensor, weights: Sequence[float]) -> Tensor:
    """The weighted sum, `sum_i w_i x_i`; nothing is divided by.

    Args:
        stack: `(n, *shape)`, any float dtype.
        weights: n numbers of any sign.

    Returns:
        `(*shape)`, the dtype of the stack.

    Raises:
        RangeError: a wrong number of weights.

    Example:
        >>> weighted(torch.tensor([[1.0, 2.0], [3.0, 6.0]]), [1, -1])
        tensor([-2., -4.])
    """
    first, *rest = check_weights(weights, len(stack))
    result = stack[0] * first
    for x, weight in zip(stack[1:], rest, strict=True):
        result += x * weight
    return result


@runs("element")
def disjoint_mean(
    stack: Tensor, signs: Tensor, *, weights: Sequence[float] | None = None, reduce: Reduce = "mean"
) -> Tensor:
    """The mean of those that have the given sign, entry by entry: the last step of TIES.

    `sum_{i in A} w_i x_i / |A|` with `A = {i : sign(x_i) = sign != 0}`; 0 where A is empty.

    Args:
        stack: `(n, *shape)`, any float dtype.
        signs: `(*shape)`, such as `elect(stack)`.
        weights: n numbers multiplied in; 1 by default.
        reduce: `"mean"` divides by the number of those that agree (PEFT), `"weighted_mean"` by the sum of their
            weights (mergekit; 0 where that is 0), `"sum"` by nothing (BadMerging's and fusion_bench's TIES).

    Returns:
        `(*shape)`, the dtype of the stack.

    Raises:
        RangeError: a wrong number of weights, an unknown reduction.

    Example:
        >>> stack = torch.tensor([[1.0, -1.0], [3.0, 4.0]])
        >>> disjoint_mean(stack, torch.tensor([1.0, 1.0]))
        tensor([2., 4.])

    Reference:
        Yadav et al., TIES-Merging, 2023, https://arxiv.org/abs/2306.01708
    """
    factors = [1.0] * len(stack) if weights is None else check_weights(weights, len(stack))
    return _disjoint(stack, signs, factors, factors, reduce)


def _disjoint(
    stack: Tensor | list[Tensor], signs: Tensor, factors: Sequence[float], shares: Sequence[float], reduce: Reduce
) -> Tensor:
    """Sum `factor * x` over those that agree; a weighted mean divides by the sum of their shares."""
    if reduce not in ("mean", "sum", "weighted_mean"):
        raise RangeError(f"reduce is 'mean', 'sum' or 'weighted_mean', not {reduce!r}")
    result, agreeing = torch.zeros_like(signs), torch.zeros_like(signs)
    for x, factor, share in zip(stack, factors, shares, strict=True):
        along = (x * signs).clamp_(min=0)  # positive where x agrees; no masks, which cost more
        if reduce != "sum":
            voters = along.sign()
            agreeing += voters if reduce == "mean" else voters * share
        result += along if factor == 1 else along * factor
    if reduce == "mean":
        result /= agreeing.clamp_(min=1)
    elif reduce == "weighted_mean":
        result = torch.where(agreeing == 0, 0.0, result / agreeing)
    return result * signs


def ties_cuts(total: Total, density: float = 1.0, count: Count = "round") -> tuple[Cut, ...]:
    """The first statistic of `ties`: each vector's cut."""
    return tuple(topk_cut(vector, density, count) for vector in total.vectors)


def ties_majority(
    total: Total,
    cuts: tuple[Cut, ...],
    weights: Sequence[float] | None = None,
    by: By = "sum",
    zero: Zero = "nobody",
    weighted_vote: bool = False,
) -> float | None:
    """The second statistic of `ties`: the majority's sign, where zeros take it."""
    if zero != "majority":
        return None
    factors = _factors(weights, len(cuts)) if weighted_vote else None
    return majority_of(total, by, lambda stack, at: _trim(stack, cuts, at, factors))


@runs("element", cuts=ties_cuts, majority=ties_majority)
def ties(
    stack: Tensor,
    density: float = 1.0,
    *,
    weights: Sequence[float] | None = None,
    scope: Scope = "global",
    count: Count = "round",
    by: By = "sum",
    zero: Zero = "nobody",
    weighted_vote: bool = False,
    reduce: Reduce = "mean",
    cuts: tuple[Cut, ...] | None = None,
    majority: float | None = None,
    at: Place = Place(),  # noqa: B008
) -> Tensor:
    """TIES: trim each vector, elect a sign for each entry, average those that agree.

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
        cuts: handed in by the engine.
        majority: handed in by the engine.
        at: handed in by the engine.

    Returns:
        `(*shape)`, the dtype of the stack.

    Raises:
        RangeError: density outside [0, 1], a wrong number of weights, an unknown choice.
        NonFiniteError: NaN or inf, where density is below 1.

    Example:
        >>> ties(torch.tensor([[4.0, -1.0, 0.1, 2.0], [2.0, 0.2, 3.0, -2.5]]), density=0.5)
        tensor([ 4.0000,  0.0000,  3.0000, -2.5000])

    Reference:
        Yadav et al., TIES-Merging, 2023, https://arxiv.org/abs/2306.01708. The authors' code keeps one more entry and
        gives exact zeros the majority's sign: `presets.ties_reference`.
    """
    n = len(stack)
    factors = _factors(weights, n)
    if scope == "row":
        if zero == "majority":
            raise RangeError("a majority over rows is not offered; scope is 'global' or 'tensor' with zero='majority'")
        rows = [topk(x, density, scope=scope, count=count, at=at) for x in stack]
        trimmed = _trim(rows, [EVERYTHING] * n, at, factors if weighted_vote else None)
    else:
        cuts = ties_cuts(over(stack, at), density, count) if cuts is None else cuts
        trimmed = _trim(stack, cuts, at, factors if weighted_vote else None)
        if zero == "majority" and majority is None:
            majority = ties_majority(over(stack, at), cuts, weights, by, zero, weighted_vote)
    signs = elected(trimmed, by, zero, majority)
    return _disjoint(trimmed, signs, [1.0] * n if weighted_vote else factors, factors, reduce)


def _trim(
    stack: Tensor | list[Tensor], cuts: Sequence[Cut], at: Place, factors: Sequence[float] | None
) -> Tensor | list[Tensor]:
    if any(not cut.is_everything for cut in cuts):
        stack = [cut.keep(x, at) for x, cut in zip(stack, cuts, strict=True)]
    return stack if factors is None else [x * factor for x, factor in zip(stack, factors, strict=True)]


def dare_factors(total: Total, density: float, seed: int, rescale: Rescale = "density") -> tuple[float | None, ...]:
    """The statistic of `dare`: each vector's rescaling, where that is measured."""
    return tuple(l1_factor(vector, density, fold(seed, i), rescale) for i, vector in enumerate(total.vectors))


@runs("element", factors=dare_factors)
def dare(
    stack: Tensor,
    density: float,
    *,
    seed: int,
    weights: Sequence[float] | None = None,
    rescale: Rescale = "density",
    factors: tuple[float | None, ...] | None = None,
    at: Place = Place(),  # noqa: B008
) -> Tensor:
    """DARE: drop entries at random, rescale the rest, add the vectors up.

    `sum_i w_i drop(x_i, density, seed=fold(seed, i))`. For DARE-TIES map `drop` over the vectors and merge by `ties`.

    Args:
        stack: `(n, *shape)` of task vectors, any float dtype.
        density: probability to be kept, in [0, 1] (one minus the paper's drop rate).
        seed: any integer; every vector gets its own mask.
        weights: n numbers; 1 by default.
        rescale: see `drop`.
        factors: handed in by the engine.
        at: handed in by the engine.

    Returns:
        `(*shape)`, the dtype of the stack.

    Raises:
        RangeError: density outside [0, 1], a wrong number of weights.

    Example:
        >>> dare(torch.ones(2, 4), 1.0, seed=0)
        tensor([2., 2., 2., 2.])

    Reference:
        Yu et al., Language Models are Super Mario, 2023, https://arxiv.org/abs/2311.03099
    """
    known = (None,) * len(stack) if factors is None else factors
    dropped = [
        drop(x, density, seed=fold(seed, i), rescale=rescale, factor=factor, at=at)
        for i, (x, factor) in enumerate(zip(stack, known, strict=True))
    ]
    return weighted(torch.stack(dropped), _factors(weights, len(stack)))


def breadcrumbs_cuts(
    total: Total, density: float, outliers: float, count: Count = "round"
) -> tuple[tuple[Cut, Cut], ...]:
    """The statistic of `breadcrumbs`: each vector's two cuts."""
    return tuple(band_cuts(vector, density, outliers, count) for vector in total.vectors)


@runs("element", cuts=breadcrumbs_cuts)
def breadcrumbs(
    stack: Tensor,
    density: float,
    outliers: float,
    *,
    weights: Sequence[float] | None = None,
    scope: Scope = "row",
    count: Count = "round",
    cuts: tuple[tuple[Cut, Cut], ...] | None = None,
    at: Place = Place(),  # noqa: B008
) -> Tensor:
    """Model Breadcrumbs: mask both ends of each vector's magnitudes, add the vectors up.

    `sum_i w_i band(x_i, density, outliers)`.

    Args:
        stack: `(n, *shape)` of task vectors, any float dtype.
        density: fraction kept, in [0, 1].
        outliers: fraction dropped at the top, in [0, 1].
        weights: n numbers; 1 by default.
        scope: `"row"` as in the authors' code, `"tensor"` (mergekit) or `"global"`.
        count: `"round"` or `"floor"` (the authors' code, mergekit).
        cuts: handed in by the engine.
        at: handed in by the engine.

    Returns:
        `(*shape)`, the dtype of the stack.

    Raises:
        RangeError: a fraction outside [0, 1], a wrong number of weights.
        NonFiniteError: NaN or inf.

    Example:
        >>> breadcrumbs(torch.tensor([[9.0, -3.0, 2.0, 0.5], [1.0, 2.0, 3.0, 4.0]]), 0.5, 0.25)
        tensor([ 0., -1.,  5.,  0.])

    Reference:
        Davari and Belilovsky, Model Breadcrumbs, 2023, https://arxiv.org/abs/2312.06795
    """
    known = (None,) * len(stack) if cuts is None else cuts
    masked = [
        band(x, density, outliers, scope=scope, count=count, cuts=own, at=at)
        for x, own in zip(stack, known, strict=True)
    ]
    return weighted(torch.stack(masked), _factors(weights, len(stack)))


def della_factors(
    total: Total, density: float, epsilon: float, seed: int, rescale: Rescale = "density"
) -> tuple[float | None, ...]:
    """The statistic of `della`: each vector's rescaling, where that is measured."""
    return tuple(
        rank_l1_factor(vector, density, epsilon, fold(seed, i), rescale) for i, vector in enumerate(total.vectors)
    )


@runs("row", factors=della_factors)
def della(
    stack: Tensor,
    density: float,
    epsilon: float,
    *,
    seed: int,
    weights: Sequence[float] | None = None,
    rescale: Rescale = "density",
    factors: tuple[float | None, ...] | None = None,
    at: Place = Place(),  # noqa: B008
) -> Tensor:
    """DELLA: drop entries at random by rank, elect signs, average those that agree.

    `disjoint_mean(dropped, elect(dropped))` with `dropped_i = rank_drop(x_i, density, epsilon, seed=fold(seed, i))`.

    Args:
        stack: `(n, *shape)` of task vectors, any float dtype.
        density: mean probability to be kept (one minus the paper's drop rate).
        epsilon: width of the window of probabilities, see `rank_drop`.
        seed: any integer; every vector gets its own mask.
        weights: n numbers that multiply what is averaged; 1 by default.
        rescale: see `rank_drop`.
        factors: handed in by the engine.
        at: handed in by the engine.

    Returns:
        `(*shape)`, the dtype of the stack.

    Raises:
        RangeError: a window that leaves [0, 1], a wrong number of weights.
        NonFiniteError: NaN or inf.

    Example:
        >>> della(torch.tensor([[1.0, -2.0], [3.0, 5.0]]), 1.0, 0.0, seed=0)
        tensor([2., 5.])

    Reference:
        Deep et al., DELLA-Merging, 2024, https://arxiv.org/abs/2406.11617
    """
    known = (None,) * len(stack) if factors is None else factors
    dropped = torch.stack(
        [
            rank_drop(x, density, epsilon, seed=fold(seed, i), rescale=rescale, factor=factor, at=at)
            for i, (x, factor) in enumerate(zip(stack, known, strict=True))
        ]
    )
    return disjoint_mean(dropped, elect(dropped), weights=weights)


@runs("element")
def magmax(stack: Tensor) -> Tensor:
    """MagMax: of all vectors, the entry of largest magnitude; the last of equal ones.

    Args:
        stack: `(n, *shape)` of task vectors, any float dtype.

    Returns:
        `(*shape)`, the dtype of the stack.

    Example:
        >>> magmax(torch.tensor([[1.0, -5.0], [-2.0, 3.0]]))
        tensor([-2., -5.])

    Reference:
        Marczak et al., MagMax, 2024, https://arxiv.org/abs/2407.06322
    """
    result = stack[0].clone()
    for x in stack[1:]:
        result = torch.where((x.abs() < result.abs()) | result.isnan(), result, x)  # a NaN stays, so that it shows
    return result


@runs("element")
def consensus(stack: Tensor, agree: float = 1.0, *, reduce: Literal["mean", "sum", "largest"] = "mean") -> Tensor:
    """What is made of all vectors where enough of them agree in sign, and zero elsewhere.

    `1[enough agree] * reduce_i x_i`. Unlike in `ties`, nothing is trimmed and dissenters take part where they are few.

    Args:
        stack: `(n, *shape)` of task vectors, any float dtype.
        agree: the fraction of the vectors that must have the elected sign, in (0, 1]; 1 means unanimous.
        reduce: `"mean"`, `"sum"`, or `"largest"`, the entry of largest magnitude.

    Returns:
        `(*shape)`, the dtype of the stack.

    Raises:
        RangeError: a fraction outside (0, 1], an unknown reduction.

    Example:
        >>> consensus(torch.tensor([[1.0, 2.0, 0.0], [3.0, -2.5, 1.0]]))
        tensor([2., 0., 0.])

    Reference:
        Kim et al., NegMerge, 2024, https://arxiv.org/abs/2410.05583 (unanimous, mean); Pawlak et al., Backdoor Vectors,
        2025, https://arxiv.org/abs/2510.08016 (sign-consistent sparsification; our reading)
    """
    rules = {"mean": mean, "sum": total, "largest": magmax}
    if reduce not in rules:
        raise RangeError(f"reduce is 'mean', 'sum' or 'largest', not {reduce!r}")
    return torch.where(consistent(stack, agree) > 0, rules[reduce](stack), stack.new_zeros(()))


def check_weights(weights: Sequence[float], n: int) -> list[float]:
    """The weights as floats, refused unless there is one for each vector."""
    values = [float(weight) for weight in weights]
    if len(values) != n:
        raise RangeError(f"{len(values)} weights for {n} vectors; give one for each")
    return values


def _factors(weights: Sequence[float] | None, n: int) -> list[float]:
    return [1.0] * n if weights is None else check_weights(weights, n)
