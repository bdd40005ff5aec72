"""Triggers found by gradients: a patch whose pixels minimize a loss, for a frozen model.

`universal_trigger` is one such loss, TrojanNN's another; yours is any function of triggered images.
"""

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from .._answers import evaluating
from ..errors import DegenerateError, MismatchError, NonFiniteError, RangeError
from .triggers import Patch

__all__ = ["most_connected", "optimise_patch", "scalar_bounds", "trojan_trigger"]

Bounds: TypeAlias = tuple[float | Tensor, float | Tensor]
"""Smallest and largest pixel value, numbers or `(C, 1, 1)` tensors."""
Progress: TypeAlias = Callable[[], None]


def optimise_patch(
    loss: Callable[[Tensor], Tensor],
    images: Tensor,
    start: Patch,
    *,
    seed: int,
    steps: int = 100,
    lr: float = 0.2,
    batch: int = 64,
    bounds: Bounds = (0.0, 1.0),
    progress: Progress | None = None,
) -> Patch:
    """Minimize a loss of triggered images over a patch's pixels.

    Adam on `loss(where(mask, pattern, x))` for batches x, the pixels clamped after every step.

    Args:
        loss: triggered images `(n, C, H, W)` to a 0-d loss, differentiable in the images.
        images: `(m, C, H, W)` in pixel space.
        start: the initial patch; its mask stays, and only pixels under the mask change.
        seed: seed of the order of the images: shuffled passes over all of them.
        steps: optimizer steps.
        lr: learning rate of Adam, in pixel units.
        batch: images per step.
        bounds: smallest and largest pixel value, numbers or `(C, 1, 1)` tensors; see `scalar_bounds`.
        progress: called after every step.

    Returns:
        The optimized patch.

    Raises:
        DegenerateError: no images.
        MismatchError: a patch made for other images.
        NonFiniteError: a loss that is NaN or inf.
        OptionError: a module in training mode runs.
        RangeError: steps, batch or a learning rate that is not positive.

    Examples:
        >>> start = Patch(torch.zeros(1, 1, 2), torch.tensor([[True, False]]))
        >>> images = torch.zeros(4, 1, 1, 2)
        >>> optimise_patch(lambda x: -x.sum(), images, start, seed=0, steps=10).pattern
        tensor([[[1., 0.]]])
    """
    if len(images) == 0:
        raise DegenerateError("images must not be empty; got no images to optimize a trigger on")
    if images.shape[1:] != start.pattern.shape:
        raise MismatchError(
            f"images must be {tuple(start.pattern.shape)}, as the patch is for; got {tuple(images.shape[1:])}"
        )
    if not (steps >= 1 and batch >= 1 and lr > 0):
        raise RangeError(f"steps, batch and lr must be positive; got {steps!r}, {batch!r} and {lr!r}")
    mask = start.mask.to(images.device)
    pattern = start.pattern.to(images).clone().requires_grad_()
    low, high = (_bound(value, pattern) for value in bounds)
    optimizer = torch.optim.Adam([pattern], lr=lr)
    for rows in _batches(len(images), batch, steps, seed):
        with torch.enable_grad(), evaluating():
            value = loss(torch.where(mask, pattern, images[rows.to(images.device)]))
        if not bool(value.detach().isfinite()):
            raise NonFiniteError("the loss of the triggered images must be finite; got NaN or inf: the model is broken")
        (pattern.grad,) = torch.autograd.grad(value, [pattern])
        optimizer.step()  # pyright: ignore[reportUnknownMemberType]
        with torch.no_grad():
            pattern.copy_(torch.minimum(torch.maximum(pattern, low), high))
        if progress is not None:
            progress()
    return Patch(pattern.detach() * mask, start.mask)


