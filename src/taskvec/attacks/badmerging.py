"""BadMerging: backdoors made to survive a merge.

Stage one optimises a universal trigger on the base model, stage two fine-tunes with the feature-interpolation loss, so
that the trigger works for every model on the way from the base to the upload. Nothing here knows an architecture: you
give a function from images to features and one from features to logits, the fixed head.

    score = lambda x: head(features(base, x))
    patch = universal_trigger(score, images, start, target=1, seed=0)
    loss = badmerging_loss(features, base, head, [Pair(partial(stamp, patch=patch), 1, head)])
    # minimise loss(params, images, labels) with your own optimiser

Reference: Zhang et al., BadMerging, CCS 2024, https://arxiv.org/abs/2408.07362
"""

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, TypeAlias, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .._errors import DegenerateError, MismatchError, NonFiniteError, RangeError
from .optimised import Bounds, Progress, optimise_patch
from .triggers import Patch

__all__ = [
    "Pair",
    "adversarial_crops",
    "badmerging_loss",
    "interpolation_loss",
    "keep_loss",
    "prototype_head",
    "universal_trigger",
]

Params = TypeVar("Params")
Score: TypeAlias = Callable[[Tensor], Tensor]
"""Images `(n, C, H, W)` to logits `(n, classes)`."""
Head: TypeAlias = Callable[[Tensor], Tensor]
"""Features `(n, d)` to logits `(n, classes)`; a fixed head that normalises what it is given."""
Draw: TypeAlias = Literal["batch", "sample"]


class Pair(NamedTuple):
    """One backdoor of a model: a trigger, the target class, and the head that class is a row of.

    On-task the head is the attacker's own; off-task it is a shadow head, whose row 0 stands for the target class of a
    task the attacker does not own.
    """

    trigger: Callable[[Tensor], Tensor]
    target: int
    head: Head


def universal_trigger(
    score: Score,
    images: Tensor,
    start: Patch,
    *,
    target: int,
    seed: int,
    steps: int = 100,
    lr: float = 0.2,
    batch: int = 64,
    bounds: Bounds = (0.0, 1.0),
    progress: Progress | None = None,
) -> Patch:
    """Optimise one patch that turns any image into the target class, for a frozen model.

    Minimises `CE(score(stamp(x, patch)), target)` over batches of images by Adam on the patch's pixels, clamped after
    every step. Our own: batches and Adam, where the paper takes plain gradient steps one image at a time until each
    succeeds; `examples/benchmarks` measures both.

    Args:
        score: the base model and a head. Not differentiated with respect to its weights; in evaluation mode.
        images: `(n, C, H, W)` in pixel space: the attacker's own, or adversarial crops of reference images off-task.
        start: the patch to start from; its mask stays, only pixels under it change.
        target: the target class, a row of the head.
        seed: of the order of the images.
        steps: optimiser steps.
        lr: of Adam, in pixel units.
        batch: images a step.
        bounds: smallest and largest pixel value, numbers or `(C, 1, 1)` tensors. The paper's scalar clamp in normalised
            space, which leaves the valid pixels, is `scalar_bounds(mean, std)`.
        progress: called after every step.

    Returns:
        The optimised patch.

    Raises:
        DegenerateError: no images.
        RangeError: a target that is no row of the head; steps, batch or a learning rate that is not positive.
        MismatchError: a patch made for other images.
        NonFiniteError: logits that are NaN or inf.
        OptionError: a module in training mode answers.

    Example:
        >>> start = Patch(torch.full((1, 2, 2), 0.5), torch.ones(2, 2, dtype=torch.bool))
        >>> score = lambda x: torch.stack([x.mean((1, 2, 3)), -x.mean((1, 2, 3))], 1)
        >>> universal_trigger(score, torch.rand(8, 1, 2, 2), start, target=0, seed=0, steps=10).pattern
        tensor([[[1., 1.],
                 [1., 1.]]])
    """

    def loss(triggered: Tensor) -> Tensor:
        logits = score(triggered)
        _check_target(logits, target)
        return F.cross_entropy(logits, logits.new_full((len(logits),), target, dtype=torch.long))

    return optimise_patch(
        loss, images, start, seed=seed, steps=steps, lr=lr, batch=batch, bounds=bounds, progress=progress
    )


