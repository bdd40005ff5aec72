"""Merges that learn from unlabelled data: AdaMerging, and representation surgery behind any merge."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from ._errors import DegenerateError, MismatchError, NonFiniteError, RangeError, check_aligned
from ._lazy import specs_of
from ._types import Params
from .vector import TaskVector

__all__ = ["Adapter", "adamerging", "repaired", "surgery"]

Loader: TypeAlias = Callable[[], Iterator[Tensor]]
"""A new pass over a task's unlabelled inputs, batch by batch."""


def adamerging(
    logits: Callable[[Params, Tensor, str], Tensor],
    base: Params,
    vectors: Sequence[TaskVector],
    loaders: Mapping[str, Loader],
    *,
    layerwise: bool = True,
    init: float = 0.3,
    steps: int = 500,
    lr: float = 1e-3,
    clamp: tuple[float, float] | None = (0.0, 1.0),
    progress: Callable[[], None] | None = None,
) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
    """AdaMerging: learn the scaling coefficients by minimising the entropy of the merge's predictions.

    Minimises `sum over tasks of mean_x H(softmax(logits(theta(lambda), x, task)))` over `lambda` by Adam, with
    `theta(lambda)[name] = base[name] + sum_i lambda_i[name] * tau_i[name]`; one coefficient a vector and tensor
    (layer-wise), or one a vector (task-wise).

    Args:
        logits: `(params, inputs, task) -> (n, classes)`, differentiable in the parameters, such as a head behind
            `torch.func.functional_call`.
        base: the pre-trained model, in memory.
        vectors: task vectors, in memory, of the same names.
        loaders: task -> a function that starts a new pass over its unlabelled inputs; each step takes one batch a task.
        layerwise: one coefficient for each tensor of a vector, or one for all of it.
        init: of every coefficient.
        steps: of Adam.
        lr: of Adam.
        clamp: the range that coefficients are clamped to where they are used; None for no clamp.
        progress: called after every step.

    Returns:
        The merged model, and for each vector its coefficients by name.

    Raises:
        DegenerateError: no vectors, no tasks, a loader that yields nothing, a task of one class.
        MismatchError: names or shapes of the vectors differ.
        NonFiniteError: logits that are NaN or inf.

    Example:
        >>> base, v = {"w": torch.zeros(2, 2)}, TaskVector({"w": torch.eye(2)})
        >>> data = {"t": lambda: iter([torch.eye(2)])}
        >>> model, scales = adamerging(lambda p, x, task: x @ p["w"], base, [v], data, steps=5, lr=0.1)
        >>> scales[0]["w"] > 0.3
        True

    Reference:
        Yang et al., AdaMerging, 2023, https://arxiv.org/abs/2310.02575
    """
    if not vectors or not loaders:
        raise DegenerateError("AdaMerging needs at least one vector and one task to look at")
    if not (steps >= 1 and lr > 0):
        raise RangeError(f"steps are at least 1 and lr is positive, not {steps!r} and {lr!r}")
    check_aligned({f"vector {i}": specs_of(v.tensors) for i, v in enumerate(vectors)}, "merge")
    names = list(vectors[0])
    width = len(names) if layerwise else 1
    raw = torch.full((len(vectors), width), init, requires_grad=True, device=vectors[0][names[0]].device)
    optimizer = torch.optim.Adam([raw], lr=lr)
    passes = {task: _endless(task, loader) for task, loader in loaders.items()}
    for _ in range(steps):
        with torch.enable_grad():
            params = _combined(base, vectors, names, _clamped(raw, clamp))
            losses = [_entropy(logits(params, next(batches), task)) for task, batches in passes.items()]
            loss = torch.stack(losses).sum()
        (raw.grad,) = torch.autograd.grad(loss, [raw])
        optimizer.step()  # pyright: ignore[reportUnknownMemberType]
        if progress is not None:
            progress()
    found = _clamped(raw.detach(), clamp)
    with torch.no_grad():
        merged = _combined(base, vectors, names, found)
    rows = found.expand(len(vectors), len(names))
    return merged, [{name: float(rows[i, j]) for j, name in enumerate(names)} for i in range(len(vectors))]


def _clamped(raw: Tensor, clamp: tuple[float, float] | None) -> Tensor:
    return raw if clamp is None else raw.clamp(*clamp)


