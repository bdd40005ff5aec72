"""Sparsifiers: leaves, `(*shape) -> (*shape)`, that set entries to zero.

All of them are odd (`f(-x) == -f(x)`), keep the dtype and never touch their input. For `scope`, see `taskvec.rules`;
a plain tensor is its own globe.
"""

from functools import partial
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from ._errors import RangeError
from ._random import bernoulli
from ._select import (
    EVERYTHING,
    Count,
    Cut,
    check_density,
    cut_largest,
    kept,
    sorted_rows,
)
from ._types import Leaf
from .rules import Place, Scope, Total, numbers_in, over, row_length, runs, sum64

__all__ = ["above", "band", "drop", "rank_drop", "topk"]

Rescale: TypeAlias = Literal["density", "l1"] | None
"""What a random drop multiplies the survivors by: one over the probability to survive, the ratio of the L1 norms
before and after, or nothing."""


def topk_cut(total: Total, density: float, count: Count = "round") -> Cut:
    """The statistic of `topk`: which magnitudes are kept over the scope."""
    if check_density(density) == 1:
        return EVERYTHING  # no statistic: NaN may flow
    return cut_largest(total, kept(density, total.entries, count), with_equals=count == "reference")


@runs("element", cut=topk_cut)
def topk(
    x: Tensor,
    density: float,
    *,
    scope: Scope = "global",
    count: Count = "round",
    cut: Cut | None = None,
    at: Place = Place(),  # noqa: B008
) -> Tensor:
    """Keep the entries of largest magnitude: the trim of TIES.

    Exactly `round(density * n)` of the n entries in the scope are kept. Equal magnitudes at the threshold, common among
    differences of bfloat16 weights, are taken in a random order that depends on the tensor's name and the index only.

    Args:
        x: `(*shape)`, any float dtype.
        density: fraction kept, in [0, 1].
        scope: `"global"` over all names of the call (the TIES paper), `"tensor"`, or `"row"`.
        count: `"round"`, `"floor"` (mergekit, PEFT) or `"reference"` (the original TIES code: a threshold, so one
            more entry and all that are equal).
        cut: handed in by the engine.
        at: handed in by the engine.

    Returns:
        `(*shape)`, the dtype of `x`, zeros elsewhere.

    Raises:
        RangeError: density outside [0, 1].
        NonFiniteError: NaN or inf, where density is below 1.

    Example:
        >>> topk(torch.tensor([0.1, -3.0, 2.0, 0.5]), 0.5)
        tensor([ 0., -3.,  2.,  0.])

    Reference:
        Yadav et al., TIES-Merging, 2023, https://arxiv.org/abs/2306.01708
    """
    if scope == "row":
        check_density(density)
        length = row_length(x)
        keep = kept(density, length, count)
        if keep >= length:
            return x.clone()
        if count == "reference":
            raise RangeError("count='reference' reproduces a threshold over a whole vector; it has no scope='row'")
        return _keep_ranks(x, at, 0, keep)
    if cut is None:
        cut = topk_cut(over(x, at, stacked=False), density, count)
    return cut.keep(x, at)


@runs("element")
def above(x: Tensor, threshold: float) -> Tensor:
    """Keep the entries whose magnitude is at least a threshold.

    Args:
        x: `(*shape)`, any float dtype.
        threshold: in the units of `x`, not negative.

    Returns:
        `(*shape)`, the dtype of `x`.

    Raises:
        RangeError: a negative threshold.

    Example:
        >>> above(torch.tensor([0.1, -3.0, 2.0]), 2.0)
        tensor([ 0., -3.,  2.])
    """
    if not threshold >= 0:
        raise RangeError(f"threshold is a magnitude, at least 0, not {threshold!r}")
    return _keep(x, x.abs() >= threshold)


def band_cuts(total: Total, density: float, outliers: float, count: Count = "round") -> tuple[Cut, Cut]:
    """The statistic of `band`: the cut below which all is dropped, and the one above which all is."""
    top, keep = _band_ranks(total.entries, density, outliers, count)
    return cut_largest(total, top + keep), cut_largest(total, top)


