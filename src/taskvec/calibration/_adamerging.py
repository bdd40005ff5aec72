"""AdaMerging: scaling coefficients learned from unlabeled data."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from .._answers import check_finite
from .._engine.names import check_aligned
from .._vectors.checks import check_mapping, checked_vectors
from .._vectors.model import Params
from .._vectors.vector import TaskVector
from ..errors import DegenerateError, RangeError

__all__ = ["adamerging"]

Loader: TypeAlias = Callable[[], Iterator[Tensor]]
"""A new pass over a task's unlabeled inputs, batch by batch."""


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
    """Learn the scaling coefficients of a merge by minimizing the entropy of its predictions (AdaMerging).

    Minimizes `sum over tasks of mean_x H(softmax(logits(theta(lambda), x, task)))` over `lambda` by Adam, with
    `theta(lambda)[name] = base[name] + sum_i lambda_i[name] * tau_i[name]`; one coefficient per vector and tensor
    (layer-wise), or one per vector (task-wise).

    Args:
        logits: `(params, inputs, task) -> (n, classes)`, differentiable in the parameters, such as a head behind
            `metrics.predictor`.
        base: the pre-trained model, in memory.
        vectors: task vectors, in memory, with the same names.
        loaders: task -> a function that starts a new pass over its unlabeled inputs; each step takes one batch per
            task.
        layerwise: one coefficient for each tensor of a vector, or one for all of them.
        init: the initial value of every coefficient.
        steps: steps of Adam.
        lr: learning rate of Adam.
        clamp: the range that coefficients are clamped to where they are used; None for no clamp.
        progress: called after every step.

    Returns:
        The merged model, and for each vector its coefficients by name.

    Raises:
        DegenerateError: no vectors, no tasks, a loader that yields nothing, a task of one class.
        MismatchError: names or shapes of the vectors differ.
        NonFiniteError: logits that are NaN or inf.
        OptionError: an argument that is not a list of task vectors.
        RangeError: steps or a learning rate that is not positive.

    Examples:
        >>> base, v = {"w": torch.zeros(2, 2)}, TaskVector({"w": torch.eye(2)})
        >>> data = {"t": lambda: iter([torch.eye(2)])}
        >>> logits = lambda params, x, task: x @ params["w"]
        >>> model, scales = adamerging(logits, base, [v], data, steps=5, lr=0.1)
        >>> scales[0]["w"] > 0.3
        True

    Reference:
        [Yang et al., AdaMerging, 2023](https://arxiv.org/abs/2310.02575)
    """
    check_mapping("base", base)
    given = checked_vectors("vectors", vectors)
    if not given or not loaders:
        raise DegenerateError(
            f"vectors and loaders must not be empty; got {len(given)} vectors and {len(loaders)} loaders"
        )
    if not (steps >= 1 and lr > 0):
        raise RangeError(f"steps must be at least 1 and lr positive; got {steps!r} and {lr!r}")
    check_aligned({f"vector {i}": v.source.specs for i, v in enumerate(given)}, "merge")
    names = list(given[0])
    width = len(names) if layerwise else 1
    raw = torch.full((len(given), width), init, requires_grad=True, device=given[0][names[0]].device)
    optimizer = torch.optim.Adam([raw], lr=lr)
    passes = {task: endless(task, loader) for task, loader in loaders.items()}
    for _ in range(steps):
        with torch.enable_grad():
            params = _combined(base, given, names, _clamped(raw, clamp))
            losses = [_entropy(logits(params, next(batches), task)) for task, batches in passes.items()]
            loss = torch.stack(losses).sum()
        (raw.grad,) = torch.autograd.grad(loss, [raw])
        optimizer.step()  # pyright: ignore[reportUnknownMemberType]
        if progress is not None:
            progress()
    found = _clamped(raw.detach(), clamp)
    with torch.no_grad():
        merged = _combined(base, given, names, found)
    rows = found.expand(len(given), len(names))
    return merged, [{name: float(rows[i, j]) for j, name in enumerate(names)} for i in range(len(given))]


def endless(task: str, loader: Loader) -> Iterator[Tensor]:
    """Batch after batch, pass after pass."""
    while True:
        empty = True
        for batch in loader():
            empty = False
            yield batch
        if empty:
            raise DegenerateError(f"the loader of {task!r} must yield batches; got a pass without any")


def _clamped(raw: Tensor, clamp: tuple[float, float] | None) -> Tensor:
    return raw if clamp is None else raw.clamp(*clamp)


def _combined(base: Params, vectors: Sequence[TaskVector], names: Sequence[str], scales: Tensor) -> dict[str, Tensor]:
    params = dict(base)
    for i, vector in enumerate(vectors):
        own = scales[i].expand(len(names))
        params = dict(vector.apply(params, {name: own[j] for j, name in enumerate(names)}))
    return params


def _entropy(logits: Tensor) -> Tensor:
    check_finite(logits, "logits")
    if logits.shape[1] < 2:
        raise DegenerateError("logits must have at least 2 classes; got 1 class, which has no entropy to learn from")
    return -(logits.softmax(1) * logits.log_softmax(1)).sum(1).mean()
