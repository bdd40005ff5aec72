"""Screening: what the weights of one contributor show beside those of the others, before anything is merged.

Numbers, no verdict: how well each separates backdoored contributors from clean ones is a matter of measurement; the
measurements are in docs/study.md.
"""

from collections.abc import Generator, Iterable, Sequence
from math import log
from statistics import fmean, median, pstdev
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._engine.run import measure
from .._engine.totals import numbers_in, over, sum64
from .._vectors.vector import TaskVector
from ..errors import DegenerateError
from ..metrics._similarity import cosine_matrix, sign_agreement, spectrum
from ..rules import Look, Place

__all__ = ["Screening", "screen"]


class Screening(NamedTuple):
    """Statistics of one contributor's task vector.

    Attributes:
        norm: over the median norm of the others.
        cosine: the mean cosine to the others.
        signs: the mean sign agreement with the others; a half for independent vectors.
        leading: the share of the largest singular value in a matrix's squared norm, in the mean over matrices.
        entropy: of the squared singular values' shares, over its maximum, in the mean over matrices; 1 is a flat
            spectrum.
        spread: the standard deviation of the matrices' norms over their mean.
        kurtosis: the mean fourth power of the entries over the square of their mean square; 3 for normal ones.
    """

    norm: float
    cosine: float
    signs: float
    leading: float
    entropy: float
    spread: float
    kurtosis: float


def screen(vectors: Iterable[TaskVector]) -> list[Screening]:
    """The statistics of every contributor's task vector, against the others.

    Given: nothing beyond the contributors. Cost: the dot products of all vectors, and the singular values of every
    matrix.

    Args:
        vectors: the contributors' task vectors, at least two.

    Returns:
        One `Screening` a contributor, in the same order.

    Raises:
        DegenerateError: fewer than two vectors, a zero one, or no matrix in them.
        MismatchError: names, shapes or bases differ.
        NonFiniteError: NaN or inf.

    Examples:
        >>> vectors = [TaskVector({"w": torch.eye(2) * x}) for x in (1.0, 2.0)]
        >>> found = screen(vectors)[1]
        >>> found.norm, found.signs, round(found.leading, 6), round(found.entropy, 6)
        (2.0, 1.0, 0.5, 1.0)

    References:
        [The spectral numbers are those of a detector of backdoored LoRA adapters,
        2026](https://arxiv.org/abs/2602.15195),
        and the spread that of https://arxiv.org/abs/2605.30189 (both second-hand).
    """
    given = list(vectors)
    if len(given) < 2:
        raise DegenerateError(f"a contributor is screened against others, and there are {len(given)} in all")
    cosines, signs = cosine_matrix(given), sign_agreement(given)
    norms = [float(vector.norm()) for vector in given]
    return [
        Screening(
            norms[i] / median(_others(norms, i)),
            fmean(_others(numbers_in(cosines[i]), i)),
            fmean(_others(numbers_in(signs[i]), i)),
            *_spectral(vector),
            _kurtosis(vector, norms[i]),
        )
        for i, vector in enumerate(given)
    ]


def _others(values: Sequence[float], i: int) -> list[float]:
    return [*values[:i], *values[i + 1 :]]


def _spectral(vector: TaskVector) -> tuple[float, float, float]:
    squares = [numbers_in(values.square()) for values in spectrum(vector).values()]
    totals = [sum(own) for own in squares]
    shares = [
        [x / total for x in own] for own, total in zip(squares, totals, strict=True) if len(own) > 1 and total > 0
    ]
    if not shares:
        raise DegenerateError("no matrix of several rows and columns to take a spectrum of")
    norms = [total**0.5 for total in totals]
    return fmean(own[0] for own in shares), fmean(map(_entropy, shares)), pstdev(norms) / fmean(norms)


def _entropy(shares: Sequence[float]) -> float:
    return -sum(share * log(share) for share in shares if share > 0) / log(len(shares))


def _kurtosis(vector: TaskVector, norm: float) -> float:
    entries = sum(spec.entries for spec in vector.source.specs.values())
    return entries * float(measure([vector.source], list(vector), _fourths, norm))


def _fourths(n: int, entries: int, norm: float) -> Generator[Look, list[Any], float]:
    """The sum of the fourth powers of the entries over the norm; of entries themselves they would underflow."""
    del n, entries
    return (yield from over(_block_fourths, norm))


def _block_fourths(stack: Tensor, at: Place, norm: float) -> float:
    del at
    return float(sum64((stack.to(torch.float64) / norm).square().square()))
