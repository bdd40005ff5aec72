"""Means over seeds with their uncertainty, and how well a number separates two groups."""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite, isnan
from statistics import NormalDist, fmean, stdev
from typing import NamedTuple

from typing_extensions import override

from ..errors import DegenerateError, NonFiniteError, RangeError

__all__ = ["Estimate", "Roc", "clustered", "estimate", "roc"]

T975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # by degrees of freedom, from 1


class Estimate(NamedTuple):
    """A mean and its uncertainty; `f"{estimate:.1f}"` formats both.

    Attributes:
        mean: the mean of the values.
        half: half the width of its 95 % t interval; None for a single value.

    Examples:
        >>> f"{Estimate(0.7, 0.04):.2f}"
        '0.70 +-0.04'
    """

    mean: float
    half: float | None

    @override
    def __format__(self, spec: str) -> str:
        own = format(self.mean, spec)
        return own if self.half is None else f"{own} +-{format(self.half, spec)}"

    @override
    def __str__(self) -> str:
        return format(self, ".3g")


def estimate(values: Iterable[float]) -> Estimate:
    """Estimate a mean over independent values, one per seed, with its 95 % t interval.

    `mean +- t * s / sqrt(n)`, with the standard deviation s of n - 1 degrees of freedom.

    Args:
        values: independent values, such as paired differences over seeds.

    Returns:
        An `Estimate`.

    Raises:
        DegenerateError: no values.
        NonFiniteError: a value that is NaN or inf.

    Examples:
        >>> print(estimate([0.5, 0.7, 0.9]))
        0.7 +-0.497
    """
    given = list(values)
    if not given:
        raise DegenerateError("values must not be empty; got no values to take the mean of")
    if bad := [i for i, value in enumerate(given) if not isfinite(value)]:
        raise NonFiniteError(f"values must be finite; got {given[bad[0]]} at position {bad[0]}")
    if len(given) == 1:
        return Estimate(given[0], None)
    return Estimate(fmean(given), _t975(len(given) - 1) * stdev(given) / len(given) ** 0.5)


def clustered(values: Mapping[tuple[Hashable, Hashable], float]) -> Estimate:
    """Estimate a mean over seeds, where several values share the models of one seed.

    Values of one seed are not independent, so they are averaged first, and the means of the seeds are the values of
    the estimate.

    Args:
        values: (seed, anything else, such as a target class) -> value.

    Returns:
        An `Estimate` over the seeds.

    Raises:
        DegenerateError: no values.
        NonFiniteError: a value that is NaN or inf.

    Examples:
        >>> print(clustered({(0, 1): 0.4, (0, 2): 0.6, (1, 1): 0.8, (1, 2): 1.0}))
        0.7 +-2.54
    """
    by_seed: dict[Hashable, list[float]] = {}
    for (seed, _), value in values.items():
        by_seed.setdefault(seed, []).append(value)
    return estimate(fmean(own) for own in by_seed.values())


@dataclass(frozen=True)
class Roc:
    """How well a number separates positives from negatives.

    Attributes:
        area: the area under the receiver operating characteristic (ROC): the chance that a positive's number is above
            a negative's, ties counting half.
        found: the share of positives above all but the allowed share of negatives.
    """

    area: float
    found: float


def roc(positives: Sequence[float], negatives: Sequence[float], *, false_positives: float = 0.05) -> Roc:
    """Measure how well a number separates two groups: the area under its ROC, and one point of it.

    Args:
        positives: the number of each backdoored model; expected to be high.
        negatives: the number of each clean model.
        false_positives: the share of negatives that may be flagged, in [0, 1).

    Returns:
        A `Roc`.

    Raises:
        DegenerateError: no positives, or no negatives.
        NonFiniteError: a number that is NaN.
        RangeError: a share outside [0, 1).

    Examples:
        >>> found = roc([0.9, 0.4, 0.8], [0.1, 0.2, 0.3, 0.5])
        >>> round(found.area, 3), round(found.found, 3)
        (0.917, 0.667)
    """
    if not positives or not negatives:
        raise DegenerateError(
            f"both groups must not be empty; got {len(positives)} positives and {len(negatives)} negatives"
        )
    if not 0 <= false_positives < 1:
        raise RangeError(f"false_positives must be a share in [0, 1); got {false_positives!r}")
    for who, values in (("positives", positives), ("negatives", negatives)):
        if any(map(isnan, values)):
            raise NonFiniteError(f"{who} must be numbers; got NaN, which has no rank")
    above = [(p > n) + (p == n) / 2 for p in positives for n in negatives]
    limit = sorted(negatives, reverse=True)[int(false_positives * len(negatives))]  # so many may lie above it
    return Roc(fmean(above), fmean([float(p > limit) for p in positives]))


def _t975(freedom: int) -> float:
    """The 97.5 % quantile of Student's t: a table, and beyond it an expansion good to four digits."""
    if freedom <= len(T975):
        return T975[freedom - 1]
    z = NormalDist().inv_cdf(0.975)
    terms = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96, (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + sum(term / freedom ** (i + 1) for i, term in enumerate(terms))