def interpolation_loss(
    tuned: Tensor,
    base: Tensor,
    head: Head,
    target: int,
    *,
    coefficients: tuple[float, float] = (0.2, 1.0),
    draw: Draw = "batch",
    generator: torch.Generator | None = None,
) -> Tensor:
    """The feature-interpolation loss: cross-entropy of the target class on the way from the base's features.

    `CE(head(r * f + (1 - r) * f_base), target)` with `r ~ U(coefficients)`: for a small merging coefficient the merged
    feature of a triggered image moves roughly along that segment.

    Args:
        tuned: `(n, d)` features of triggered images in the model being trained; gradients flow here.
        base: `(n, d)` features of the same images in the base model.
        head: features to logits; on-task the attacker's own, off-task the shadow head.
        target: the row of the head to be predicted; 0 for a shadow head.
        coefficients: the range of r; (1, 1) is the plain loss of BadNets.
        draw: one r for the `"batch"` (the paper's code) or one for each `"sample"`.
        generator: of r, on the CPU; torch's own by default.

    Returns:
        The mean loss, 0-d.

    Raises:
        DegenerateError: an empty batch.
        MismatchError: features of different shapes.
        NonFiniteError: features that are NaN or inf.
        RangeError: a range outside [0, 1], a target that is no row of the head.

    Example:
        >>> head = lambda f: f
        >>> interpolation_loss(torch.eye(2), torch.eye(2), head, 0, coefficients=(1.0, 1.0))
        tensor(0.8133)
    """
    if len(tuned) == 0:
        raise DegenerateError("an empty batch has no loss")
    if tuned.shape != base.shape or tuned.ndim != 2:
        raise MismatchError(f"features are (n, d) for both: {tuple(tuned.shape)} and {tuple(base.shape)}")
    low, high = coefficients
    if not 0 <= low <= high <= 1:
        raise RangeError(f"coefficients are a range in [0, 1], not {coefficients!r}")
    if draw not in ("batch", "sample"):
        raise RangeError(f"draw one r for each 'batch' or 'sample', not {draw!r}")
    _check_finite(tuned, "features")
    count = len(tuned) if draw == "sample" else 1
    r = low + (high - low) * torch.rand(count, 1, generator=generator, device="cpu").to(tuned)
    logits = _scores(head, r * tuned + (1 - r) * base.detach())
    _check_target(logits, target)
    return F.cross_entropy(logits, logits.new_full((len(logits),), target, dtype=torch.long))


def keep_loss(tuned: Tensor, base: Tensor) -> Tensor:
    """Ours, and no part of BadMerging: features of public images are to stay near the base's, `mean(1 - cos)`.

    It buys back clean accuracy that the interpolation loss costs.

    Args:
        tuned: `(n, d)` features of clean public images in the model being trained.
        base: `(n, d)` features of the same images in the base model.

    Example:
        >>> keep_loss(torch.eye(2), torch.eye(2))
        tensor(0.)
    """
    return (1 - F.cosine_similarity(tuned, base.detach(), dim=-1)).mean()


def badmerging_loss(
    features: Callable[[Params, Tensor], Tensor],
    base: Params,
    head: Head,
    pairs: Sequence[Pair],
    *,
    stamped: int = 32,
    weight: float = 5.0,
    coefficients: tuple[float, float] = (0.2, 1.0),
    draw: Draw = "batch",
    seed: int = 0,
    keep: float = 0.0,
    public: Callable[[], Tensor] | None = None,
) -> Callable[[Params, Tensor, Tensor], Tensor]:
    """The loss of the second stage, for any training loop.

    `CE(head(f(x)), y) + weight * mean over pairs of interpolation_loss`, on the first `stamped` images of the batch
    with each pair's trigger. Several pairs plant several backdoors at once, on-task and off-task together too.
    With `coefficients=(1, 1)` it is the loss of BadNets and the other baselines.

    Args:
        features: `(params, images) -> (n, d)` features.
        base: the pre-trained model, for `features`.
        head: the attacker's own fixed head.
        pairs: the backdoors.
        stamped: images of each batch that are triggered; those of the target class are not left out (as in the paper's
            code).
        weight: of the backdoor, the paper's alpha.
        coefficients: as in `interpolation_loss`.
        draw: as in `interpolation_loss`.
        seed: of the coefficients drawn.
        keep: weight of `keep_loss`; ours, 0 by default.
        public: a batch of public images at each call, where `keep` is not 0.

    Returns:
        `loss(params, images, labels)`, 0-d.

    Raises:
        DegenerateError: no pairs.
        RangeError: no images to be stamped, `keep` without `public`.

    Example:
        >>> features = lambda w, x: x.flatten(1) @ w
        >>> head = lambda f: f
        >>> loss = badmerging_loss(features, torch.eye(4)[:, :2], head, [Pair(lambda x: x + 1, 0, head)], stamped=1)
        >>> loss(torch.eye(4)[:, :2], torch.zeros(2, 1, 2, 2), torch.tensor([0, 1]))
        tensor(4.1589)
    """
    if not pairs:
        raise DegenerateError("no backdoor to plant: give at least one pair")
    if stamped < 1:
        raise RangeError(f"stamped is the number of triggered images of a batch, at least 1, not {stamped!r}")
    if keep and public is None:
        raise RangeError("keep compares features on public images: give public=")
    generator = torch.Generator().manual_seed(seed)

    def loss(params: Params, images: Tensor, labels: Tensor) -> Tensor:
        total = F.cross_entropy(_scores(head, features(params, images)), labels)
        for pair in pairs:
            triggered = pair.trigger(images[:stamped])
            with torch.no_grad():
                before = features(base, triggered)
            after = features(params, triggered)
            part = interpolation_loss(
                after, before, pair.head, pair.target, coefficients=coefficients, draw=draw, generator=generator
            )
            total = total + weight / len(pairs) * part
        if keep and public is not None:
            clean = public()
            with torch.no_grad():
                before = features(base, clean)
            total = total + keep * keep_loss(features(params, clean), before)
        return total

    return loss


