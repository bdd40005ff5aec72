"""Means over seeds, with their intervals."""

import statistics
from collections.abc import Mapping
from typing import NamedTuple

# The 97.5 % quantile of Student's t, by degrees of freedom.
T = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


class Estimate(NamedTuple):
    """A mean and the half width of its 95 % t interval over seeds; no width for one seed."""

    mean: float
    half: float | None

    def __str__(self) -> str:
        return f"{self.mean:.1f}" if self.half is None else f"{self.mean:.1f} +-{self.half:.1f}"


def clustered(values: Mapping[tuple[int, int], float]) -> Estimate:
    """The mean over seeds of each seed's mean over targets: targets of one seed share its models, so seeds count."""
    seeds = {seed for seed, _ in values}
    means = [statistics.fmean(value for (own, _), value in values.items() if own == seed) for seed in sorted(seeds)]
    if len(means) == 1:
        return Estimate(means[0], None)
    half = T[len(means) - 1] * statistics.stdev(means) / len(means) ** 0.5
    return Estimate(statistics.fmean(means), half)
