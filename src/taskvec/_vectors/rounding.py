"""How much of a vector is lost when a model of a narrow dtype takes it."""

from collections.abc import Mapping

from torch import Tensor

from .vector import TaskVector

__all__ = ["rounding_loss"]


def rounding_loss(vector: TaskVector, base: Mapping[str, Tensor], scale: float = 1.0) -> float:
    """The fraction of a vector's non-zero entries that change nothing, because the base's dtype is too coarse.

    Args:
        vector: differences, in float32.
        base: the model it would be applied to, such as one in bfloat16.
        scale: the scaling coefficient.

    Returns:
        A fraction in [0, 1]; 0 for a vector of zeros.

    Examples:
        >>> import torch
        >>> base = {"w": torch.ones(2, dtype=torch.bfloat16)}
        >>> rounding_loss(TaskVector({"w": torch.tensor([1e-4, 0.5])}), base)
        0.5
    """
    changed, asked = 0, 0
    result = vector.apply(base, scale)
    for name in vector:
        moves = vector[name] != 0
        asked += int(moves.sum())
        changed += int((moves & (result[name] != base[name])).sum())
    return 1 - changed / asked if asked else 0.0