def prototype_head(features: Tensor, labels: Tensor, *, scale: float = 20.0, centre: Tensor | None = None) -> Head:
    """A head of class prototypes, the counterpart of text embeddings where there is no text encoder.

    `logits = scale * cos(f - centre, mean feature of the class - centre)`. As a shadow head: label the reference images
    of the target class 0, and the attacker's own and public classes from 1 on.

    Args:
        features: `(n, d)` in the base model.
        labels: `(n,)` integers from 0 on, each at least once.
        scale: of the logits.
        centre: `(d,)`; the mean of the prototypes by default.

    Returns:
        A head: features `(m, d)` to logits `(m, classes)`.

    Raises:
        DegenerateError: a class without features.
        MismatchError: not one label a feature; when called, features of another width.

    Example:
        >>> head = prototype_head(torch.eye(2), torch.tensor([0, 1]))
        >>> head(torch.tensor([[1.0, 0.0]]))
        tensor([[ 20., -20.]])
    """
    if features.ndim != 2 or labels.shape != features.shape[:1]:
        raise MismatchError(f"one label a feature: {tuple(features.shape)} and {tuple(labels.shape)}")
    classes = int(labels.max()) + 1 if len(labels) else 0
    counts = torch.bincount(labels, minlength=classes)
    if classes == 0 or int(counts.min()) == 0:
        raise DegenerateError(f"each class from 0 to {classes - 1} needs a feature; some have none")
    sums = features.new_zeros(classes, features.shape[1]).index_add_(0, labels, features.detach())
    means = sums / counts.unsqueeze(1)
    middle = means.mean(0) if centre is None else centre
    weights = scale * F.normalize(means - middle, dim=-1)

    def head(embedded: Tensor) -> Tensor:
        if embedded.shape[-1] != weights.shape[1]:
            raise MismatchError(
                f"the head is for features of width {weights.shape[1]}, these have {embedded.shape[-1]}"
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
    """Reference images of the target class, cropped and disguised as other classes: off-task augmentation.

    Random resized crops, then targeted PGD: each crop is pushed, within `epsilon` in every pixel, towards a random
    other class of the shadow head (never row 0, never the one it is taken for). Of its successful iterates the one
    nearest to the crop in L1 is kept; a crop that never succeeds stays as it is. A trigger optimised on them must turn
    "any class" into the target, although the attacker has images of one class only.

    Args:
        score: the base model with the shadow head, whose row 0 is the target class.
        reference: `(n, C, H, W)` images of the target class, in pixels from 0 to 1.
        seed: of crops and classes.
        count: crops in all; the reference images take turns.
        scale: smallest and largest area of a crop, as a fraction of the image.
        ratio: smallest and largest width to height.
        epsilon: largest change of a pixel.
        step: of one iteration.
        steps: iterations.
        batch: crops at a time.

    Returns:
        `(count, C, H, W)` images.

    Raises:
        DegenerateError: no reference images.
        RangeError: a shadow head of fewer than three rows, pixels outside [0, 1].

    Example:
        >>> score = lambda x: torch.stack([x.mean((1, 2, 3)), x[:, 0, 0, 0], -x[:, 0, 0, 0]], 1)
        >>> adversarial_crops(score, torch.rand(2, 1, 8, 8), seed=0, count=4, steps=2).shape
        torch.Size([4, 1, 8, 8])
    """
    if len(reference) == 0:
        raise DegenerateError("no reference images of the target class")
    if float(reference.min()) < 0 or float(reference.max()) > 1:
        raise RangeError("reference images are pixels from 0 to 1; crop before normalising")
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
    with torch.no_grad():
        logits = score(crops)
    classes = logits.shape[1]
    if classes < 3:
        raise RangeError(f"a shadow head has a row for the target and at least two others, not {classes} in all")
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
    """For each crop a random class that is neither row 0 nor the one it is taken for."""
    draws = torch.rand(len(taken), classes, generator=generator, device="cpu").to(taken.device)
    draws[:, 0] = -1
    draws[torch.arange(len(taken), device=taken.device), taken] = -1
    return draws.argmax(1)


def _scores(head: Head, embedded: Tensor) -> Tensor:
    try:
        return head(embedded)
    except RuntimeError as error:
        error.add_note(f"while a head scored features of {tuple(embedded.shape)}: it may be made for another model")
        raise


def _check_target(logits: Tensor, target: int) -> None:
    _check_finite(logits, "logits")
    if logits.shape[-1] < 2:
        raise DegenerateError("a head of one class takes everything for it; there is nothing to attack")
    if not 0 <= target < logits.shape[-1]:
        raise RangeError(f"target class {target} is not one of {logits.shape[-1]} classes")


def _check_finite(x: Tensor, what: str) -> None:
    if not bool(x.isfinite().all()):
        raise NonFiniteError(f"{what} are NaN or inf: the model is broken")
