"""AdaMerging: scaling coefficients that are learned from unlabelled data."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from .._engine.names import check_aligned
from .._vectors.model import Params
from .._vectors.vector import TaskVector
from ..errors import DegenerateError, NonFiniteError, RangeError

__all__ = ["adamerging"]

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

    Examples:
        >>> base, v = {"w": torch.zeros(2, 2)}, TaskVector({"w": torch.eye(2)})
        >>> data = {"t": lambda: iter([torch.eye(2)])}
        >>> model, scales = adamerging(lambda p, x, task: x @ p["w"], base, [v], data, steps=5, lr=0.1)
        >>> scales[0]["w"] > 0.3
        True

    References:
        [Yang et al., AdaMerging, 2023](https://arxiv.org/abs/2310.02575)
    """
    if not vectors or not loaders:
        raise DegenerateError("AdaMerging needs at least one vector and one task to look at")
    if not (steps >= 1 and lr > 0):
        raise RangeError(f"steps are at least 1 and lr is positive, not {steps!r} and {lr!r}")
    check_aligned({f"vector {i}": v.source.specs for i, v in enumerate(vectors)}, "merge")
    names = list(vectors[0])
    width = len(names) if layerwise else 1
    raw = torch.full((len(vectors), width), init, requires_grad=True, device=vectors[0][names[0]].device)
    optimizer = torch.optim.Adam([raw], lr=lr)
    passes = {task: endless(task, loader) for task, loader in loaders.items()}
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


def endless(task: str, loader: Loader) -> Iterator[Tensor]:
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