def _combined(base: Params, vectors: Sequence[TaskVector], names: Sequence[str], scales: Tensor) -> dict[str, Tensor]:
    params = dict(base)
    for i, vector in enumerate(vectors):
        own = scales[i].expand(len(names))
        params = dict(vector.apply(params, {name: own[j] for j, name in enumerate(names)}))
    return params


def _endless(task: str, loader: Loader) -> Iterator[Tensor]:
    while True:
        empty = True
        for batch in loader():
            empty = False
            yield batch
        if empty:
            raise DegenerateError(f"the loader of {task!r} yields nothing")


def _entropy(logits: Tensor) -> Tensor:
    if not bool(logits.isfinite().all()):
        raise NonFiniteError("logits are NaN or inf: the merged model is broken")
    if logits.shape[1] < 2:
        raise DegenerateError("logits of one class have no entropy to learn from")
    return -(logits.softmax(1) * logits.log_softmax(1)).sum(1).mean()


class Adapter(NamedTuple):
    """What surgery learns for one task: features `z` become `z - relu(z down^T) up^T`.

    Attributes:
        down: `(rank, d)`.
        up: `(d, rank)`.
    """

    down: Tensor
    up: Tensor


def repaired(features: Tensor, adapter: Adapter) -> Tensor:
    """Features with a task's adapter applied, `z - relu(z down^T) up^T`.

    Args:
        features: `(n, d)` of the merged model.
        adapter: of `surgery`.

    Raises:
        MismatchError: features of another width.

    Example:
        >>> repaired(torch.tensor([[1.0, -2.0]]), Adapter(torch.eye(2), 0.5 * torch.eye(2)))
        tensor([[ 0.5000, -2.0000]])
    """
    if features.shape[-1] != adapter.down.shape[1]:
        raise MismatchError(f"an adapter for width {adapter.down.shape[1]}, and features of {features.shape[-1]}")
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
    """Representation surgery: a small adapter that brings a task's features back to what its own model made of them.

    Minimises `mean |repaired(merged(x)) - individual(x)|` by Adam over unlabelled inputs. The result is no longer one
    model: each task has an adapter of its own.

    Args:
        merged: inputs to the merged model's features `(n, d)`.
        individual: inputs to the features of the task's own fine-tuned model.
        loader: a function that starts a new pass over unlabelled inputs.
        rank: of the adapter.
        steps: of Adam.
        lr: of Adam.
        seed: of the initial `down`; `up` starts at zero, so that the adapter starts as nothing.
        progress: called after every step.

    Returns:
        An adapter for `repaired`.

    Raises:
        DegenerateError: a loader that yields nothing.
        MismatchError: features of different shapes.
        RangeError: a rank, steps or a learning rate that is not positive.

    Example:
        >>> x = torch.eye(4)
        >>> adapter = surgery(lambda x: x, lambda x: 0.5 * x, lambda: iter([x]), rank=8, steps=200, lr=0.05)
        >>> bool((repaired(x, adapter) - 0.5 * x).abs().mean() < (x - 0.5 * x).abs().mean() / 2)
        True

    Reference:
        Yang et al., Representation Surgery for Multi-Task Model Merging, 2024, https://arxiv.org/abs/2402.02705
    """
    if not (rank >= 1 and steps >= 1 and lr > 0):
        raise RangeError(f"rank, steps and lr are positive, not {rank!r}, {steps!r} and {lr!r}")
    down, up, optimizer = None, None, None
    batches = _endless("the task", loader)
    for _ in range(steps):
        batch = next(batches)
        with torch.no_grad():
            features, aim = merged(batch), individual(batch)
        if features.shape != aim.shape or features.ndim != 2:
            raise MismatchError(f"features are (n, d) for both: {tuple(features.shape)} and {tuple(aim.shape)}")
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


def _fresh_adapter(features: Tensor, rank: int, seed: int) -> tuple[Tensor, Tensor]:
    width = features.shape[1]
    generator = torch.Generator().manual_seed(seed)
    bound = (6 / width) ** 0.5  # Kaiming
    down = (2 * torch.rand(rank, width, generator=generator, device="cpu") - 1) * bound
    return down.to(features).requires_grad_(), features.new_zeros(width, rank).requires_grad_()
