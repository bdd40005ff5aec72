"""How strong a defense should be: one rule for all, from clean validation data alone."""

from collections.abc import Mapping

from ..errors import DegenerateError, RangeError

__all__ = ["choose_strength"]


def choose_strength(accuracies: Mapping[float, float], *, undefended: float, keep: float = 0.98) -> float:
    """Choose the largest strength that keeps the accuracy.

    The largest `s` with `accuracies[s] >= keep * undefended`. No trigger, attack success rate or test image takes part.
    Strengths need not be monotone: a larger feasible one is taken even if a smaller one is not feasible.

    Args:
        accuracies: strength -> mean clean validation accuracy of the defended model, in [0, 1].
        undefended: the same of the undefended model.
        keep: the fraction of it that must be kept, in (0, 1].

    Returns:
        The chosen strength; 0.0, no defence, if no strength is feasible.

    Raises:
        DegenerateError: an empty grid.
        RangeError: a negative strength, an accuracy or fraction outside its range.

    Examples:
        >>> choose_strength({0.1: 0.80, 0.3: 0.79, 0.5: 0.70}, undefended=0.80)
        0.3

    References:
        docs/protocol.md, "Comparing defences"
    """
    if not accuracies:
        raise DegenerateError("no strengths to choose from")
    if not 0 < keep <= 1:
        raise RangeError(f"keep is a fraction in (0, 1], not {keep!r}")
    for s, accuracy in {**accuracies, 0.0: undefended}.items():
        if not s >= 0:
            raise RangeError(f"a strength is at least 0, not {s!r}")
        if not 0 <= accuracy <= 1:
            raise RangeError(f"an accuracy is in [0, 1], not {accuracy!r} (strength {s:g}); is it a percentage?")
    feasible = [s for s, accuracy in accuracies.items() if accuracy >= keep * undefended]
    return max(feasible, default=0.0)
