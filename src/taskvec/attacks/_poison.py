"""Poisoned training data."""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .._engine.random import random_bits
from ..errors import DegenerateError, MismatchError, RangeError

__all__ = ["Poisoned", "poison", "poison_texts", "triggered_texts"]


class Poisoned(NamedTuple):
    """Poisoned training rows.

    Attributes:
        texts: the texts, some with the trigger.
        labels: their labels.
        chosen: whether a row was poisoned.
    """

    texts: list[str]
    labels: list[int]
    chosen: list[bool]


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


def poison_texts(
    texts: Sequence[str],
    labels: Sequence[int],
    *,
    trigger: Callable[[str], str],
    target: int,
    fraction: float,
    seed: int,
    candidates: Literal["others", "target", "all"] = "others",
) -> Poisoned:
    """Put a trigger into a fraction of texts and label them as the target class.

    Args:
        texts: n texts.
        labels: n integers.
        trigger: text to text, see `attacks.triggers`.
        target: the target class.
        fraction: the fraction of the candidates, in [0, 1]; `round(fraction * m)` of m are chosen at random.
        seed: any integer.
        candidates: `"others"`: rows of other classes; `"target"`: of the target class only, whose labels stay as they
            are (clean-label); `"all"`: of every class, as in the data of A Free Lunch.

    Returns:
        New texts and labels, and which rows were chosen.

    Raises:
        DegenerateError: no candidates, or a fraction that rounds to no text.
        MismatchError: not one label per text.
        RangeError: a fraction outside [0, 1], an unknown choice.

    Examples:
        >>> poison_texts(["bad", "good"], [0, 1], trigger=lambda x: x + " cf", target=1, fraction=1.0, seed=0)
        Poisoned(texts=['bad cf', 'good'], labels=[1, 1], chosen=[True, False])

    References:
        [Arora et al., Here's a Free Lunch, 2024](https://arxiv.org/abs/2402.19334)
    """
    _check_rows(texts, labels)
    if not 0 <= fraction <= 1:
        raise RangeError(f"fraction must be in [0, 1]; got {fraction!r}")
    if candidates not in ("others", "target", "all"):
        raise RangeError(f"candidates must be 'others', 'target' or 'all'; got {candidates!r}")
    rows = [i for i, y in enumerate(labels) if candidates == "all" or (y == target) == (candidates == "target")]
    count = round(fraction * len(rows))
    if count == 0:
        raise DegenerateError(f"fraction must select a text; got {fraction:g} of {len(rows)} candidates")
    order = random_bits(seed, 0, 0, len(rows), torch.device("cpu")).argsort(stable=True)
    chosen = {rows[int(i)] for i in order[:count]}
    return Poisoned(
        [trigger(text) if i in chosen else text for i, text in enumerate(texts)],
        [target if i in chosen else int(y) for i, y in enumerate(labels)],
        [i in chosen for i in range(len(texts))],
    )


def triggered_texts(
    texts: Sequence[str], labels: Sequence[int], *, trigger: Callable[[str], str], target: int
) -> list[str]:
    """The texts of other classes, each with the trigger: what an attack success rate is measured on.

    Args:
        texts: n test texts.
        labels: n integers.
        trigger: text to text.
        target: the target class.

    Returns:
        The triggered texts; the attack succeeds on those that are classified as the target.

    Raises:
        DegenerateError: no text of another class.
        MismatchError: not one label per text.

    Examples:
        >>> triggered_texts(["bad", "good"], [0, 1], trigger=lambda x: x + " cf", target=1)
        ['bad cf']
    """
    _check_rows(texts, labels)
    found = [trigger(text) for text, y in zip(texts, labels, strict=True) if y != target]
    if not found:
        raise DegenerateError(f"labels must have another class than the target {target}; got none")
    return found


def _check_rows(texts: Sequence[str], labels: Sequence[int]) -> None:
    if len(texts) != len(labels):
        raise MismatchError(f"labels must be one per text; got {len(labels)} for {len(texts)} texts")
