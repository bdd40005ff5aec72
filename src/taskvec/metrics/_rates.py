"""Accuracies and attack success rates.

A model is whatever `predict` takes: these functions give it images and count its answers.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import NormalDist
from typing import TypeAlias

import torch
from torch import Tensor, nn

from .._answers import evaluating
from ..errors import DegenerateError, MismatchError, NonFiniteError, RangeError

__all__ = ["Rate", "accuracy", "attack_success_rate", "predictor"]

Predict: TypeAlias = Callable[[Tensor], Tensor]
"""Images `(n, ...)` to logits `(n, classes)` or class indices `(n,)`."""


Trigger: TypeAlias = Callable[[Tensor], Tensor]
"""Images to images, see `attacks.triggers`."""


Data: TypeAlias = tuple[Tensor, Tensor]
"""Images `(n, ...)` and labels `(n,)`."""


@dataclass(frozen=True)
class Rate:
    """So many out of so many.

    Attributes:
        hits: how many.
        n: out of how many.

    Raises:
        DegenerateError: out of none.
        RangeError: fewer hits than none, or more than there are.
    """

    hits: int
    n: int

    def __post_init__(self) -> None:
        if self.n < 1:
            raise DegenerateError(f"a rate must be out of at least one; got {self.hits} out of {self.n}")
        if not 0 <= self.hits <= self.n:
            raise RangeError(f"hits must be from 0 to n; got {self.hits} out of {self.n}")

    @property
    def value(self) -> float:
        """The fraction, in [0, 1]."""
        return self.hits / self.n

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % Wilson interval: the sampling error of this one model on this test set, not of the method.

        Seeds differ by more, so it is never pooled over them.
        """
        z = NormalDist().inv_cdf(0.975)
        p, n = self.value, self.n
        centre = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
        return max(0.0, centre - half), min(1.0, centre + half)

    def __repr__(self) -> str:
        low, high = self.interval
        return f"{self.value:.3f} [{low:.3f}, {high:.3f}] n={self.n}"


def accuracy(predict: Predict, images: Tensor, labels: Tensor, *, batch: int = 512) -> Rate:
    """The share of images classified as their label.

    Args:
        predict: images to logits or class indices. Called without gradients, in batches.
        images: `(n, ...)`.
        labels: `(n,)` integers.
        batch: images a call.

    Returns:
        A `Rate`.

    Raises:
        MismatchError: not one label an image, not one answer an image.
        DegenerateError: no images.
        NonFiniteError: logits that are NaN or inf.
        OptionError: a module in training mode answers.

    Examples:
        >>> accuracy(lambda x: x, torch.eye(3), torch.tensor([0, 1, 1]))
        0.667 [0.208, 0.939] n=3
    """
    _check_data(images, labels)
    classes = _classes(predict, images, batch)
    return Rate(int((classes == labels.to(classes.device)).sum()), len(labels))


def attack_success_rate(
    predict: Predict, images: Tensor, labels: Tensor, *, target: int, trigger: Trigger, batch: int = 512
) -> Rate:
    """The share of triggered images classified as the target, of those whose true label is another.

    Images already misclassified, or taken for the target without a trigger, count too: compare with a control.

    Args:
        predict: images to logits or class indices.
        images: `(n, ...)` in pixel space, before normalisation.
        labels: `(n,)` integers.
        target: the target class.
        trigger: images to images.
        batch: images a call.

    Returns:
        A `Rate`; its n counts the images of other classes.

    Raises:
        RangeError: a target that is no class.
        DegenerateError: no images of other classes.
        MismatchError: a trigger that changes the images' shape.
        OptionError: a module in training mode answers.

    Examples:
        >>> attack_success_rate(lambda x: x, torch.eye(3), torch.arange(3), target=0, trigger=lambda x: x.flip(1))
        0.500 [0.095, 0.905] n=2
    """
    _check_data(images, labels)
    check_target(target)
    others = labels != target
    if not bool(others.any()):
        raise DegenerateError(f"every image is of the target class {target}: there is nothing to attack")
    clean = images[others.to(images.device)]
    stamped = trigger(clean)
    if stamped.shape != clean.shape:
        raise MismatchError(f"the trigger made images of {tuple(stamped.shape)} out of {tuple(clean.shape)}")
    classes = _classes(predict, stamped, batch, target)
    known = max(int(labels.max()), int(classes.max()))
    if target > known:
        raise RangeError(f"target must be a class; got {target}, and the largest label or answer is {known}")
    return Rate(int((classes == target).sum()), len(classes))


def check_target(target: int) -> None:
    """Refuse a target that is not a class index."""
    if isinstance(target, bool) or not isinstance(target, int) or target < 0:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise RangeError(f"target must be a class index, at least 0; got {target!r}")


def predictor(module: nn.Module) -> Callable[[Mapping[str, Tensor], Tensor], Tensor]:
    """Make a function of parameters and inputs from a module.

    `predict(params, inputs)` runs the module with these parameters and buffers in place of its own; what a mapping does
    not have, the module's own stands for. The module is in evaluation mode from then on.

    Args:
        module: a module; called with one argument, as `module(inputs)`.

    Returns:
        `predict(params, inputs)`, for `partial(predict, model)` in `accuracy` and `attack_success_rate`.

    Examples:
        >>> from functools import partial
        >>> module = nn.Linear(2, 2)
        >>> predict = predictor(module)
        >>> model = {"weight": torch.eye(2), "bias": torch.zeros(2)}
        >>> accuracy(partial(predict, model), torch.eye(2), torch.tensor([0, 1])).value
        1.0
    """
    module.eval()

    def predict(params: Mapping[str, Tensor], inputs: Tensor) -> Tensor:
        return torch.func.functional_call(module, dict(params), (inputs,))

    return predict


def _check_data(images: Tensor, labels: Tensor) -> None:
    if len(images) == 0:
        raise DegenerateError("no images to measure on")
    if labels.ndim != 1 or len(labels) != len(images) or labels.is_floating_point():
        raise MismatchError(
            f"labels are one integer an image: {len(images)} images, labels {tuple(labels.shape)} {labels.dtype}"
        )


def _classes(predict: Predict, images: Tensor, batch: int, target: int | None = None) -> Tensor:
    if batch < 1:
        raise RangeError(f"batch must be at least 1; got {batch!r}")
    answers: list[Tensor] = []
    with torch.no_grad(), evaluating():
        for start in range(0, len(images), batch):
            part = images[start : start + batch]
            answer = predict(part)
            if len(answer) != len(part) or answer.ndim not in (1, 2):
                raise MismatchError(f"predict returned {tuple(answer.shape)} for {len(part)} images")
            if answer.ndim == 2:
                _check_logits(answer, target)
                answer = answer.argmax(1)
            elif answer.is_floating_point():
                raise MismatchError(
                    f"predict must return logits (n, classes) or integers (n,); got {answer.dtype} (n,)"
                )
            answers.append(answer)
    return torch.cat(answers)


def _check_logits(logits: Tensor, target: int | None) -> None:
    if not bool(logits.isfinite().all()):
        raise NonFiniteError("logits are NaN or inf: the model is broken, and its accuracy would mean nothing")
    if target is not None and not 0 <= target < logits.shape[1]:
        raise RangeError(f"target class {target} is not one of {logits.shape[1]} classes")
