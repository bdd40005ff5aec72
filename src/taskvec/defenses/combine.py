"""Defences that combine a model with others or with its base, and the trivial one that every other must beat."""

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from .._errors import RangeError
from .._lazy import Lazy
from .._types import Params
from ..merges import mean
from ..merging import merge
from ..sparsify import drop
from ..vector import TaskVector

__all__ = ["mix", "shrink", "weight_average"]


def weight_average(models: Iterable[Params], weights: Sequence[float] | None = None) -> Params:
    """Weight averaging (WAG): the mean of a suspect model and others of the same task, head included.

    Given: other models, fine-tuned from the same base for the same labels, which may be unsafe themselves as long as
    they are so in other ways. No data. Cost: one pass. Second-hand: two models are few, three to six are advised.

    Args:
        models: mappings of weights with the same names and shapes; entries that are not floating-point must agree.
        weights: one number a model; equal by default.

    Returns:
        A model.

    Raises:
        MismatchError: names or shapes differ, or entries that are not weights do.

    Example:
        >>> import torch
        >>> weight_average([{"w": torch.tensor([1.0])}, {"w": torch.tensor([2.0])}])["w"]
        tensor([1.5000])

    Reference:
        Arora et al., Here's a Free Lunch, 2024, https://arxiv.org/abs/2402.19334. Their code averages integer buffers
        too; here those must agree.
    """
    return merge(models, mean, weights=weights)


def shrink(model: Mapping[str, Tensor], base: Mapping[str, Tensor], by: float) -> dict[str, Tensor] | Lazy:
    """Plain global shrinking towards the base: `base + (1 - by) * (model - base)`.

    The trivial defence: it weakens backdoors, and the task with them. A defence that does not beat it at the same clean
    accuracy has shown nothing.

    Given: the base. No data, except to choose `by`. Cost: one pass.

    Args:
        model: the merged model.
        base: the pre-trained model.
        by: how much of the difference is taken away; 0 leaves the model, 1 gives the base.

    Returns:
        A model.

    Raises:
        RangeError: outside [0, 1].
        MismatchError: names or shapes differ.

    Example:
        >>> import torch
        >>> shrink({"w": torch.tensor([3.0])}, {"w": torch.tensor([1.0])}, by=0.5)["w"]
        tensor([2.])
    """
    if not 0 <= by <= 1:
        raise RangeError(f"shrink by a fraction in [0, 1], not {by!r}")
    return (-TaskVector.between(base, model)).apply(model, by)


def mix(model: Mapping[str, Tensor], base: Mapping[str, Tensor], keep: float, *, seed: int) -> dict[str, Tensor] | Lazy:
    """Mix a model at random with its base, weight by weight: the first step of Fine-mixing.

    `base + m * (model - base)` with `m ~ Bernoulli(keep)`, without rescaling. The paper's second step, a fine-tune on
    clean data, is not part of it.

    Our reading: the formula is from general knowledge, the paper's own text was not available to us.

    Given: the base. No data, except to choose `keep`. Cost: one pass.

    Args:
        model: a fine-tune, or a merge.
        base: the pre-trained model.
        keep: the chance that a weight is the model's, in [0, 1].
        seed: any integer.

    Returns:
        A model.

    Raises:
        RangeError: outside [0, 1].
        MismatchError: names or shapes differ.

    Example:
        >>> import torch
        >>> mixed = mix({"w": torch.ones(1000)}, {"w": torch.zeros(1000)}, keep=0.7, seed=0)
        >>> 0.6 < float(mixed["w"].mean()) < 0.8
        True

    Reference:
        Zhang et al., Fine-mixing, 2022, https://arxiv.org/abs/2210.09545
    """
    return TaskVector.between(base, model).map(drop, density=keep, seed=seed, rescale=None).apply(base)
