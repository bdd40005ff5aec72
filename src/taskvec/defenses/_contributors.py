"""Defenses that change the contributors' task vectors before the merge and need nothing else."""

from collections.abc import Iterable
from statistics import median
from typing import TypeVar

from .._vectors.checks import checked_vectors
from .._vectors.vector import TaskVector
from ..errors import DegenerateError
from ._strength import check_strength

__all__ = ["clip_norms", "equalise_norms"]

V = TypeVar("V", bound=TaskVector)


def clip_norms(vectors: Iterable[V], strength: float = 1.0) -> list[V]:
    """Shorten the vectors that are longer than a limit to that limit.

    `v * min(1, limit / ||v||)` with `limit = median norm / strength`. It acts against amplified backdoors; a backdoored
    contributor that is no longer than the others passes unchanged.

    Requires nothing beyond the contributors. Cost: one pass.

    Args:
        vectors: the contributors' task vectors.
        strength: 0 leaves the vectors, 1 clips at the median of their norms, 2 at half of it.

    Returns:
        As many vectors, in the same order.

    Raises:
        DegenerateError: no vectors, or a median norm of zero.
        NonFiniteError: NaN or inf.
        OptionError: an argument that is not a list of task vectors.
        RangeError: a negative or infinite strength.

    Examples:
        >>> import torch
        >>> vectors = [TaskVector({"w": torch.tensor([x, 0.0])}) for x in (1.0, 2.0, 6.0)]
        >>> [v["w"][0].item() for v in clip_norms(vectors)]
        [1.0, 2.0, 2.0]
        >>> [v["w"][0].item() for v in clip_norms(vectors, 0.5)]
        [1.0, 2.0, 4.0]
    """
    check_strength(strength)
    given, norms = _measured(vectors)
    middle = median(norms)
    if middle == 0:
        raise DegenerateError("the median norm must be positive; got 0; leave the zero vectors out")
    return [
        # compared as a product, so that a strength of 0 needs no division
        v * (middle / strength / norm) if norm * strength > middle else v
        for v, norm in zip(given, norms, strict=True)
    ]


def equalise_norms(vectors: Iterable[V], strength: float = 1.0) -> list[V]:
    """Bring the norms of all vectors to their median.

    `v * (median norm / ||v||) ** strength`. Stronger than clipping: short vectors grow, too, so that an amplified
    backdoor has no more weight than any other contributor.

    Requires nothing beyond the contributors. Cost: one pass.

    Args:
        vectors: the contributors' task vectors.
        strength: 0 leaves the vectors, 1 gives all of them the median norm.

    Returns:
        As many vectors, in the same order.

    Raises:
        DegenerateError: no vectors, or a zero one.
        NonFiniteError: NaN or inf.
        OptionError: an argument that is not a list of task vectors.
        RangeError: a negative or infinite strength.

    Examples:
        >>> import torch
        >>> vectors = [TaskVector({"w": torch.tensor([x, 0.0])}) for x in (1.0, 2.0, 6.0)]
        >>> [v["w"][0].item() for v in equalise_norms(vectors)]
        [2.0, 2.0, 2.0]
    """
    check_strength(strength)
    given, norms = _measured(vectors)
    if 0 in norms:
        raise DegenerateError(f"every vector must have a norm to change; vector {norms.index(0)} is zero")
    middle = median(norms)
    return [v * (middle / own) ** strength for v, own in zip(given, norms, strict=True)]


def _measured(vectors: Iterable[V]) -> tuple[list[V], list[float]]:
    given = checked_vectors("vectors", vectors)
    if not given:
        raise DegenerateError("vectors must not be empty; got no vectors")
    return given, [float(v.norm()) for v in given]
