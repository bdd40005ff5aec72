"""Merges that weigh entries by how much they stand out: among their own vector's, or between the vectors."""

from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from .._engine.pieces import HERE, Look, Place
from .._engine.select import Cuts, check_density, largest, magnitude_of, masked
from .._engine.totals import lockstep, of, over, sum64
from ..errors import RangeError
from ..rules import Scope, runs
from ..signs import elected
from ..sparsify import Passes
from ._sums import mean, total
from ._ties import disjoint_mean

__all__ = ["pcb", "sce"]


# --- parameter competition balancing ---------------------------------------------------------------------------------


class Range(NamedTuple):
    """For each vector, two values."""

    low: tuple[float, ...]
    high: tuple[float, ...]


Ends: TypeAlias = tuple[list[float], list[float], torch.dtype]


def _ends(stack: Tensor, at: Place) -> Ends:
    """The smallest and the largest entry of each vector's block, and their dtype."""
    del at
    return [float(x.min()) for x in stack], [float(x.max()) for x in stack], stack.dtype


def ends_of() -> Passes:
    """A statistic: the smallest and the largest entry of each vector, and their dtype."""
    parts: list[Ends] = yield Look(_ends)
    lows, highs, dtypes = zip(*parts, strict=True)
    return Range(tuple(map(min, zip(*lows, strict=True))), tuple(map(max, zip(*highs, strict=True)))), dtypes[0]


def _smallest_kept(cuts: Cuts, dtype: torch.dtype) -> tuple[float, ...]:
    """For each vector, the smallest magnitude that is kept."""
    return tuple(magnitude_of(key.bits, dtype) for key in cuts.keys)


def pcb_bounds(n: int, entries: int, clamp: float = 1e-4) -> Passes:
    """The first statistic of `pcb`: the two magnitudes of each vector between which all are clamped."""
    if not 0 <= clamp < 0.5:
        raise RangeError(f"clamp must be the fraction of outliers at each end, in [0, 0.5); got {clamp!r}")
    ends, dtype = yield from of(torch.abs, (), ends_of())
    last = max(int(entries * (1 - clamp) - 1), 0)  # places of the authors' code, counted from the smallest
    ranks = entries - int(entries * clamp), entries - last  # and from the largest
    cuts: tuple[Cuts, Cuts] = yield from lockstep(*(largest(n, entries, rank) for rank in ranks))
    low, high = (
        ends.low if rank == entries else _smallest_kept(cut, dtype) for rank, cut in zip(ranks, cuts, strict=True)
    )
    return Range(low, high)


def _scores(stack: Tensor, bounds: Range) -> Tensor:
    """`exp(n s^2) tanh(x sum_j x_j)`, with s the clamped magnitude, from 0 to 1 within its vector."""
    merged = total(stack)
    found = torch.empty_like(stack)
    for i, (x, low, high) in enumerate(zip(stack, *bounds, strict=True)):
        share = x.abs().clamp_(low, high).sub_(low).div_(high - low if high > low else 1.0)
        torch.mul(share.square_().mul_(len(stack)).exp_(), (x * merged).tanh_(), out=found[i])
    return found


def _positive_scores(stack: Tensor, bounds: Range) -> Tensor:
    return _scores(stack, bounds).clamp_(min=0)


def pcb_scores(n: int, entries: int, pcb_bounds: Range, density: float = 0.1) -> Passes:
    """The second statistic of `pcb`: the scores of each vector that become 0 and 1."""
    rank = entries - int(entries * (1 - check_density(density)))
    ends, dtype = yield from of(_scores, (pcb_bounds,), ends_of())
    if not 0 < rank < entries:
        return Range(ends.high if rank <= 0 else ends.low, ends.high)
    cuts: Cuts = yield from of(_positive_scores, (pcb_bounds,), largest(n, entries, rank))
    return Range(_smallest_kept(cuts, dtype), ends.high)


