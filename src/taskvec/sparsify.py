"""Sparsifiers: functions of one tensor, `(*shape) -> (*shape)`, that set entries to zero.

All of them are odd (`f(-x) == -f(x)`), keep the dtype and never change their input. For `scope`, see `taskvec.rules`;
a tensor given to such a function directly is its own scope.
"""

from collections.abc import Generator
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import torch
from torch import Tensor

from ._engine.pieces import HERE, Look, Place
from ._engine.random import bernoulli
from ._engine.ranks import placed, ranked_places, taken
from ._engine.select import (
    EVERYTHING,
    Count,
    Cuts,
    check_density,
    kept,
    largest,
    masked,
)
from ._engine.sources import spec_of
from ._engine.survivors import Measured, Part, part_of
from ._engine.totals import lockstep
from .errors import OptionError, RangeError
from .rules import Scope, runs

__all__ = ["above", "band", "drop", "rank_drop", "topk"]

Rescale: TypeAlias = Literal["density", "l1"] | None
"""What a random drop multiplies the survivors by: one over the probability to survive, the ratio of the L1 norms
before and after, or nothing."""

Passes: TypeAlias = Generator[Look, list[Any], Any]


def topk_cuts(n: int, entries: int, density: float, count: Count = "round") -> Passes:
    """A statistic: which magnitudes of each vector are kept over the scope."""
    if check_density(density) == 1:
        return Cuts((EVERYTHING,) * n)  # no pass: NaN may flow
    return (yield from largest(n, entries, kept(density, entries, count), with_equals=count == "reference"))


@runs("element", topk_cuts)
def topk(x: Tensor, density: float, *, scope: Scope = "global", count: Count = "round", at: Place = HERE) -> Tensor:
    """Keep the entries of largest magnitude: the trim of TIES.

    Exactly `round(density * n)` of the n entries in the scope are kept. Equal magnitudes at the threshold, common among
    differences of bfloat16 weights, are taken in an order that is spread evenly over the tensor and depends on its name
    and on nothing else.

    Args:
        x: `(*shape)`, any float dtype.
        density: fraction kept, in [0, 1].
        scope: `"global"` over all names of the call (the TIES paper), `"tensor"`, or `"row"`.
        count: `"round"`, `"floor"` (PEFT), `"at_least_one"` (mergekit: floor, or one where that is none) or
            `"reference"` (the original TIES code: a threshold, so one more entry and all that are equal).

    Returns:
        `(*shape)`, the dtype of `x`, zeros elsewhere.

    Raises:
        RangeError: density outside [0, 1].
        NonFiniteError: NaN or inf, where density is below 1.

    Examples:
        >>> topk(torch.tensor([0.1, -3.0, 2.0, 0.5]), 0.5)
        tensor([ 0., -3.,  2.,  0.])

    References:
        [Yadav et al., TIES-Merging, 2023](https://arxiv.org/abs/2306.01708)
    """
    if scope != "row":
        return at.take(topk_cuts, x[None], density, count).keep(x[None], at)[0]
    check_density(density)
    length = spec_of(x).row
    keep = kept(density, length, count)
    if keep >= length:
        return x.clone()
    if count == "reference":
        raise RangeError("count='reference' reproduces a threshold over a whole vector; it has no scope='row'")
    return _keep_ranks(x, at, 0, keep)


@runs("element")
def above(x: Tensor, threshold: float) -> Tensor:
    """Keep the entries whose magnitude is at least a threshold.

    NaN stays.

    Args:
        x: `(*shape)`, any float dtype.
        threshold: in the units of `x`, not negative.

    Returns:
        `(*shape)`, the dtype of `x`.

    Raises:
        RangeError: a negative threshold.

    Examples:
        >>> above(torch.tensor([0.1, -3.0, 2.0]), 2.0)
        tensor([ 0., -3.,  2.])
    """
    if not threshold >= 0:
        raise RangeError(f"threshold must be a magnitude, at least 0; got {threshold!r}")
    return masked(x, ~(x.abs() < threshold))


First: TypeAlias = Literal["outliers", "density"]
"""Which fraction of a band is taken in full where both exceed the scope together."""


def band_cuts(
    n: int, entries: int, density: float, outliers: float, count: Count = "round", first: First = "outliers"
) -> Passes:
    """A statistic: the cuts below which all is dropped, and those above which all is."""
    top, keep = _band_ranks(entries, density, outliers, count, first)
    return (yield from lockstep(largest(n, entries, top + keep), largest(n, entries, top)))


