"""BadMerging: backdoors made to survive a merge.

Stage one optimizes a universal trigger on the base model. Stage two fine-tunes with the feature-interpolation loss, so
that the trigger works for every model between the base and the upload. Nothing depends on an architecture: you give a
function from images to features, and one from features to logits, the fixed head.

    score = lambda x: head(features(base, x))
    patch = universal_trigger(score, images, start, target=1, seed=0)
    loss = badmerging_loss(features, base, head, [Pair(partial(stamp, patch=patch), 1, head)])
    # minimize loss(params, images, labels) with your own optimizer

Reference: [Zhang et al., BadMerging, CCS 2024](https://arxiv.org/abs/2408.07362)
"""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, TypeAlias, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .._answers import check_finite, check_target
from ..errors import DegenerateError, MismatchError, RangeError
from ._patches import Bounds, Progress, optimise_patch
from .triggers import Patch

__all__ = [
    "Pair",
    "badmerging_loss",
    "interpolation_loss",
    "keep_loss",
    "universal_trigger",
]

Params = TypeVar("Params")
Score: TypeAlias = Callable[[Tensor], Tensor]
"""Images `(n, C, H, W)` to logits `(n, classes)`."""
Head: TypeAlias = Callable[[Tensor], Tensor]
"""Features `(n, d)` to logits `(n, classes)`; a fixed head that normalizes the features."""
Draw: TypeAlias = Literal["batch", "sample"]


