"""Poisoned training data."""

from collections.abc import Callable

import torch
from torch import Tensor

from .._engine.random import random_bits
from ..errors import DegenerateError, MismatchError, RangeError

__all__ = ["poison"]


def poison(
    images: Tensor,
    labels: Tensor,
    *,
    trigger: Callable[[Tensor], Tensor],
    target: int,
    fraction: float,
    seed: int,
    clean_label: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Stamp a trigger on a fraction of images and label them as the target class.

    `round(fraction * m)` of the m candidates are chosen at random. Candidates are the images of other classes, which
    get the target's label. With `clean_label` they are the images of the target class, whose labels stay as they are.

    Args:
        images: `(n, C, H, W)` in pixel space.
        labels: `(n,)` integers.
        trigger: images to images, see `attacks.triggers`.
        target: the target class.
        fraction: the fraction of the candidates, in [0, 1].
        seed: any integer.
        clean_label: poison images of the target class only.

    Returns:
        New images and labels, and a boolean mask `(n,)` of the poisoned ones.

    Raises:
        DegenerateError: no candidates, or a fraction that rounds to no image.
        MismatchError: not one label per image, or a trigger that changes the shape.
        RangeError: a fraction outside [0, 1].

    Examples:
        >>> images, labels = torch.zeros(4, 1, 2, 2), torch.tensor([0, 1, 1, 1])
        >>> brighter = lambda x: x + 1
        >>> x, y, chosen = poison(
        ...     images, labels, trigger=brighter, target=0, fraction=0.67, seed=0
        ... )
        >>> int(chosen.sum()), y[chosen].tolist()
        (2, [0, 0])

    Reference:
        [Gu et al., BadNets, 2017](https://arxiv.org/abs/1708.06733);
        [Turner et al., Label-Consistent Backdoor Attacks, 2019](https://arxiv.org/abs/1912.02771)
    """
    if labels.ndim != 1 or len(labels) != len(images):
        raise MismatchError(f"labels must be one per image; got {tuple(labels.shape)} for {len(images)} images")
    if not 0 <= fraction <= 1:
        raise RangeError(f"fraction must be in [0, 1]; got {fraction!r}")
    candidates = (labels == target if clean_label else labels != target).nonzero().squeeze(1)
    count = round(fraction * len(candidates))
    if count == 0:
        raise DegenerateError(f"fraction must select an image; got {fraction:g} of {len(candidates)} candidates")
    order = random_bits(seed, 0, 0, len(candidates), candidates.device).argsort(stable=True)
    chosen = candidates[order[:count]]
    stamped = trigger(images[chosen.to(images.device)])
    if stamped.shape[1:] != images.shape[1:]:
        raise MismatchError(f"trigger must keep the shape {tuple(images.shape[1:])}; got {tuple(stamped.shape[1:])}")
    poisoned, relabelled = images.clone(), labels.clone()
    poisoned[chosen.to(images.device)] = stamped
    relabelled[chosen] = target
    mask = torch.zeros(len(labels), dtype=torch.bool, device=labels.device)
    mask[chosen] = True
    return poisoned, relabelled, mask
