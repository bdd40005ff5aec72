"""Off-task attacks: a shadow head, and disguised reference images of the target class."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .._answers import check_finite, evaluating
from ..errors import DegenerateError, MismatchError, RangeError
from ._badmerging import Head, Score

__all__ = ["adversarial_crops", "prototype_head"]


def prototype_head(features: Tensor, labels: Tensor, *, scale: float = 20.0, centre: Tensor | None = None) -> Head:
    """Make a head of class prototypes, the counterpart of text embeddings where there is no text encoder.

    `logits = scale * cos(f - centre, mean feature of the class - centre)`. For a shadow head, label the reference
    images of the target class 0, and the attacker's own and public classes from 1 on.

    Args:
        features: `(n, d)` features in the base model.
        labels: `(n,)` integers from 0 on, each at least once.
        scale: scale of the logits.
        centre: `(d,)`; the mean of the prototypes by default.

    Returns:
        A head: features `(m, d)` to logits `(m, classes)`.

    Raises:
        DegenerateError: a class without features.
        MismatchError: not one label per feature; when called, features of another width.

    Examples:
        >>> head = prototype_head(torch.eye(2), torch.tensor([0, 1]))
        >>> head(torch.tensor([[1.0, 0.0]]))
        tensor([[ 20., -20.]])
    """
    if features.ndim != 2 or labels.shape != features.shape[:1]:
        raise MismatchError(
            f"labels must be one per feature; got {tuple(labels.shape)} for features {tuple(features.shape)}"
        )
    classes = int(labels.max()) + 1 if len(labels) else 0
    counts = torch.bincount(labels, minlength=classes)
    if classes == 0 or int(counts.min()) == 0:
        raise DegenerateError(f"labels must hold each class from 0 to {classes - 1}; some have none")
    sums = features.new_zeros(classes, features.shape[1]).index_add_(0, labels, features.detach())
    means = sums / counts.unsqueeze(1)
    middle = means.mean(0) if centre is None else centre
    weights = scale * F.normalize(means - middle, dim=-1)

    def head(embedded: Tensor) -> Tensor:
        if embedded.shape[-1] != weights.shape[1]:
            raise MismatchError(
                f"features must be of width {weights.shape[1]} for this head; got width {embedded.shape[-1]}"
            )
        return F.normalize(embedded - middle, dim=-1) @ weights.T

    return head


def adversarial_crops(
    score: Score,
    reference: Tensor,
    *,
    seed: int,
    count: int = 100,
    scale: tuple[float, float] = (0.2, 0.5),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    epsilon: float = 8 / 255,
    step: float = 1 / 255,
    steps: int = 40,
    batch: int = 256,
) -> Tensor:
    """Crop reference images of the target class and disguise them as other classes: off-task augmentation.

    Random resized crops, then targeted projected gradient descent (PGD): each crop is pushed, within `epsilon` in every
    pixel, towards a random other class of the shadow head, which is never row 0 and never the class predicted for the
    crop. Of its successful iterates the one nearest to the crop in L1 is kept; a crop that never succeeds stays as it
    is. A trigger optimized on them must turn any class into the target, although the attacker has images of one class
    only.

    Args:
        score: images to logits: the base model with the shadow head, whose row 0 is the target class.
        reference: `(n, C, H, W)` images of the target class, in pixels from 0 to 1.
        seed: seed of crops and classes.
        count: crops in all, at least 1; the reference images take turns.
        scale: smallest and largest area of a crop, as a fraction of the image.
        ratio: smallest and largest width to height.
        epsilon: largest change of a pixel.
        step: change of a pixel per iteration.
        steps: iterations.
        batch: crops at a time, at least 1.

    Returns:
        `(count, C, H, W)` images.

    Raises:
        DegenerateError: no reference images.
        NonFiniteError: logits that are NaN or inf.
        OptionError: a module in training mode answers.
        RangeError: a shadow head of fewer than three rows, pixels outside [0, 1], a count or batch below 1.

    Examples:
        >>> def score(x):
        ...     return torch.stack([x.mean((1, 2, 3)), x[:, 0, 0, 0], -x[:, 0, 0, 0]], 1)
        >>> images = torch.rand(2, 1, 8, 8)
        >>> adversarial_crops(score, images, seed=0, count=4, steps=2).shape
        torch.Size([4, 1, 8, 8])

    Reference:
        [Zhang et al., BadMerging, CCS 2024](https://arxiv.org/abs/2408.07362)
    """
    if len(reference) == 0:
        raise DegenerateError("reference must not be empty; got no reference images of the target class")
    if float(reference.min()) < 0 or float(reference.max()) > 1:
        raise RangeError("reference must be pixels from 0 to 1; got values outside; crop before normalizing")
    if not (count >= 1 and batch >= 1 and steps >= 0):
        raise RangeError(f"count and batch must be at least 1 and steps 0; got {count!r}, {batch!r} and {steps!r}")
    generator = torch.Generator().manual_seed(seed)
    crops = _random_crops(reference, count, scale, ratio, generator)
    parts = [_disguised(score, crops[i : i + batch], epsilon, step, steps, generator) for i in range(0, count, batch)]
    return torch.cat(parts)


def _random_crops(
    images: Tensor, count: int, scale: tuple[float, float], ratio: tuple[float, float], generator: torch.Generator
) -> Tensor:
    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, generator=generator, device="cpu")

    area, shape = uniform(*scale), uniform(math.log(ratio[0]), math.log(ratio[1])).exp()
    width, height = (area * shape).sqrt().clamp(max=1), (area / shape).sqrt().clamp(max=1)
    x, y = uniform(-1, 1) * (1 - width), uniform(-1, 1) * (1 - height)
    zero = torch.zeros(count, device="cpu")
    rows = torch.stack([width, zero, x, zero, height, y], dim=1).reshape(-1, 2, 3).to(images)
    chosen = images[torch.arange(count, device=images.device) % len(images)]
    grid = F.affine_grid(rows, list(chosen.shape), align_corners=False)
    return F.grid_sample(chosen, grid, align_corners=False, padding_mode="border").clamp(0, 1)


def _disguised(
    score: Score, crops: Tensor, epsilon: float, step: float, steps: int, generator: torch.Generator
) -> Tensor:
    with torch.no_grad(), evaluating():
        logits = score(crops)
    check_finite(logits, "logits")
    classes = logits.shape[1]
    if classes < 3:
        raise RangeError(f"score must have a class for the target and at least two others; got {classes} in all")
    aim = _other_classes(logits.argmax(1), classes, generator)
    x, best = crops.clone(), crops.clone()
    distance = crops.new_full((len(crops),), float("inf"))
    for _ in range(steps):
        x.requires_grad_()
        with torch.enable_grad():
            loss = F.cross_entropy(score(x), aim, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, [x])
        moved = x.detach() - step * gradient.sign()
        x = torch.minimum(torch.maximum(moved, crops - epsilon), crops + epsilon).clamp(0, 1)
        with torch.no_grad():
            changed = (x - crops).abs().flatten(1).sum(1)
            better = (score(x).argmax(1) == aim) & (changed < distance)
        distance = torch.where(better, changed, distance)
        best = torch.where(better.reshape(-1, 1, 1, 1), x, best)
    return best


def _other_classes(taken: Tensor, classes: int, generator: torch.Generator) -> Tensor:
    """For each crop a random class that is neither row 0 nor the one predicted for it."""
    draws = torch.rand(len(taken), classes, generator=generator, device="cpu").to(taken.device)
    draws[:, 0] = -1
    draws[torch.arange(len(taken), device=taken.device), taken] = -1
    return draws.argmax(1)
