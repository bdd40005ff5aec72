"""Defenses that need the base, or a trusted vector from it."""

import torch
from torch import Tensor

from .._engine.pools import single_thread
from .._vectors.checks import check_models, check_vector
from .._vectors.merge import merge
from .._vectors.model import Params
from .._vectors.vector import TaskVector
from ..errors import RangeError
from ..rules import runs
from ..sparsify import drop
from ._strength import check_strength

__all__ = ["cosine_gate", "mix", "shrink"]


def shrink(model: Params, base: Params, strength: float) -> Params:
    """Shrink a model towards its base: `base + (1 - strength) * (model - base)`.

    The trivial defense: it weakens backdoors, and the task with them. A defense that does not beat it at the same clean
    accuracy has shown nothing.

    Requires the base; no data, except to choose the strength. Cost: one pass.

    Args:
        model: the merged model.
        base: the pre-trained model.
        strength: the fraction of the difference that is removed, in [0, 1]; 0 leaves the model, 1 gives the base.

    Returns:
        A model. Entries that are no part of a task vector, such as BatchNorm statistics, are the model's.

    Raises:
        MismatchError: names or shapes differ.
        OptionError: an argument that is not a model's weights.
        RangeError: a strength outside [0, 1].

    Examples:
        >>> model, base = {"w": torch.tensor([3.0])}, {"w": torch.tensor([1.0])}
        >>> shrink(model, base, 0.5)["w"]
        tensor([2.])
    """
    check_strength(strength, most=1)
    check_models(model=model, base=base)
    return (-TaskVector.between(base, model)).apply(model, strength)


def mix(model: Params, base: Params, strength: float, *, seed: int) -> Params:
    """Replace weights of a model by the base's at random: the first step of Fine-mixing.

    `base + m * (model - base)` with `m ~ Bernoulli(1 - strength)`, independent for every weight and without rescaling.
    The paper's own parameter is the fraction kept, `1 - strength`. Its second step, a fine-tune on clean data, is not
    part of this function.

    Our reading: the formula is from general knowledge, because the paper's own text was not available to us.

    Requires the base; no data, except to choose the strength. Cost: one pass.

    Args:
        model: a fine-tune, or a merge.
        base: the pre-trained model.
        strength: the chance that a weight is the base's, in [0, 1]; 0 leaves the model.
        seed: any integer.

    Returns:
        A model; what is kept is exactly the model's, what is replaced is the base's up to rounding.

    Raises:
        MismatchError: names or shapes differ.
        OptionError: an argument that is not a model's weights.
        RangeError: a strength outside [0, 1].

    Examples:
        >>> model, base = {"w": torch.ones(1000)}, {"w": torch.zeros(1000)}
        >>> mixed = mix(model, base, 0.3, seed=0)
        >>> 0.6 < float(mixed["w"].mean()) < 0.8
        True

    Reference:
        [Zhang et al., Fine-mixing, 2022](https://arxiv.org/abs/2210.09545)
    """
    check_strength(strength, most=1)
    check_models(model=model, base=base)
    difference = TaskVector.between(base, model)
    kept = difference.map(drop, density=1 - strength, seed=seed, rescale=None)
    return (kept - difference).apply(model)


def cosine_gate(
    vector: TaskVector, reference: TaskVector, strength: float = 0.2, *, threshold: float = 0.35
) -> TaskVector:
    """Mix those matrices of a vector with a trusted vector's that leave its column space (SafeMERGE's rule).

    For each matrix, `C = V V^T / ||V||_F` of the reference and `rho = cos(C W, W)`; where rho is below the threshold,
    `W` becomes `(1 - strength) * W + strength * V`. Tensors of other than two dimensions, and matrices that are zero,
    stay as they are.

    Requires a trusted vector, of an aligned model or a clean fine-tune; no data. Cost: two matrix products per matrix.

    Args:
        vector: a contributor's task vector.
        reference: the trusted vector, from the same base.
        strength: the weight of the reference in a failing matrix, in [0, 1]; the paper's own parameter is
            `1 - strength`.
        threshold: in [-1, 1]; the default is that of the paper's code.

    Returns:
        A task vector.

    Raises:
        MismatchError: names, shapes or bases differ.
        OptionError: an argument that is not a task vector.
        RangeError: a strength outside [0, 1], a threshold outside [-1, 1].

    Examples:
        >>> vector = TaskVector({"w": torch.tensor([[0.0, 0.0], [1.0, 1.0]])})
        >>> trusted = TaskVector({"w": torch.tensor([[1.0, 1.0], [0.0, 0.0]])})
        >>> cosine_gate(vector, trusted)["w"]
        tensor([[0.2000, 0.2000],
                [0.8000, 0.8000]])

    Reference:
        [Djuhera et al., SafeMERGE, 2025](https://arxiv.org/abs/2503.17239), following its code. There the matrices are
        LoRA updates and the reference is the aligned model minus the base.
    """
    if not -1 <= threshold <= 1:
        raise RangeError(f"threshold must be a cosine, in [-1, 1]; got {threshold!r}")
    check_strength(strength, most=1)
    check_vector("vector", vector)
    check_vector("reference", reference)
    return merge([vector, reference], _gated, threshold=threshold, strength=strength)


@runs("tensor")
def _gated(stack: Tensor, *, threshold: float, strength: float) -> Tensor:
    if stack.ndim != 3 or not stack.numel():
        return stack[0]
    own, trusted = (x / x.abs().amax().clamp(min=torch.finfo(x.dtype).tiny) for x in stack)
    with single_thread():
        seen = trusted @ (trusted.T @ own)  # C W, but for a factor that the cosine does not see
        sizes = seen.square().sum() * own.square().sum()
        rho = (seen * own).sum() / torch.where(sizes > 0, sizes.sqrt(), torch.ones_like(sizes))
    fails = (rho < threshold) & own.any()  # a zero matrix has no direction: there is nothing to gate
    return torch.where(fails, (1 - strength) * stack[0] + strength * stack[1], stack[0])
