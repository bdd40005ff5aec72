"""Tests of paired differences, and what is left of them when many are made."""

from collections.abc import Mapping, Sequence
from itertools import product
from math import atan, cos, inf, pi, sin
from statistics import fmean, stdev
from typing import Any


def sign_flip(values: Sequence[float]) -> float:
    """The exact two-sided p of a mean of 0 under flips of the clusters' signs."""
    size = abs(sum(values)) - 1e-9
    flips = [
        abs(sum(s * v for s, v in zip(signs, values, strict=True))) for signs in product((1, -1), repeat=len(values))
    ]
    return fmean(flip >= size for flip in flips)


def t_test(values: Sequence[float]) -> float:
    """The two-sided p of a mean of 0, of independent normal values: Student's t."""
    spread = stdev(values) / len(values) ** 0.5
    return beyond(abs(fmean(values)) / spread if spread else inf if fmean(values) else 0.0, len(values) - 1)


def beyond(t: float, freedom: int) -> float:
    """The chance that Student's t is further from 0 (Abramowitz and Stegun, 26.7.3 and 26.7.4)."""
    angle = atan(t / freedom**0.5)
    term, total = (cos(angle) if freedom % 2 else 1.0), 0.0
    for i in range(freedom // 2):
        total += term
        upper = 2 * i + 2 if freedom % 2 else 2 * i + 1
        term *= cos(angle) ** 2 * upper / (upper + 1)
    within = 2 / pi * (angle + sin(angle) * total) if freedom % 2 else sin(angle) * total
    return max(0.0, 1 - within)


def holm(ps: Mapping[Any, float]) -> dict[Any, float]:
    """Corrected over a family of tests."""
    found: dict[Any, float] = {}
    highest = 0.0
    for i, (name, p) in enumerate(sorted(ps.items(), key=lambda pair: pair[1])):
        highest = max(highest, min(1.0, (len(ps) - i) * p))
        found[name] = highest
    return found