@runs("element", pcb_bounds, pcb_scores)
def pcb(
    stack: Tensor, density: float = 0.1, *, clamp: float = 1e-4, scope: Scope = "global", at: Place = HERE
) -> Tensor:
    """Average the vectors entry by entry, by how large an entry is in its vector and how well it agrees: PCB-Merging.

    `sum_i b_i x_i / sum_i b_i`, where b_i is the score `exp(n s_i^2) tanh(x_i sum_j x_j)`, zero below the largest
    `density` of each vector's scores and rescaled so that the largest is 1; s_i is the magnitude within its vector,
    from 0 to 1. Magnitudes are clamped at both ends first.

    Args:
        stack: `(n, *shape)` of task vectors, any float dtype.
        density: the fraction of each vector's scores that is not zero, in [0, 1]; at most those above zero.
        clamp: the fraction of outliers at each end, 1e-4 or (the authors' vision code) 0.01.
        scope: what a vector is: `"global"` or `"tensor"`.

    Returns:
        `(*shape)`, the dtype of the stack; 0 where no score counts. The paper's coefficient, 1.2, is the scale of
        `apply`.

    Raises:
        RangeError: density outside [0, 1], clamp outside [0, 0.5).
        NonFiniteError: NaN or inf.

    Examples:
        >>> pcb(torch.tensor([[4.0, 0.1, 0.3, 1.0], [2.0, -0.2, 0.1, -3.0]]), 0.5, clamp=0.0)
        tensor([ 4.,  0.,  0., -3.])

    References:
        [Du et al., Parameter Competition Balancing, 2024](https://arxiv.org/abs/2410.02396). Where magnitudes do not
        differ the authors' code divides zero by zero; here they all count as 0.
    """
    if scope == "row":
        raise RangeError("scope must be 'global' or 'tensor' here; got 'row'")
    bounds: Range = at.take(pcb_bounds, stack, clamp)
    scored: Range = at.take(pcb_scores, stack, bounds, density)
    shares = _scores(stack, bounds)
    for i, (low, high) in enumerate(zip(*scored, strict=True)):
        shares[i].clamp_(min=low).sub_(low).div_(high - low if high > low else 1.0)
    clamped = stack.abs()
    for i, (low, high) in enumerate(zip(*bounds, strict=True)):
        clamped[i].clamp_(low, high).mul_(stack[i].sign())
    return total(clamped.mul_(shares)).div_(total(shares).clamp_(min=1e-12))


# --- select, calculate, erase ----------------------------------------------------------------------------------------


def _variance(stack: Tensor) -> Tensor:
    """The variance of each entry between the vectors, `(1, m)`."""
    middle = mean(stack)
    return mean(torch.stack([(x - middle).square_() for x in stack]))[None]


def _count_positive(x: Tensor, at: Place) -> int:
    del at
    return int((x > 0).sum())


def _energies(stack: Tensor, at: Place, cuts: Cuts | None) -> Tensor:
    """The sum of squares of each vector's block where the vectors vary most, float64."""
    return torch.stack([sum64(x.square()) for x in _selected(stack, at, cuts)])


def _selected(stack: Tensor, at: Place, cuts: Cuts | None) -> Tensor:
    """The entries in which the vectors vary most, zeros elsewhere."""
    if cuts is None:
        return stack
    chosen = cuts.keep(_variance(stack), at)[0] != 0
    return torch.stack([masked(x, chosen) for x in stack])


def sce_parts(n: int, entries: int, density: float = 1.0) -> Passes:
    """The statistic of `sce`: which variances are kept, and the weights of the vectors."""
    cuts: Cuts | None = None
    if check_density(density) < 1:
        varying: int = yield from of(_variance, (), over(_count_positive))
        cuts = yield from of(_variance, (), largest(1, entries, int(density * varying)))
    energies: Tensor = yield from over(_energies, cuts)
    whole = float(energies.sum())
    return cuts, [float(energy) / whole if whole else 1 / n for energy in energies]


@runs("element", sce_parts)
def sce(stack: Tensor, density: float = 1.0, *, scope: Scope = "tensor", at: Place = HERE) -> Tensor:
    """Select the entries that vary most, weigh vectors by their energy, erase minority signs: SCE (FuseChat).

    Of the entries that vary between the vectors, the `density` of largest variance are kept; a vector's weight is its
    sum of squares over them; then the weighted mean of those that have the sign of the (unweighted) sum, `+` where that
    is zero.

    Args:
        stack: `(n, *shape)` of task vectors, any float dtype.
        density: the fraction of the varying entries that is kept, in [0, 1]; 0.1 in the paper (second-hand).
        scope: of the selection and of the weights: `"tensor"` (the paper's matrices, mergekit) or `"global"`.

    Returns:
        `(*shape)`, the dtype of the stack; 0 where no vector counts.

    Raises:
        RangeError: density outside [0, 1].
        NonFiniteError: NaN or inf.

    Examples:
        >>> sce(torch.tensor([[1.0, 3.0, 0.5], [1.0, -1.0, 0.0]]))
        tensor([1.0000, 3.0000, 0.5000])

    References:
        [Wan et al., FuseChat, 2024](https://arxiv.org/abs/2408.07990). mergekit takes equal weights where the mean
        squares add up to less than 1e-6, as those of most fine-tunes do, and divides by no less than 1e-6.
    """
    if scope == "row":
        raise RangeError("scope must be 'tensor' or 'global' here; got 'row'")
    cuts, weights = at.take(sce_parts, stack, density)
    own = _selected(stack, at, cuts)
    return disjoint_mean(own, elected(own, "sum", "positive", None), weights=weights, reduce="weighted_mean")
