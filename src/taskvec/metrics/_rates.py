"""Accuracy and attack success rate, with the sampling error of one model on one test set.

A model is whatever `predict` calls: the functions pass images to it and count its answers.
"""

import operator
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .._answers import check_finite, check_target, evaluating
from .._engine.names import check_aligned
from .._vectors.checks import check_mapping
from .._vectors.model import Params
from ..errors import DegenerateError, MismatchError, OptionError, RangeError

__all__ = ["Rate", "accuracy", "attack_success_rate", "predictor"]

Predict: TypeAlias = Callable[[Tensor], Tensor]
"""Images `(n, ...)` to logits `(n, classes)` or class indices `(n,)`."""
Trigger: TypeAlias = Callable[[Tensor], Tensor]
"""Images to images, see `attacks.triggers`."""


@dataclass(frozen=True)
class Rate:
    """A number of hits out of n.

    Attributes:
        hits: the number of hits, from 0 to n.
        n: the number of samples, at least 1.

    Raises:
        DegenerateError: n is 0: a rate of no samples has no value.
        RangeError: a negative n, or hits outside 0 to n.

    Examples:
        >>> Rate(8, 10).value
        0.8
        >>> Rate(8, 10)
        0.800 [0.490, 0.943] n=10
    """

    hits: int
    n: int

    def __post_init__(self) -> None:
        if self.n == 0:
            raise DegenerateError("n must be at least 1; got 0; a rate of no samples has no value")
        if not 0 <= self.hits <= self.n:
            raise RangeError(f"hits must be from 0 to n; got {self.hits!r} of {self.n!r}")

    @property
    def value(self) -> float:
        """The fraction, in [0, 1]."""
        return self.hits / self.n

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % Wilson interval: the sampling error of one model on one test set, not the error of a method.

        Seeds differ by more than this, so do not pool it over seeds: see `clustered`.
        """
        z = NormalDist().inv_cdf(0.975)
        p, n = self.value, self.n
        center = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
        return max(0.0, center - half), min(1.0, center + half)

    def __repr__(self) -> str:
        low, high = self.interval
        return f"{self.value:.3f} [{low:.3f}, {high:.3f}] n={self.n}"


def accuracy(predict: Predict, images: Tensor, labels: Tensor, *, batch: int = 512) -> Rate:
    """Count the images that are classified as their label.

    Args:
        predict: images to logits or class indices. It is called without gradients, in batches.
        images: `(n, ...)`.
        labels: `(n,)` integers.
        batch: images per call, at least 1.

    Returns:
        A `Rate`.

    Raises:
        MismatchError: not one label per image, or not one answer per image.
        DegenerateError: no images.
        NonFiniteError: logits that are NaN or inf.
        OptionError: a module in training mode answers.
        RangeError: a batch that is not positive.

    Examples:
        >>> accuracy(lambda x: x, torch.eye(3), torch.tensor([0, 1, 1]))
        0.667 [0.208, 0.939] n=3
    """
    _check_data(images, labels)
    classes, _ = _classes(predict, images, batch)
    return Rate(int((classes == labels.to(classes.device)).sum()), len(labels))


def attack_success_rate(
    predict: Predict, images: Tensor, labels: Tensor, *, target: int, trigger: Trigger, batch: int = 512
) -> Rate:
    """Count the triggered images that are classified as the target class, among those of other classes.

    Images that are misclassified without a trigger, or taken for the target without it, count too: compare with a
    control, as `measure` does.

    Args:
        predict: images to logits or class indices. Logits are better: with class indices the number of classes is not
            known, and the target can only be compared with the labels and answers.
        images: `(n, ...)` in pixel space, before normalization.
        labels: `(n,)` integers.
        target: the target class.
        trigger: images to images.
        batch: images per call, at least 1.

    Returns:
        A `Rate`; its n counts the images of other classes.

    Raises:
        RangeError: a target that is not an integer, is negative, or has no logit; of class indices, one above every
            label and every answer; a batch that is not positive.
        DegenerateError: no images of other classes.
        MismatchError: a trigger that changes the images' shape.
        NonFiniteError: logits that are NaN or inf.
        OptionError: a module in training mode answers.

    Examples:
        >>> flipped = lambda x: x.flip(1)
        >>> x, y = torch.eye(3), torch.arange(3)
        >>> attack_success_rate(lambda x: x, x, y, target=0, trigger=flipped)
        0.500 [0.095, 0.905] n=2
    """
    _check_data(images, labels)
    wanted = _class_index(target)
    others = labels != wanted
    if not bool(others.any()):
        raise DegenerateError(f"labels must hold classes other than the target {wanted}; there is nothing to attack")
    clean = images[others.to(images.device)]
    stamped = trigger(clean)
    if stamped.shape != clean.shape:
        raise MismatchError(f"trigger must keep the shape {tuple(clean.shape)}; got {tuple(stamped.shape)}")
    classes, count = _classes(predict, stamped, batch)
    check_target(wanted, count or 1 + max(int(labels.max()), int(classes.max())))
    return Rate(int((classes == wanted).sum()), len(classes))


def predictor(module: nn.Module) -> Callable[[Params, Tensor], Tensor]:
    """Make `predict(params, inputs)`, which runs one module with the parameters of any model.

    This is `torch.func.functional_call` with names and shapes checked. Gradients reach the parameters; the module's
    own parameters are neither used nor changed.

    Args:
        module: the architecture. Call `.eval()` first: the metrics refuse a module in training mode.

    Returns:
        A function of parameters (a merge or a checkpoint, in memory) and inputs. It swaps the module's parameters
        while it runs, so do not call it from two threads at once.

    Raises:
        OptionError: an argument that is not a module.
        MismatchError: when called: names or shapes that are not the module's.

    Examples:
        >>> predict = predictor(nn.Linear(2, 2).eval())
        >>> params = {"weight": torch.eye(2), "bias": torch.ones(2)}
        >>> predict(params, torch.tensor([[3.0, 4.0]]))
        tensor([[4., 5.]])
    """
    if not isinstance(module, nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise OptionError(f"module must be a torch.nn.Module; got a {type(module).__name__}")
    own: dict[str, Tensor] = module.state_dict(keep_vars=True)

    def predict(params: Params, inputs: Tensor) -> Tensor:
        check_mapping("params", params)
        given = dict(params)
        present = {id(own[name]) for name in given if name in own}  # a tied weight may come under one name only
        wanted = {name: x for name, x in own.items() if name in given or id(x) not in present}
        check_aligned({"the module": wanted, "the parameters": given}, "run the module")
        return functional_call(module, given, (inputs,))

    return predict


def _class_index(target: int) -> int:
    try:
        return operator.index(target)
    except TypeError:
        raise RangeError(f"target must be a class, an integer from 0; got {target!r}") from None


def _check_data(images: Tensor, labels: Tensor) -> None:
    if len(images) == 0:
        raise DegenerateError("images must not be empty; got none to measure on")
    if labels.ndim != 1 or len(labels) != len(images) or labels.is_floating_point():
        raise MismatchError(
            f"labels must be one integer per image; got {tuple(labels.shape)} {labels.dtype} for {len(images)} images"
        )


def _classes(predict: Predict, images: Tensor, batch: int) -> tuple[Tensor, int]:
    """The class of each image, and the number of classes; 0 where `predict` gives class indices."""
    if not batch >= 1:
        raise RangeError(f"batch must be at least 1; got {batch!r}")
    answers: list[Tensor] = []
    count = 0
    with torch.no_grad(), evaluating():
        for start in range(0, len(images), batch):
            part = images[start : start + batch]
            answer = predict(part)
            if len(answer) != len(part) or answer.ndim not in (1, 2):
                raise MismatchError(
                    f"predict must return (n, classes) or (n,) for {len(part)} images; got {tuple(answer.shape)}"
                )
            check_finite(answer, "logits")
            if answer.ndim == 2:
                count = answer.shape[1]
                answer = answer.argmax(1)
            elif answer.is_floating_point():
                raise MismatchError(f"class indices must be integers; got {answer.dtype}; use logits, or .argmax(1)")
            answers.append(answer)
    return torch.cat(answers), count
