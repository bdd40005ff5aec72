"""Means over seeds with their uncertainty, and how well a number separates two groups."""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import isnan
from statistics import NormalDist, fmean, stdev
from typing import NamedTuple

from typing_extensions import override

from ..errors import DegenerateError, NonFiniteError, RangeError

__all__ = ["Estimate", "Roc", "clustered", "estimate", "roc"]

T975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # by degrees of freedom, from 1


class Estimate(NamedTuple):
    """A mean and its uncertainty; `f"{estimate:.1f}"` formats both.

    Attributes:
        mean: of the values.
        half: half the width of its 95 % t interval; None for a single value.
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
    """The mean of some values, one for each seed, with its 95 % t interval.

    `mean +- t * s / sqrt(n)`, with the standard deviation s of n - 1 degrees of freedom.

    Args:
        values: independent ones, such as paired differences over seeds.

    Returns:
        An `Estimate`.

    Raises:
        DegenerateError: no values.
        NonFiniteError: NaN among them.

    Examples:
        >>> print(estimate([0.5, 0.7, 0.9]))
        0.7 +-0.497
    """
    given = list(values)
    if not given:
        raise DegenerateError("no values to take the mean of")
    _check_numbers("values", given)
    if len(given) == 1:
        return Estimate(given[0], None)
    return Estimate(fmean(given), _t975(len(given) - 1) * stdev(given) / len(given) ** 0.5)


def clustered(values: Mapping[tuple[Hashable, Hashable], float]) -> Estimate:
    """The mean over seeds of each seed's own mean: what shares a seed's models is no independent value.

    Args:
        values: (seed, anything else, such as a target class) -> value.

    Returns:
        An `Estimate` over the seeds.

    Raises:
        DegenerateError: no values.
        NonFiniteError: NaN among them.

    Examples:
        >>> print(clustered({(0, 1): 0.4, (0, 2): 0.6, (1, 1): 0.8, (1, 2): 1.0}))
        0.7 +-2.54
    """
    by_seed: dict[Hashable, list[float]] = {}
    for (seed, _), value in values.items():
        by_seed.setdefault(seed, []).append(value)
    return estimate(fmean(own) for own in by_seed.values())


def _check_numbers(label: str, values: Iterable[float]) -> None:
    if any(isnan(value) for value in values):
        raise NonFiniteError(f"{label} must be numbers; got NaN; leave out what was not measured")


def _t975(freedom: int) -> float:
    """The 97.5 % quantile of Student's t: a table, and beyond it an expansion good to four digits."""
    if freedom <= len(T975):
        return T975[freedom - 1]
    z = NormalDist().inv_cdf(0.975)
    terms = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96, (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + sum(term / freedom ** (i + 1) for i, term in enumerate(terms))


@dataclass(frozen=True)
class Roc:
    """How well a number tells positives from negatives.

    Attributes:
        area: under the ROC: the chance that a positive's number is above a negative's, ties counting half.
        found: the share of positives above all but the allowed share of negatives.
    """

    area: float
    found: float


def roc(positives: Sequence[float], negatives: Sequence[float], *, false_positives: float = 0.05) -> Roc:
    """How well a number tells two kinds apart, high for positives: area under the ROC, and one point of it.

    Args:
        positives: the number for each backdoored model.
        negatives: for each clean one.
        false_positives: the share of negatives that may be taken for positives, in [0, 1).

    Returns:
        A `Roc`.

    Raises:
        DegenerateError: none of one kind.
        RangeError: a share outside [0, 1).
        NonFiniteError: NaN among the numbers.

    Examples:
        >>> roc([0.9, 0.4, 0.8], [0.1, 0.2, 0.3, 0.5])
        Roc(area=0.9166666666666666, found=0.6666666666666666)
    """
    if not positives or not negatives:
        raise DegenerateError(f"{len(positives)} positives against {len(negatives)} negatives")
    if not 0 <= false_positives < 1:
        raise RangeError(f"false_positives is a share in [0, 1), not {false_positives!r}")
    _check_numbers("positives", positives)
    _check_numbers("negatives", negatives)
    above = [(p > n) + (p == n) / 2 for p in positives for n in negatives]
    limit = sorted(negatives, reverse=True)[int(false_positives * len(negatives))]  # so many may lie above it
    return Roc(mean_of(above), mean_of([float(p > limit) for p in positives]))


def mean_of(values: Sequence[float]) -> float:
    return sum(values) / len(values)