@runs("element", band_cuts)
def band(
    x: Tensor,
    density: float,
    outliers: float,
    *,
    scope: Scope = "row",
    count: Count = "round",
    first: First = "outliers",
    at: Place = HERE,
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
        first: where both fractions exceed the scope together, `"outliers"` are dropped first and fewer are kept, or
            the `"density"` is kept first and fewer outliers are dropped (mergekit).

    Returns:
        `(*shape)`, the dtype of `x`.

    Raises:
        RangeError: a fraction outside [0, 1], an unknown count or first.
        NonFiniteError: NaN or inf.

    Examples:
        >>> band(torch.tensor([9.0, -3.0, 2.0, 0.5]), density=0.5, outliers=0.25)
        tensor([ 0., -3.,  2.,  0.])

    References:
        [Davari and Belilovsky, Model Breadcrumbs, 2023](https://arxiv.org/abs/2312.06795)
    """
    return band_of_each(x[None], density, outliers, scope, count, first, at)[0]


def band_of_each(
    stack: Tensor, density: float, outliers: float, scope: Scope, count: Count, first: First, at: Place
) -> Tensor:
    """`band` of every vector of a stack."""
    if scope == "row":
        top, keep = _band_ranks(spec_of(stack[0]).row, density, outliers, count, first)
        return torch.stack([_keep_ranks(x, at, top, top + keep) for x in stack])
    within, outside = at.take(band_cuts, stack, density, outliers, count, first)
    return within.keep(stack, at).sub_(outside.keep(stack, at))  # what both keep is zero, exactly


def _band_ranks(entries: int, density: float, outliers: float, count: Count, first: First) -> tuple[int, int]:
    if count == "reference":
        raise RangeError("count must be 'round' or 'floor' for a band; got 'reference'")
    if first not in get_args(First):
        raise RangeError(f"first must be 'outliers' or 'density'; got {first!r}")
    check_density(outliers, "outliers")
    top, keep = kept(outliers, entries, count), kept(density, entries, count)
    return (top, min(keep, entries - top)) if first == "outliers" else (min(top, entries - keep), keep)


def check_seed(seed: int) -> int:
    """The seed, refused unless it is an integer."""
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise OptionError(f"seed must be an integer; got {seed!r}; use one number for all vectors, such as seed=0")
    return int(seed)


def _parts_of_drop(stack: Tensor, at: Place, density: float, seeds: tuple[int, ...]) -> list[Part]:
    return [part_of(x, at.draw(seed, density, x), at) for x, seed in zip(stack, seeds, strict=True)]


def _parts_of_rank_drop(stack: Tensor, at: Place, density: float, epsilon: float, seeds: tuple[int, ...]) -> list[Part]:
    return [part_of(x, _rank_draw(x, density, epsilon, s, at)[0], at) for x, s in zip(stack, seeds, strict=True)]


def l1_factors(density: float, seeds: tuple[int, ...], rescale: Rescale) -> Passes:
    """The L1 norm of each vector before its random drop over the one after, where that is the rescaling asked for."""
    check_density(density)
    return (yield from _measured(Look(_parts_of_drop, (density, seeds)), seeds, rescale))


def rank_l1_factors(density: float, epsilon: float, seeds: tuple[int, ...], rescale: Rescale) -> Passes:
    """As `l1_factors`, for `rank_drop`."""
    look = Look(_parts_of_rank_drop, (density, epsilon, seeds), pieces="row")
    return (yield from _measured(look, seeds, rescale))


def _measured(look: Look, seeds: tuple[int, ...], rescale: Rescale) -> Passes:
    if rescale != "l1":
        return [None] * len(seeds)
    found: list[Measured] = []
    blocks: list[list[Part]] = yield look
    for i in range(len(seeds)):
        parts = [block[i] for block in blocks]
        before, after = sum(part.before for part in parts), sum(part.after for part in parts)
        bits = {start: own for part in parts for start, own in part.bits.items()}
        found.append(Measured(before / after if after > 0 else 1.0, bits))
    return found


def drop_factors(n: int, entries: int, density: float, seed: int, rescale: Rescale = "density") -> Passes:
    """The statistic of `drop`."""
    del n, entries
    return (yield from l1_factors(density, (check_seed(seed),), rescale))


@runs("element", drop_factors)
def drop(x: Tensor, density: float, *, seed: int, rescale: Rescale = "density", at: Place = HERE) -> Tensor:
    """Keep each entry with a probability and rescale the survivors: DARE.

    `m ~ Bernoulli(density)`, independent for every entry; the result is `m * x / density`, which has the expectation
    `x`. The mask depends on (seed, tensor's name, flat index) only, so it is the same on every device and sharding.

    Args:
        x: `(*shape)`, any float dtype.
        density: probability to be kept, in [0, 1] (one minus DARE's drop rate).
        seed: any integer. For several vectors give each its own: `fold(seed, i)`.
        rescale: `"density"` divides by the density, as in the paper; `"l1"` restores the L1 norm of the tensor
            (mergekit; biased for small or sparse tensors); None leaves the survivors as they are.

    Returns:
        `(*shape)`, the dtype of `x`; density 0 gives zeros.

    Raises:
        RangeError: density outside [0, 1], or an unknown rescale.
        OptionError: a seed that is not an integer.

    Examples:
        >>> drop(torch.ones(8), 0.5, seed=0).unique()
        tensor([0., 2.])

    References:
        [Yu et al., Language Models are Super Mario, 2023](https://arxiv.org/abs/2311.03099)
    """
    check_seed(seed)
    (known,) = at.take(drop_factors, x[None], density, seed, rescale) if rescale == "l1" else (None,)
    return drop_by(x, density, seed, rescale, known, at)


def drop_by(x: Tensor, density: float, seed: int, rescale: Rescale, known: Measured | None, at: Place) -> Tensor:
    """`drop` after its first pass, if there was one."""
    check_density(density)
    mask = None if known is None else known.mask(x, at)
    return _scaled(masked(x, at.draw(seed, density, x) if mask is None else mask), density, rescale, known)


def rank_drop_factors(
    n: int, entries: int, density: float, epsilon: float, seed: int, rescale: Rescale = "density"
) -> Passes:
    """The statistic of `rank_drop`."""
    del n, entries
    return (yield from rank_l1_factors(density, epsilon, (check_seed(seed),), rescale))


@runs("row", rank_drop_factors)
def rank_drop(
    x: Tensor, density: float, epsilon: float, *, seed: int, rescale: Rescale = "density", at: Place = HERE
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

    Returns:
        `(*shape)`, the dtype of `x`.

    Raises:
        RangeError: a window that leaves [0, 1], or an unknown rescale.
        OptionError: a seed that is not an integer.
        NonFiniteError: NaN or inf.

    Examples:
        >>> x = torch.tensor([1.0, 2.0, 3.0, 4.0])
        >>> rank_drop(x, 0.5, 1.0, seed=1, rescale=None)[[0, 3]]  # never, always
        tensor([0., 4.])

    References:
        [Deep et al., DELLA-Merging, 2024](https://arxiv.org/abs/2406.11617)
    """
    check_seed(seed)
    (known,) = at.take(rank_drop_factors, x[None], density, epsilon, seed, rescale) if rescale == "l1" else (None,)
    return rank_drop_by(x, density, epsilon, seed, rescale, known, at)


def rank_drop_by(
    x: Tensor, density: float, epsilon: float, seed: int, rescale: Rescale, known: Measured | None, at: Place
) -> Tensor:
    """`rank_drop` after its first pass, if there was one."""
    mask = None if known is None else known.mask(x, at)
    if mask is None:
        mask, places, by_rank = _rank_draw(x, density, epsilon, seed, at)
        if rescale == "density":  # a probability of 0 leaves nothing to divide
            by_place = placed(x.shape, places, by_rank.clamp(min=torch.finfo(torch.float64).tiny))
            x = (x.to(torch.float64) / by_place).to(x.dtype)
    return _scaled(masked(x, mask), 1.0, rescale, known)


def _rank_draw(x: Tensor, density: float, epsilon: float, seed: int, at: Place) -> tuple[Tensor, Tensor, Tensor]:
    """True for what `rank_drop` keeps; the places of the entries of each row by rank; the probabilities by rank."""
    by_rank = _window(density, epsilon, spec_of(x).row, x.device)
    places = ranked_places(x.reshape(-1, len(by_rank)), at)
    mask = placed(x.shape, places, bernoulli(taken(at.bits(seed, x.reshape(-1)), places), by_rank))
    return mask, places, by_rank


def _window(density: float, epsilon: float, length: int, device: torch.device) -> Tensor:
    """The probability to be kept by rank in a row, smallest magnitude first, `(length,)` float64."""
    check_density(density)
    low, high = density - epsilon / 2, density + epsilon / 2
    if not (epsilon >= 0 and low >= 0 and high <= 1):
        raise RangeError(
            "density - epsilon/2 and density + epsilon/2 must be probabilities; "
            f"density {density:g} and epsilon {epsilon:g} give {low:g} and {high:g}"
        )
    if length == 1:
        return torch.full((1,), density, dtype=torch.float64, device=device)
    return low + torch.arange(length, dtype=torch.float64, device=device) * (epsilon / (length - 1))


def _scaled(survivors: Tensor, density: float, rescale: Rescale, known: Measured | None) -> Tensor:
    if rescale not in ("density", "l1", None):
        raise RangeError(f"rescale must be 'density', 'l1' or None; got {rescale!r}")
    by = known.factor if known is not None else 1 / density if rescale == "density" and density > 0 else None
    return survivors if by is None or by == 1 else survivors.mul_(by)


def _keep_ranks(x: Tensor, at: Place, first: int, stop: int) -> Tensor:
    """Keep the entries whose place in their row, from the largest, is in [first, stop)."""
    length = spec_of(x).row
    places = ranked_places(x.reshape(-1, length), at)
    return masked(x, placed(x.shape, places[:, length - stop : length - first], places.new_ones((), dtype=torch.bool)))


def __dir__() -> list[str]:  # completion shows what is public
    return __all__
