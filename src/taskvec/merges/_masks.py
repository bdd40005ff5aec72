"""Merges of masked vectors: each is thinned out at random or by magnitude, then they are added up."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .._engine.pieces import HERE, Place
from .._engine.random import fold
from .._engine.select import Count
from ..errors import RangeError
from ..rules import Scope, runs
from ..signs import Zero
from ..sparsify import (
    First,
    Passes,
    Rescale,
    band_cuts,
    band_of_each,
    check_seed,
    drop_by,
    l1_factors,
    rank_drop_by,
    rank_l1_factors,
)
from ._sums import factors_of, weighted
from ._ties import Reduce, ties

__all__ = ["breadcrumbs", "dare", "della"]


def _seeds(seed: int, n: int) -> tuple[int, ...]:
    """A seed of its own for each vector."""
    return tuple(fold(check_seed(seed), i) for i in range(n))


def dare_factors(n: int, entries: int, density: float, seed: int, rescale: Rescale = "density") -> Passes:
    """The statistic of `dare`: each vector's rescaling, where that is measured."""
    del entries
    return (yield from l1_factors(density, _seeds(seed, n), rescale))


@runs("element", dare_factors)
def dare(
    stack: Tensor,
    density: float,
    *,
    seed: int,
    weights: Sequence[float] | None = None,
    rescale: Rescale = "density",
    at: Place = HERE,
) -> Tensor:
    """Drop entries at random, rescale the rest, add the vectors up: DARE.

    `sum_i w_i drop(x_i, density, seed=fold(seed, i))`. For DARE-TIES map `drop` over the vectors and merge by `ties`.

    Args:
        stack: `(n, *shape)` of task vectors, any float dtype.
        density: probability to be kept, in [0, 1] (one minus the paper's drop rate).
        seed: any integer; every vector gets its own mask.
        weights: n numbers; 1 by default.
        rescale: see `drop`.

    Returns:
        `(*shape)`, the dtype of the stack.

    Raises:
        RangeError: density outside [0, 1], a wrong number of weights.

    Examples:
        >>> dare(torch.ones(2, 4), 1.0, seed=0)
        tensor([2., 2., 2., 2.])

    References:
        [Yu et al., Language Models are Super Mario, 2023](https://arxiv.org/abs/2311.03099)
    """
    seeds = _seeds(seed, len(stack))
    factors = at.take(dare_factors, stack, density, seed, rescale)
    dropped = [drop_by(x, density, s, rescale, f, at) for x, s, f in zip(stack, seeds, factors, strict=True)]
    return weighted(torch.stack(dropped), factors_of(weights, len(stack)))


@runs("element", band_cuts)
def breadcrumbs(
    stack: Tensor,
    density: float,
    outliers: float,
    *,
    weights: Sequence[float] | None = None,
    scope: Scope = "row",
    count: Count = "round",
    first: First = "outliers",
    at: Place = HERE,
) -> Tensor:
    """Mask both ends of each vector's magnitudes, add the vectors up: Model Breadcrumbs.

    `sum_i w_i band(x_i, density, outliers)`.

    Args:
        stack: `(n, *shape)` of task vectors, any float dtype.
        density: fraction kept, in [0, 1].
        outliers: fraction dropped at the top, in [0, 1].
        weights: n numbers; 1 by default.
        scope: `"row"` as in the authors' code, `"tensor"` (mergekit) or `"global"`.
        count: `"round"` or `"floor"` (the authors' code, mergekit).
        first: which fraction is taken in full where both exceed the scope together, see `band`.

    Returns:
        `(*shape)`, the dtype of the stack.

    Raises:
        RangeError: a fraction outside [0, 1], a wrong number of weights, an unknown count or first.
        NonFiniteError: NaN or inf.

    Examples:
        >>> breadcrumbs(torch.tensor([[9.0, -3.0, 2.0, 0.5], [1.0, 2.0, 3.0, 4.0]]), 0.5, 0.25)
        tensor([ 0., -1.,  5.,  0.])

    References:
        [Davari and Belilovsky, Model Breadcrumbs, 2023](https://arxiv.org/abs/2312.06795)
    """
    masked = band_of_each(stack, density, outliers, scope, count, first, at)
    return weighted(masked, factors_of(weights, len(stack)))


def della_factors(
    n: int, entries: int, density: float, epsilon: float, seed: int, rescale: Rescale = "density"
) -> Passes:
    """The statistic of `della`: each vector's rescaling, where that is measured."""
    del entries
    return (yield from rank_l1_factors(density, epsilon, _seeds(seed, n), rescale))


@runs("row", della_factors)
def della(
    stack: Tensor,
    density: float,
    epsilon: float,
    *,
    seed: int,
    weights: Sequence[float] | None = None,
    rescale: Rescale = "density",
    zero: Zero = "none",
    weighted_vote: bool = False,
    reduce: Reduce = "mean",
    at: Place = HERE,
) -> Tensor:
    """Drop entries at random by rank, elect signs, average those that agree: DELLA.

    `disjoint_mean(dropped, elect(dropped))` with `dropped_i = rank_drop(x_i, density, epsilon, seed=fold(seed, i))`.

    Args:
        stack: `(n, *shape)` of task vectors, any float dtype.
        density: mean probability to be kept (one minus the paper's drop rate).
        epsilon: width of the window of probabilities, see `rank_drop`.
        seed: any integer; every vector gets its own mask.
        weights: n numbers that multiply what is averaged; 1 by default.
        rescale: see `rank_drop`.
        zero: what an exact zero elects, `"none"` or `"positive"` (mergekit).
        weighted_vote: multiply by the weights before the election (mergekit).
        reduce: see `disjoint_mean`.

    Returns:
        `(*shape)`, the dtype of the stack.

    Raises:
        RangeError: a window that leaves [0, 1], a wrong number of weights, an unknown choice.
        NonFiniteError: NaN or inf.

    Examples:
        >>> della(torch.tensor([[1.0, -2.0], [3.0, 5.0]]), 1.0, 0.0, seed=0)
        tensor([2., 5.])

    References:
        [Deep et al., DELLA-Merging, 2024](https://arxiv.org/abs/2406.11617)
    """
    if zero == "majority":
        raise RangeError("zero must be 'none' or 'positive' here: a block of rows has no majority of its own")
    seeds = _seeds(seed, len(stack))
    factors = at.take(della_factors, stack, density, epsilon, seed, rescale)
    dropped = torch.stack(
        [rank_drop_by(x, density, epsilon, s, rescale, f, at) for x, s, f in zip(stack, seeds, factors, strict=True)]
    )
    return ties(dropped, weights=weights, scope="tensor", zero=zero, weighted_vote=weighted_vote, reduce=reduce)
