"""Defenses for which the defender needs the base, or another trusted model of it."""

from collections.abc import Mapping

import torch
from torch import Tensor

from .._vectors.merge import merge
from .._vectors.vector import TaskVector
from ..errors import RangeError
from ..rules import runs
from ..sparsify import drop

__all__ = ["cosine_gate", "mix", "shrink"]


def shrink(model: Mapping[str, Tensor], base: Mapping[str, Tensor], strength: float) -> Mapping[str, Tensor]:
    """Plain global shrinking towards the base: `base + (1 - strength) * (model - base)`.

    The trivial defence: it weakens backdoors, and the task with them. A defence that does not beat it at the same clean
    accuracy has shown nothing.

    Given: the base. No data, except to choose the strength. Cost: one pass.

    Args:
        model: the merged model.
        base: the pre-trained model.
        strength: how much of the difference is taken away, in [0, 1]; 0 leaves the model, 1 gives the base.

    Returns:
        A model.

    Raises:
        RangeError: outside [0, 1].
        MismatchError: names or shapes differ.

    Examples:
        >>> import torch
        >>> shrink({"w": torch.tensor([3.0])}, {"w": torch.tensor([1.0])}, strength=0.5)["w"]
        tensor([2.])
    """
    check_fraction("strength", strength)
    return (-TaskVector.between(base, model)).apply(model, strength)


def check_fraction(label: str, value: float) -> None:
    """Refuse what is not a fraction."""
    if not 0 <= value <= 1:
        raise RangeError(f"{label} must be a fraction in [0, 1]; got {value!r}")


def mix(model: Mapping[str, Tensor], base: Mapping[str, Tensor], strength: float, *, seed: int) -> Mapping[str, Tensor]:
    """Mix a model at random with its base, weight by weight: the first step of Fine-mixing.

    `base + m * (model - base)` with `m ~ Bernoulli(1 - strength)`, without rescaling; the paper's reserve ratio is
    `1 - strength`. The paper's second step, a fine-tune on
    clean data, is not part of it.

    Our reading: the formula is from general knowledge, the paper's own text was not available to us.

    Given: the base. No data, except to choose the strength. Cost: one pass.

    Args:
        model: a fine-tune, or a merge.
        base: the pre-trained model.
        strength: the probability that a weight is the base's, in [0, 1]; 0 leaves the model.
        seed: any integer.

    Returns:
        A model.

    Raises:
        RangeError: outside [0, 1].
        MismatchError: names or shapes differ.

    Examples:
        >>> import torch
        >>> mixed = mix({"w": torch.ones(1000)}, {"w": torch.zeros(1000)}, strength=0.3, seed=0)
        >>> 0.6 < float(mixed["w"].mean()) < 0.8
        True

    References:
        [Zhang et al., Fine-mixing, 2022](https://arxiv.org/abs/2210.09545)
    """
    check_fraction("strength", strength)
    return TaskVector.between(base, model).map(drop, density=1 - strength, seed=seed, rescale=None).apply(base)


def cosine_gate(
    vector: TaskVector, reference: TaskVector, strength: float = 0.2, *, threshold: float = 0.35
) -> TaskVector:
    """Mix those matrices of a vector with a trusted one's that point out of its column space (SafeMERGE's rule).

    For each matrix, `C = V V^T / ||V||_F` of the reference and `rho = cos(C W, W)`; where rho is below the threshold,
    `W` becomes `(1 - strength) * W + strength * V`; a matrix of zeros has no direction and stays. Tensors of other
    than two dimensions stay.

    Given: a vector that is trusted: an aligned model's, or a clean fine-tune's. No data. Cost: two products of matrices
    each.

    Args:
        vector: a contributor's task vector.
        reference: the trusted one, from the same base.
        strength: how much of a matrix that fails is replaced, in [0, 1]; 0 leaves it. The code keeps `1 -
            strength = 0.8`.
        threshold: in [-1, 1]; the code's own is 0.35.

    Returns:
        A task vector.

    Raises:
        RangeError: outside their ranges.
        MismatchError: names, shapes or bases differ.

    Examples:
        >>> vector = TaskVector({"w": torch.tensor([[0.0, 0.0], [1.0, 1.0]])})
        >>> cosine_gate(vector, TaskVector({"w": torch.tensor([[1.0, 1.0], [0.0, 0.0]])}))["w"]
        tensor([[0.2000, 0.2000],
                [0.8000, 0.8000]])

    References:
        [Djuhera et al., SafeMERGE, 2025](https://arxiv.org/abs/2503.17239), as its code does it. There the matrices are
        LoRA updates and the reference is aligned minus base.
    """
    if not -1 <= threshold <= 1:
        raise RangeError(f"threshold must be a cosine, in [-1, 1]; got {threshold!r}")
    check_fraction("strength", strength)
    return merge([vector, reference], _gated, threshold=threshold, strength=strength)


@runs("tensor")
def _gated(stack: Tensor, *, threshold: float, strength: float) -> Tensor:
    own, trusted = stack[0], stack[1]
    if own.ndim != 2 or not bool(own.any()):
        return own.clone()
    seen = trusted @ (trusted.T @ own)  # C W, but for a factor that the cosine does not see
    sizes = seen.square().sum() * own.square().sum()
    rho = (seen * own).sum() / torch.where(sizes > 0, sizes.sqrt(), torch.ones_like(sizes))
    return torch.where(rho < threshold, (1 - strength) * own + strength * trusted, own)