class Pair(NamedTuple):
    """One backdoor of a model: a trigger, the target class, and the head that the class is a row of.

    On-task the head is the attacker's own. Off-task it is a shadow head, whose row 0 stands for the target class of a
    task that the attacker does not own.

    Attributes:
        trigger: images to images.
        target: the row of the head.
        head: features to logits.
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
    """Optimize one patch that turns any image into the target class, for a frozen model.

    Minimizes `CE(score(stamp(x, patch)), target)` over batches of images by Adam on the patch's pixels, clamped after
    every step. Batches and Adam are our choice: the paper takes plain gradient steps, one image at a time, until each
    succeeds. `examples/experiments/universal_trigger.py` measures both.

    Args:
        score: images to logits: the base model and a head, in evaluation mode. Its weights are not differentiated.
        images: `(n, C, H, W)` in pixel space: the attacker's own, or adversarial crops of reference images off-task.
        start: the initial patch; its mask stays, and only pixels under the mask change.
        target: the target class, a row of the head.
        seed: seed of the order of the images.
        steps: optimizer steps.
        lr: learning rate of Adam, in pixel units.
        batch: images per step.
        bounds: smallest and largest pixel value, numbers or `(C, 1, 1)` tensors. The paper's scalar clamp in normalized
            space, which leaves the valid pixels, is `scalar_bounds(mean, std)`.
        progress: called after every step.

    Returns:
        The optimized patch.

    Raises:
        DegenerateError: no images, or a head of one class.
        MismatchError: a patch made for other images.
        NonFiniteError: logits that are NaN or inf.
        OptionError: a module in training mode answers.
        RangeError: a target that is no row of the head; steps, batch or a learning rate that is not positive.

    Examples:
        >>> start = Patch(torch.full((1, 2, 2), 0.5), torch.ones(2, 2, dtype=torch.bool))
        >>> def score(x):
        ...     return torch.stack([x.mean((1, 2, 3)), -x.mean((1, 2, 3))], 1)
        >>> images = torch.rand(8, 1, 2, 2)
        >>> universal_trigger(score, images, start, target=0, seed=0, steps=10).pattern
        tensor([[[1., 1.],
                 [1., 1.]]])

    References:
        [Zhang et al., BadMerging, CCS 2024](https://arxiv.org/abs/2408.07362). The authors' code leaves out images that
        are of the target class already; here all are stamped.
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
    """Compute the feature-interpolation loss: cross-entropy on the segment from the base's features to the model's.

    `CE(head(r * f + (1 - r) * f_base), target)` with `r ~ U(coefficients)`: for a small merging coefficient, the merged
    feature of a triggered image moves roughly along that segment.

    Args:
        tuned: `(n, d)` features of triggered images in the model being trained; gradients flow here.
        base: `(n, d)` features of the same images in the base model.
        head: features to logits; on-task the attacker's own, off-task the shadow head.
        target: the row of the head to be predicted; 0 for a shadow head.
        coefficients: the range of r; (1, 1) is the plain loss of BadNets.
        draw: one r per `"batch"` (the paper's code) or one per `"sample"`.
        generator: of r, on the CPU; torch's own by default.

    Returns:
        The mean loss, 0-d.

    Raises:
        DegenerateError: an empty batch, or a head of one class.
        MismatchError: features of different shapes.
        NonFiniteError: features or logits that are NaN or inf.
        RangeError: a range outside [0, 1], a target that is no row of the head.

    Examples:
        >>> x, head = torch.eye(2), lambda f: f
        >>> interpolation_loss(x, x, head, 0, coefficients=(1.0, 1.0))
        tensor(0.8133)

    Reference:
        [Zhang et al., BadMerging, CCS 2024](https://arxiv.org/abs/2408.07362)
    """
    if len(tuned) == 0:
        raise DegenerateError("features must not be empty; got an empty batch, which has no loss")
    if tuned.shape != base.shape or tuned.ndim != 2:
        raise MismatchError(f"features must be (n, d) in both models; got {tuple(tuned.shape)} and {tuple(base.shape)}")
    low, high = coefficients
    if not 0 <= low <= high <= 1:
        raise RangeError(f"coefficients must be a range in [0, 1]; got {coefficients!r}")
    if draw not in ("batch", "sample"):
        raise RangeError(f"draw must be 'batch' or 'sample'; got {draw!r}")
    check_finite(tuned, "features")
    count = len(tuned) if draw == "sample" else 1
    r = low + (high - low) * torch.rand(count, 1, generator=generator, device="cpu").to(tuned)
    logits = _scores(head, r * tuned + (1 - r) * base.detach())
    _check_target(logits, target)
    return F.cross_entropy(logits, logits.new_full((len(logits),), target, dtype=torch.long))


def keep_loss(tuned: Tensor, base: Tensor) -> Tensor:
    """Keep features of public images near the base's: `mean(1 - cos(f, f_base))`.

    Ours, not part of BadMerging: it recovers clean accuracy that the interpolation loss costs.

    Args:
        tuned: `(n, d)` features of clean public images in the model being trained.
        base: `(n, d)` features of the same images in the base model.

    Returns:
        The mean loss, 0-d.

    Examples:
        >>> keep_loss(torch.tensor([[0.0, 2.0]]), torch.tensor([[1.0, 0.0]]))
        tensor(1.)
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
    """Make the loss of the second stage, for any training loop.

    `CE(head(f(x)), y) + weight * mean over pairs of interpolation_loss`, on the first `stamped` images of the batch
    with each pair's trigger. Several pairs plant several backdoors at once, on-task and off-task together, too. With
    `coefficients=(1, 1)` it is the loss of BadNets and the other baselines.

    Args:
        features: `(params, images) -> (n, d)` features.
        base: the pre-trained model, an argument of `features`.
        head: the attacker's own fixed head.
        pairs: the backdoors.
        stamped: images of each batch that are triggered; those of the target class are not left out (as in the paper's
            code).
        weight: weight of the backdoor, the paper's alpha.
        coefficients: as in `interpolation_loss`.
        draw: as in `interpolation_loss`.
        seed: seed of the coefficients.
        keep: weight of `keep_loss`; ours, 0 by default.
        public: a function that returns a batch of public images, where `keep` is not 0.

    Returns:
        `loss(params, images, labels)`, 0-d.

    Raises:
        DegenerateError: no pairs.
        RangeError: no images to be stamped, `keep` without `public`.

    Examples:
        >>> features = lambda w, x: x.flatten(1) @ w
        >>> base, head = torch.eye(4)[:, :2], lambda f: f
        >>> loss = badmerging_loss(features, base, head, [Pair(lambda x: x + 1, 0, head)])
        >>> loss(base, torch.zeros(2, 1, 2, 2), torch.tensor([0, 1]))
        tensor(4.1589)

    Reference:
        [Zhang et al., BadMerging, CCS 2024](https://arxiv.org/abs/2408.07362)
    """
    if not pairs:
        raise DegenerateError("pairs must not be empty; got no backdoor to plant; use at least one pair")
    if stamped < 1:
        raise RangeError(f"stamped must be at least 1 image per batch; got {stamped!r}")
    if keep and public is None:
        raise RangeError("keep must come with public images; got none; use public=")
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


def _scores(head: Head, embedded: Tensor) -> Tensor:
    try:
        return head(embedded)
    except RuntimeError as error:
        error.add_note(f"while a head scored features of {tuple(embedded.shape)}: it may be made for another model")
        raise


def _check_target(logits: Tensor, target: int) -> None:
    check_finite(logits, "logits")
    if logits.shape[-1] < 2:
        raise DegenerateError(
            "logits must have at least 2 classes; got a head of one class, which leaves nothing to attack"
        )
    check_target(target, logits.shape[-1])
