"""Screening: statistics of one contributor's weights beside those of the others, before the merge.

The functions return numbers, not verdicts; docs/study_defenses.md has measurements of how well each number separates
backdoored contributors from clean ones.
"""

from collections.abc import Iterable, Sequence
from math import log
from statistics import fmean, median, pstdev
from typing import NamedTuple

import torch

from .._engine.totals import numbers_in
from .._vectors.checks import checked_vectors
from .._vectors.vector import TaskVector
from ..errors import DegenerateError
from ..metrics import cosine_matrix, sign_agreement, spectrum
from ..rules import sum64

__all__ = ["Screening", "screen"]


class Screening(NamedTuple):
    """Statistics of one contributor's task vector.

    Attributes:
        norm: its norm over the median norm of the others.
        cosine: the mean cosine to the others.
        signs: the mean sign agreement with the others; a half for independent vectors.
        leading: the share of the largest singular value in a matrix's squared norm, in the mean over matrices.
        entropy: the entropy of the squared singular values' shares, over its maximum, in the mean over matrices; 1 is
            a flat spectrum.
        spread: the standard deviation of the matrices' norms over their mean.
        kurtosis: the mean fourth power of the entries over the square of their mean square; 3 for normal entries.
    """

    norm: float
    cosine: float
    signs: float
    leading: float
    entropy: float
    spread: float
    kurtosis: float


def screen(vectors: Iterable[TaskVector]) -> list[Screening]:
    """Compute statistics of every contributor's task vector, compared with the others.

    The bits do not depend on the number of torch threads.

    Requires nothing beyond the contributors. Cost: the dot products of all vectors, and the singular values of every
    matrix.

    Args:
        vectors: the contributors' task vectors, at least two.

    Returns:
        One `Screening` per contributor, in the same order.

    Raises:
        DegenerateError: fewer than two vectors, a zero one, or no matrix in them.
        MismatchError: names, shapes or bases differ.
        NonFiniteError: NaN or inf.
        OptionError: an argument that is not a list of task vectors.

    Examples:
        >>> vectors = [TaskVector({"w": torch.eye(2) * x}) for x in (1.0, 2.0)]
        >>> found = screen(vectors)[1]
        >>> found.norm, found.signs, round(found.leading, 6), round(found.entropy, 6)
        (2.0, 1.0, 0.5, 1.0)

    Reference:
        The spectral numbers are those of [a detector of backdoored LoRA adapters, 2026](https://arxiv.org/abs/2602.15195),
        the spread is that of [another study of 2026](https://arxiv.org/abs/2605.30189) (both second-hand).
    """
    given = checked_vectors("vectors", vectors)
    if len(given) < 2:
        raise DegenerateError(f"vectors must be at least two, to compare each with others; got {len(given)} in all")
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
        raise DegenerateError("vectors must hold a matrix of several rows and columns; got no matrix with a spectrum")
    norms = [total**0.5 for total in totals]
    return fmean(own[0] for own in shares), fmean(map(_entropy, shares)), pstdev(norms) / fmean(norms)


def _entropy(shares: Sequence[float]) -> float:
    return -sum(share * log(share) for share in shares if share > 0) / log(len(shares))


def _kurtosis(vector: TaskVector, norm: float) -> float:
    entries = sum(tensor.numel() for tensor in vector.values())
    root_mean_square = norm / entries**0.5  # in units of it, no fourth power underflows where the norm does not
    fourth = sum(
        float(sum64((tensor.to(torch.float64) / root_mean_square).square().square())) for tensor in vector.values()
    )
    return fourth / entries