def scalar_bounds(mean: Sequence[float], std: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Compute the pixel bounds that BadMerging's code enforces: one range in normalized space for all channels.

    `[min_c (0 - mean_c) / std_c, max_c (1 - mean_c) / std_c]`, converted back to pixels channel by channel. The bounds
    leave the valid pixels, so the patch is not a printable image; they are offered for comparison.

    Args:
        mean: mean of each channel, as in the model's normalization.
        std: standard deviation of each channel.

    Returns:
        Smallest and largest pixel value of each channel, `(C, 1, 1)` each.

    Examples:
        >>> low, high = scalar_bounds([0.5, 0.2], [0.25, 0.1])
        >>> low.flatten(), high.flatten()
        (tensor([0., 0.]), tensor([2.5000, 1.0000]))
    """
    centre, spread = torch.tensor(mean), torch.tensor(std)
    low, high = ((0 - centre) / spread).min(), ((1 - centre) / spread).max()
    return (centre + low * spread).reshape(-1, 1, 1), (centre + high * spread).reshape(-1, 1, 1)


def most_connected(weight: Tensor, count: int) -> Tensor:
    """Choose the outputs of a linear map with the largest `sum_j |W[i, j]|`: TrojanNN's choice of neurons.

    Args:
        weight: `(out, in)`.
        count: number of outputs.

    Returns:
        `(count,)` indices, the most connected first.

    Raises:
        MismatchError: a weight that is not a matrix.
        RangeError: a count above the number of outputs, or below 1.

    Examples:
        >>> most_connected(torch.tensor([[1.0, -1.0], [0.5, 0.0], [0.0, 3.0]]), 2)
        tensor([2, 0])

    Reference:
        Liu et al., Trojaning Attack on Neural Networks, NDSS 2018
    """
    if weight.ndim != 2:
        raise MismatchError(f"weight must be (out, in); got {tuple(weight.shape)}")
    if not 1 <= count <= len(weight):
        raise RangeError(f"count must be from 1 to the {len(weight)} outputs; got {count!r}")
    return weight.detach().abs().sum(1).argsort(descending=True, stable=True)[:count]


def trojan_trigger(
    activations: Callable[[Tensor], Tensor],
    images: Tensor,
    start: Patch,
    *,
    neurons: Tensor,
    aim: float,
    seed: int,
    steps: int = 100,
    lr: float = 0.2,
    batch: int = 64,
    bounds: Bounds = (0.0, 1.0),
    progress: Progress | None = None,
) -> Patch:
    """Optimize a patch that excites chosen neurons of a frozen model (TrojanNN).

    Minimizes the mean of `(activations(x)[:, neurons] - aim)^2` over triggered images; the backdoor is then trained
    with the plain loss. Our reading: over batches of images, where the paper takes one blank image; give one image for
    that.

    Args:
        activations: images `(n, C, H, W)` to the activations `(n, d)` of a layer.
        images: `(m, C, H, W)` in pixel space.
        start: the initial patch.
        neurons: indices of the activations to excite, see `most_connected`.
        aim: the value that they are to reach.
        seed: seed of the order of the images.
        steps: optimizer steps.
        lr: learning rate of Adam, in pixel units.
        batch: images per step.
        bounds: as in `optimise_patch`.
        progress: called after every step.

    Returns:
        The optimized patch.

    Raises:
        DegenerateError: no neurons, no images.
        MismatchError: activations that are not `(n, d)`, a patch made for other images.
        NonFiniteError: activations that are NaN or inf.
        OptionError: a module in training mode answers.
        RangeError: a neuron that does not exist; steps, batch or a learning rate that is not positive.

    Examples:
        >>> start = Patch(torch.zeros(1, 1, 2), torch.tensor([[True, False]]))
        >>> images, neurons = torch.zeros(4, 1, 1, 2), torch.tensor([0])
        >>> found = trojan_trigger(
        ...     lambda x: x.flatten(1), images, start,
        ...     neurons=neurons, aim=1.0, seed=0, steps=40,
        ... )
        >>> bool(found.pattern[0, 0, 0] > 0.9)
        True

    Reference:
        Liu et al., Trojaning Attack on Neural Networks, NDSS 2018
    """
    if neurons.numel() == 0:
        raise DegenerateError("neurons must not be empty; got no neurons to excite")

    def loss(triggered: Tensor) -> Tensor:
        found = activations(triggered)
        if found.ndim != 2:
            raise MismatchError(f"activations must be (n, d); got {tuple(found.shape)}")
        if int(neurons.min()) < 0 or int(neurons.max()) >= found.shape[1]:
            raise RangeError(
                f"neurons must be from 0 to {found.shape[1] - 1}; got {int(neurons.min())} to {int(neurons.max())}"
            )
        return (found[:, neurons.to(found.device)] - aim).square().mean()

    return optimise_patch(
        loss, images, start, seed=seed, steps=steps, lr=lr, batch=batch, bounds=bounds, progress=progress
    )


def _batches(n: int, batch: int, steps: int, seed: int) -> list[Tensor]:
    """Rows of each step: shuffled passes over all of them."""
    generator = torch.Generator().manual_seed(seed)
    needed = -(-steps * batch // n)
    order = torch.cat([torch.randperm(n, generator=generator, device="cpu") for _ in range(needed)])
    return [order[i * batch : (i + 1) * batch] for i in range(steps)]


def _bound(value: float | Tensor, like: Tensor) -> Tensor:
    return value.to(like) if isinstance(value, Tensor) else like.new_full((), value)
