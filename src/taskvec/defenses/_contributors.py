"""Defenses that act on each contributor's task vector before the merge; the defender needs nothing else."""

from collections.abc import Iterable, Sequence
from math import inf
from statistics import median
from typing import TypeVar

from .._vectors.vector import TaskVector
from ..errors import DegenerateError, RangeError

__all__ = ["clip_norms", "equalise_norms"]

V = TypeVar("V", bound=TaskVector)


def clip_norms(vectors: Iterable[V], strength: float = 1.0) -> list[V]:
    """Shorten the vectors that are longer than a limit, to it.

    `v * min(1, limit / ||v||)` with `limit = median norm / strength`. Against amplified backdoors; a backdoor that
    is no longer than its neighbours passes.

    Given: nothing beyond the contributors. Cost: one pass.

    Args:
        vectors: the contributors' task vectors.
        strength: 0 changes nothing, 1 clips at the median of the norms, 2 at half of it.

    Returns:
        As many vectors, in the same order.

    Raises:
        DegenerateError: no vectors.
        RangeError: a negative strength.
        NonFiniteError: NaN or inf.

    Examples:
        >>> import torch
        >>> vectors = [TaskVector({"w": torch.tensor([x, 0.0])}) for x in (1.0, 2.0, 6.0)]
        >>> [v["w"][0].item() for v in clip_norms(vectors)]
        [1.0, 2.0, 2.0]
    """
    given, norms = _measured(vectors)
    check_strength(strength)
    top = median(norms) / strength if strength else inf
    return [v * (top / norm) if norm > top else v for v, norm in zip(given, norms, strict=True)]


def check_strength(strength: float) -> None:
    """Refuse a negative strength, and NaN."""
    if not strength >= 0:
        raise RangeError(f"strength must be at least 0; got {strength!r}")


def equalise_norms(vectors: Iterable[V], strength: float = 1.0) -> list[V]:
    """Bring all vectors to one norm.

    `v * (median norm / ||v||)^strength`. Stronger than clipping: what a backdoor adds to its contributor is paid for by
    the rest of it.

    Given: nothing beyond the contributors. Cost: one pass.

    Args:
        vectors: the contributors' task vectors.
        strength: 0 changes nothing, 1 gives all vectors the median of their norms.

    Returns:
        As many vectors, in the same order.

    Raises:
        DegenerateError: no vectors, or a zero one.
        RangeError: a negative strength.
        NonFiniteError: NaN or inf.

    Examples:
        >>> import torch
        >>> vectors = [TaskVector({"w": torch.tensor([x, 0.0])}) for x in (1.0, 2.0, 6.0)]
        >>> [v["w"][0].item() for v in equalise_norms(vectors)]
        [2.0, 2.0, 2.0]
    """
    given, norms = _measured(vectors)
    if 0 in norms:
        raise DegenerateError(f"vector {norms.index(0)} is zero: it has no norm to change")
    check_strength(strength)
    common = median(norms)
    return [v * (common / own) ** strength for v, own in zip(given, norms, strict=True)]


def _measured(vectors: Iterable[V]) -> tuple[Sequence[V], list[float]]:
    given = list(vectors)
    if not given:
        raise DegenerateError("no vectors")
    return given, [float(v.norm()) for v in given]