@runs("element", cuts=band_cuts)
def band(
    x: Tensor,
    density: float,
    outliers: float,
    *,
    scope: Scope = "row",
    count: Count = "round",
    cuts: tuple[Cut, Cut] | None = None,
    at: Place = Place(),  # noqa: B008
) -> Tensor:
    """Drop the largest magnitudes, then keep the next ones: the mask of Model Breadcrumbs.

    Of the n entries in the scope, the `round(outliers * n)` largest are dropped, and of what is left the
    `round(density * n)` largest are kept (fewer if fewer are left).

    Args:
        x: `(*shape)`, any float dtype.
        density: fraction kept, in [0, 1].
        outliers: fraction dropped at the top, in [0, 1].
        scope: `"row"` as in the authors' code, `"tensor"` (mergekit) or `"global"`.
        count: `"round"` or `"floor"` (the authors' code, mergekit).
        cuts: handed in by the engine.
        at: handed in by the engine.

    Returns:
        `(*shape)`, the dtype of `x`.

    Raises:
        RangeError: a fraction outside [0, 1].
        NonFiniteError: NaN or inf.

    Example:
        >>> band(torch.tensor([9.0, -3.0, 2.0, 0.5]), density=0.5, outliers=0.25)
        tensor([ 0., -3.,  2.,  0.])

    Reference:
        Davari and Belilovsky, Model Breadcrumbs, 2023, https://arxiv.org/abs/2312.06795
    """
    if scope == "row":
        top, keep = _band_ranks(row_length(x), density, outliers, count)
        return _keep_ranks(x, at, top, top + keep)
    if cuts is None:
        cuts = band_cuts(over(x, at, stacked=False), density, outliers, count)
    within, outside = cuts
    return within.keep(x, at) - outside.keep(x, at)  # what both keep is zero, exactly


def _band_ranks(entries: int, density: float, outliers: float, count: Count) -> tuple[int, int]:
    if count == "reference":
        raise RangeError("count is 'round' or 'floor' for a band")
    check_density(outliers, "outliers")
    top = kept(outliers, entries, count)
    return top, min(kept(density, entries, count), entries - top)


def l1_factor(total: Total, density: float, seed: int, rescale: Rescale = "density") -> float | None:
    """The statistic of `drop`: the L1 norm before over the one after, where that is the rescaling asked for."""
    return _l1_ratio(total, partial(drop, density=density, seed=seed, rescale=None)) if rescale == "l1" else None


def rank_l1_factor(
    total: Total, density: float, epsilon: float, seed: int, rescale: Rescale = "density"
) -> float | None:
    """The statistic of `rank_drop`, as `l1_factor` is of `drop`."""
    plain = partial(rank_drop, density=density, epsilon=epsilon, seed=seed, rescale=None)
    return _l1_ratio(total, plain) if rescale == "l1" else None


def _l1_ratio(total: Total, leaf: Leaf) -> float:
    def norms(block: Tensor, at: Place) -> Tensor:
        return torch.stack([sum64(block.abs()), sum64(leaf(block, at=at).abs())])

    before, after = numbers_in(total(norms))
    return before / after if after > 0 else 1.0


@runs("element", factor=l1_factor)
def drop(
    x: Tensor,
    density: float,
    *,
    seed: int,
    rescale: Rescale = "density",
    factor: float | None = None,
    at: Place = Place(),  # noqa: B008
) -> Tensor:
    """Keep each entry with a probability and rescale the survivors: DARE.

    `m ~ Bernoulli(density)`, independent for every entry; the result is `m * x / density`, which has the expectation
    `x`. The mask depends on (seed, tensor's name, flat index) only, so it is the same on every device and sharding.

    Args:
        x: `(*shape)`, any float dtype.
        density: probability to be kept, in [0, 1] (one minus DARE's drop rate).
        seed: any integer. For several vectors give each its own: `fold(seed, i)`.
        rescale: `"density"` divides by the density, as in the paper; `"l1"` restores the L1 norm of the tensor
            (mergekit; biased for small or sparse tensors); None leaves the survivors as they are.
        factor: handed in by the engine.
        at: handed in by the engine.

    Returns:
        `(*shape)`, the dtype of `x`; density 0 gives zeros.

    Raises:
        RangeError: density outside [0, 1], or an unknown rescale.

    Example:
        >>> drop(torch.ones(8), 0.5, seed=0).unique()
        tensor([0., 2.])

    Reference:
        Yu et al., Language Models are Super Mario, 2023, https://arxiv.org/abs/2311.03099
    """
    check_density(density)
    if rescale == "l1" and factor is None:
        factor = l1_factor(over(x, at, stacked=False), density, seed, rescale)
    survivors = _keep(x, bernoulli(at.bits(seed, x), density))
    return _scaled(survivors, density, rescale, factor)


