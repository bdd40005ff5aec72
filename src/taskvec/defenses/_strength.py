"""The strength of a defense: one rule chooses it for all of them, from clean validation data alone."""

from collections.abc import Mapping
from math import inf

from ..errors import DegenerateError, RangeError

__all__ = ["choose_strength"]


def choose_strength(accuracies: Mapping[float, float], *, undefended: float, keep: float = 0.98) -> float:
    """Choose the largest strength that keeps the accuracy.

    The largest `s` with `accuracies[s] >= keep * undefended`. No trigger, attack success rate or test image takes part.
    Accuracies need not be monotone: a larger feasible strength is taken even if a smaller one is not feasible.

    Args:
        accuracies: strength -> mean clean validation accuracy of the defended model, in [0, 1].
        undefended: the same accuracy of the undefended model.
        keep: the fraction of it that must be kept, in (0, 1].

    Returns:
        The chosen strength; 0.0, no defense, if no strength is feasible.

    Raises:
        DegenerateError: an empty grid.
        RangeError: a negative strength, an accuracy or fraction outside its range.

    Examples:
        >>> choose_strength({0.1: 0.80, 0.3: 0.79, 0.5: 0.70}, undefended=0.80)
        0.3

    Reference:
        docs/protocol.md, "Comparing defences"
    """
    if not accuracies:
        raise DegenerateError("accuracies must not be empty; got no strengths to choose from")
    if not 0 < keep <= 1:
        raise RangeError(f"keep must be a fraction in (0, 1]; got {keep!r}")
    for s, accuracy in {**accuracies, 0.0: undefended}.items():
        if not s >= 0:
            raise RangeError(f"strengths must be at least 0; got {s!r}")
        if not 0 <= accuracy <= 1:
            raise RangeError(f"an accuracy must be in [0, 1]; got {accuracy!r} at strength {s:g}; is it a percentage?")
    feasible = [s for s, accuracy in accuracies.items() if accuracy >= keep * undefended]
    return max(feasible, default=0.0)


def check_strength(strength: float, most: float = inf) -> None:
    """Refuse a strength that is negative, infinite, or above the largest that the defense has."""
    if not (0 <= strength <= most and strength < inf):
        wanted = "a finite number, at least 0" if most == inf else f"in [0, {most:g}]"
        raise RangeError(f"strength must be {wanted}; got {strength!r}; 0 leaves the model untouched")
