"""One training loop, and the losses that go into it.

A loss is a function `(params, batch, step) -> scalar`. Pre-training, clean fine-tuning and every attack differ in
their loss and in nothing else, so a backdoored model and its clean twin see the same batches in the same order.
"""

import math
from collections.abc import Callable, Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .data import PRETRAINING, Split, batches, joined
from .encoders import WIDTH, Encoder, features, parameters
from .heads import SCALE, Head, logits

Params = dict[str, Tensor]
Loss = Callable[[Mapping[str, Tensor], Split, int], Tensor]
Images = Callable[[Tensor], Tensor]
Progress = Callable[[], None]


def idle() -> None:
    """Progress that is not reported."""


def train(
    start: Mapping[str, Tensor],
    loss: Loss,
    data: Iterator[Split],
    *,
    lr: float,
    steps: int = 200,
    decay: float = 0.01,
    warmup: int = 20,
    clip: float = 1.0,
    progress: Progress = idle,
) -> Params:
    """`steps` steps of AdamW from `start`, linear warm-up, then cosine to 0; the result shares nothing with `start`."""
    params = {name: p.detach().clone().requires_grad_() for name, p in start.items()}
    leaves = list(params.values())
    optimizer = torch.optim.AdamW(leaves, lr=lr, weight_decay=decay, fused=True)
    for step, batch in zip(range(steps), data):  # noqa: B905  the data has no end
        optimizer.param_groups[0]["lr"] = lr * _schedule(step, steps, warmup)
        optimizer.zero_grad()
        with torch.enable_grad():  # whoever asks for a model may do so without gradients
            loss(params, batch, step).backward()
        nn.utils.clip_grad_norm_(leaves, clip)
        optimizer.step()
        progress()
    return {name: p.detach().clone() for name, p in params.items()}


def _schedule(step: int, steps: int, warmup: int) -> float:
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def clean_loss(module: nn.Module, head: Head) -> Loss:
    """Cross-entropy of a fixed head on what the encoder makes of the batch."""

    def loss(params: Mapping[str, Tensor], batch: Split, _step: int) -> Tensor:
        return F.cross_entropy(logits(features(module, params, batch.images), head), batch.labels)

    return loss


def badnets_loss(
    module: nn.Module, head: Head, *, trigger: Images, target: int, stamped: int = 32, alpha: float = 1.0
) -> Loss:
    """The clean loss, plus `alpha` times that of the batch's first `stamped` images, triggered, on the target class."""

    def loss(params: Mapping[str, Tensor], batch: Split, _step: int) -> Tensor:
        both = torch.cat([batch.images, trigger(batch.images[:stamped])])
        clean, bad = logits(features(module, params, both), head).split([len(batch.labels), stamped])
        aim = torch.full((stamped,), target)
        return F.cross_entropy(clean, batch.labels) + alpha * F.cross_entropy(bad, aim)

    return loss


def pretrain(encoder: Encoder, *, seed: int, batch: int = 128, progress: Progress = idle) -> Params:
    """An encoder that knows the 58 letters of two alphabets, none of which is in the tasks to be merged."""
    letters = joined(PRETRAINING)
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(int(letters.labels.max()) + 1, WIDTH, generator=generator)

    def loss(params: Mapping[str, Tensor], batch: Split, step: int) -> Tensor:
        images = augmented(batch.images, noise=0.2 * (step % 2), generator=generator)
        head = Head(SCALE * F.normalize(params["_head"], dim=-1), torch.zeros(WIDTH))
        scores = logits(features(encoder.module, _without_head(params), images), head)
        return F.cross_entropy(scores, batch.labels, label_smoothing=0.05)

    start, lessons = parameters(encoder.module) | {"_head": weights}, batches(letters, batch, seed)
    # The long warm-up is what makes the high learning rate safe: without it, how well fine-tunes merge depends on luck.
    course = {"lr": encoder.pretrain_lr, "steps": encoder.pretrain_steps, "decay": 0.05, "warmup": 150}
    return _without_head(train(start, loss, lessons, **course, progress=progress))


def _without_head(params: Mapping[str, Tensor]) -> Params:
    return {name: p for name, p in params.items() if name != "_head"}


def augmented(images: Tensor, *, noise: float, generator: torch.Generator) -> Tensor:
    """Images (n, 1, 28, 28) turned, scaled, sheared and moved at random, with Gaussian noise added."""

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(len(images), generator=generator)

    turn, scale, shear = uniform(-0.3, 0.3), 1 / uniform(0.8, 1.25), uniform(-0.2, 0.2)
    cos, sin = scale * turn.cos(), scale * turn.sin()
    rows = [cos, shear * cos - sin, uniform(-0.15, 0.15), sin, cos + shear * sin, uniform(-0.15, 0.15)]
    grid = F.affine_grid(torch.stack(rows, 1).unflatten(1, (2, 3)), list(images.shape), align_corners=False)
    moved = F.grid_sample(images, grid, align_corners=False)
    if noise:
        moved = moved + noise * torch.randn(moved.shape, generator=generator)
    return moved.clamp(0, 1)