@runs("row", factor=rank_l1_factor)
def rank_drop(
    x: Tensor,
    density: float,
    epsilon: float,
    *,
    seed: int,
    rescale: Rescale = "density",
    factor: float | None = None,
    at: Place = Place(),  # noqa: B008
) -> Tensor:
    """Keep each entry with a probability that grows with its rank in its row: DELLA's MagPrune.

    The probability runs linearly from `density - epsilon / 2` for the smallest magnitude of a row to
    `density + epsilon / 2` for the largest; each survivor is divided by its own probability. Rows are slices of dim 0,
    flattened; a tensor with fewer dimensions is one row, and a row of one entry has the probability `density`.

    Args:
        x: `(*shape)`, any float dtype.
        density: mean probability to be kept.
        epsilon: width of the window of probabilities, not negative; the window must lie in [0, 1].
        seed: any integer. For several vectors give each its own: `fold(seed, i)`.
        rescale: `"density"` divides by each probability, as in the paper; `"l1"` restores the L1 norm of the tensor
            (mergekit); None leaves the survivors as they are.
        factor: handed in by the engine.
        at: handed in by the engine.

    Returns:
        `(*shape)`, the dtype of `x`.

    Raises:
        RangeError: a window that leaves [0, 1], or an unknown rescale.
        NonFiniteError: NaN or inf.

    Example:
        >>> rank_drop(torch.tensor([1.0, 2.0, 3.0, 4.0]), 0.5, 0.5, seed=1, rescale=None)
        tensor([0., 0., 0., 4.])

    Reference:
        Deep et al., DELLA-Merging, 2024, https://arxiv.org/abs/2406.11617
    """
    check_density(density)
    low = density - epsilon / 2
    if not (epsilon >= 0 and low >= 0 and density + epsilon / 2 <= 1):
        raise RangeError(
            f"density - epsilon/2 and density + epsilon/2 are probabilities; density {density:g} and epsilon "
            f"{epsilon:g} give {low:g} and {density + epsilon / 2:g}"
        )
    length = row_length(x)
    order = sorted_rows(x, at)
    rank = torch.empty_like(order)  # 0 for the smallest
    rank.scatter_(1, order, torch.arange(length - 1, -1, -1, device=x.device).expand_as(order))
    step = epsilon / (length - 1) if length > 1 else 0.0
    probability = (low if length > 1 else density) + rank.to(torch.float64) * step
    # compared as integers: 32 random bits below probability * 2**32
    uniform = at.bits(seed, x).reshape(order.shape).to(torch.int64) + (1 << 31)
    mask = uniform < (probability * 4294967296.0).round().to(torch.int64)
    survivors = _keep(x, mask.reshape(x.shape))
    if rescale == "density":
        safe = probability.clamp(min=torch.finfo(torch.float64).tiny)  # a probability of 0 leaves nothing to divide
        return (survivors.double() / safe.reshape(x.shape)).to(x.dtype)
    if rescale == "l1" and factor is None:
        factor = rank_l1_factor(over(x, at, stacked=False, pieces="row"), density, epsilon, seed, rescale)
    return _scaled(survivors, 1.0, rescale, factor)


def _scaled(survivors: Tensor, density: float, rescale: Rescale, factor: float | None) -> Tensor:
    if rescale not in ("density", "l1", None):
        raise RangeError(f"rescale is 'density', 'l1' or None, not {rescale!r}")
    by = factor if rescale == "l1" else 1 / density if rescale == "density" and density > 0 else None
    return survivors if by is None else survivors * by


def _keep(x: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, x, x.new_zeros(()))


def _keep_ranks(x: Tensor, at: Place, first: int, stop: int) -> Tensor:
    """Keep the entries whose place in their row, from the largest, is in [first, stop)."""
    order = sorted_rows(x, at)
    mask = torch.zeros_like(order, dtype=torch.bool)
    mask.scatter_(1, order[:, first:stop], True)
    return _keep(x, mask.reshape(x.shape))
