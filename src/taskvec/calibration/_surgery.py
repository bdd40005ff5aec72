"""Representation surgery: an adapter for each task behind a merge."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .._answers import check_finite
from ..errors import MismatchError, RangeError
from ._adamerging import Loader, endless

__all__ = ["Adapter", "repaired", "surgery"]


class Adapter(NamedTuple):
    """The adapter of one task: features `z` become `z - relu(z down^T) up^T`.

    Attributes:
        down: `(rank, d)`.
        up: `(d, rank)`.
    """

    down: Tensor
    up: Tensor


def repaired(features: Tensor, adapter: Adapter) -> Tensor:
    """Apply a task's adapter to features: `z - relu(z down^T) up^T`.

    Args:
        features: `(n, d)` features of the merged model.
        adapter: the result of `surgery`.

    Returns:
        `(n, d)` features.

    Raises:
        MismatchError: features of another width.

    Examples:
        >>> repaired(torch.tensor([[1.0, -2.0]]), Adapter(torch.eye(2), 0.5 * torch.eye(2)))
        tensor([[ 0.5000, -2.0000]])
    """
    if features.shape[-1] != adapter.down.shape[1]:
        raise MismatchError(f"features must be of width {adapter.down.shape[1]}; got {features.shape[-1]}")
    return features - (features @ adapter.down.T).relu() @ adapter.up.T


def surgery(
    merged: Callable[[Tensor], Tensor],
    individual: Callable[[Tensor], Tensor],
    loader: Loader,
    *,
    rank: int = 16,
    steps: int = 500,
    lr: float = 1e-3,
    seed: int = 0,
    progress: Callable[[], None] | None = None,
) -> Adapter:
    """Learn a small adapter that brings a merge's features of a task back to those of the task's own model.

    Minimizes `mean |repaired(merged(x)) - individual(x)|` by Adam over unlabeled inputs. The result is no longer one
    model: each task has its own adapter.

    Args:
        merged: inputs to the merged model's features `(n, d)`.
        individual: inputs to the features of the task's own fine-tuned model.
        loader: a function that starts a new pass over unlabeled inputs.
        rank: rank of the adapter.
        steps: steps of Adam.
        lr: learning rate of Adam.
        seed: seed of the initial `down`; `up` starts at zero, so that the initial adapter changes nothing.
        progress: called after every step.

    Returns:
        An adapter for `repaired`.

    Raises:
        DegenerateError: a loader that yields nothing.
        MismatchError: features of different shapes.
        NonFiniteError: features that are NaN or inf.
        RangeError: a rank, steps or a learning rate that is not positive.

    Examples:
        >>> x = torch.eye(4)
        >>> adapter = surgery(
        ...     lambda x: x, lambda x: 0.5 * x, lambda: iter([x]),
        ...     rank=8, steps=200, lr=0.05,
        ... )
        >>> distance = lambda y: float((y - 0.5 * x).abs().mean())
        >>> distance(repaired(x, adapter)) < distance(x) / 2
        True

    Reference:
        [Yang et al., Representation Surgery for Multi-Task Model Merging, 2024](https://arxiv.org/abs/2402.02705)
    """
    if not (rank >= 1 and steps >= 1 and lr > 0):
        raise RangeError(f"rank, steps and lr must be positive; got {rank!r}, {steps!r} and {lr!r}")
    down, up, optimizer = None, None, None
    batches = endless("the task", loader)
    for _ in range(steps):
        batch = next(batches)
        with torch.no_grad():
            features, aim = merged(batch), individual(batch)
        _check_features(features, aim)
        if down is None or up is None or optimizer is None:
            down, up = _fresh_adapter(features, rank, seed)
            optimizer = torch.optim.Adam([down, up], lr=lr)
        with torch.enable_grad():
            loss = F.l1_loss(repaired(features, Adapter(down, up)), aim)
        down.grad, up.grad = torch.autograd.grad(loss, [down, up])
        optimizer.step()  # pyright: ignore[reportUnknownMemberType]
        if progress is not None:
            progress()
    assert down is not None and up is not None  # noqa: PT018, S101 - steps >= 1
    return Adapter(down.detach(), up.detach())


def _check_features(features: Tensor, aim: Tensor) -> None:
    if features.shape != aim.shape or features.ndim != 2:
        raise MismatchError(
            f"features must be (n, d) in both models; got {tuple(features.shape)} and {tuple(aim.shape)}"
        )
    check_finite(features, "features of the merged model")
    check_finite(aim, "features of the task's own model")


def _fresh_adapter(features: Tensor, rank: int, seed: int) -> tuple[Tensor, Tensor]:
    width = features.shape[1]
    generator = torch.Generator().manual_seed(seed)
    bound = (6 / width) ** 0.5  # Kaiming
    down = (2 * torch.rand(rank, width, generator=generator, device="cpu") - 1) * bound
    return down.to(features).requires_grad_(), features.new_zeros(width, rank).requires_grad_()
