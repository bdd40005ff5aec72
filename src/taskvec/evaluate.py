"""What attacks and defences do, measured with their controls: docs/protocol.md as functions.

A model is whatever your `predict` takes: these functions hand it images and count what comes back.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import NormalDist
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor, nn

from ._errors import DegenerateError, MismatchError, NonFiniteError, RangeError
from ._modes import evaluating
from .backdoor import BackdoorVector

__all__ = [
    "Measurement",
    "Rate",
    "Roc",
    "accuracy",
    "attack_success_rate",
    "measure",
    "recalibrate",
    "roc",
    "sweep",
    "transfer_matrix",
]

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)

Model = TypeVar("Model")
Score = TypeVar("Score")
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
    """

    hits: int
    n: int

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

    Example:
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

    Example:
        >>> attack_success_rate(lambda x: x, torch.eye(3), torch.arange(3), target=0, trigger=lambda x: x.flip(1))
        0.500 [0.095, 0.905] n=2
    """
    _check_data(images, labels)
    others = labels != target
    if not bool(others.any()):
        raise DegenerateError(f"every image is of the target class {target}: there is nothing to attack")
    clean = images[others.to(images.device)]
    stamped = trigger(clean)
    if stamped.shape != clean.shape:
        raise MismatchError(f"the trigger made images of {tuple(stamped.shape)} out of {tuple(clean.shape)}")
    classes = _classes(predict, stamped, batch, target)
    return Rate(int((classes == target).sum()), len(classes))


@dataclass(frozen=True, repr=False)
class Measurement:
    """One row: what a merge with a backdoored member does, and what the same trigger does without the backdoor.

    Attributes:
        clean_accuracy: task -> accuracy of the merge with the clean twin in the attacker's place.
        accuracy: task -> accuracy of the merge with the backdoored member.
        asr: attack success rate of the merge with the backdoored member.
        on_base: the same trigger on the base model.
        on_clean: the same trigger on the clean single model.
        on_clean_merge: the same trigger on the all-clean merge.
        target: the target class.
        attacked: the attacked task.
    """

    clean_accuracy: Mapping[str, Rate]
    accuracy: Mapping[str, Rate]
    asr: Rate
    on_base: Rate
    on_clean: Rate
    on_clean_merge: Rate
    target: int
    attacked: str

    @property
    def ca(self) -> float:
        """CA: the mean clean accuracy over the tasks, of the all-clean merge."""
        return _mean([rate.value for rate in self.clean_accuracy.values()])

    @property
    def ba(self) -> float:
        """BA: the mean clean accuracy over the tasks, with the backdoored member."""
        return _mean([rate.value for rate in self.accuracy.values()])

    @property
    def gain(self) -> float:
        """What the backdoor adds to the trigger: ASR minus the same on the all-clean merge."""
        return self.asr.value - self.on_clean_merge.value

    def __repr__(self) -> str:
        return (
            f"Measurement({self.attacked!r}, target {self.target}: ASR {self.asr!r}, gain {self.gain:+.3f}; the same "
            f"trigger without the backdoor: base {self.on_base.value:.3f}, clean model {self.on_clean.value:.3f}, "
            f"clean merge {self.on_clean_merge.value:.3f}; accuracy {self.ba:.3f} (clean merge {self.ca:.3f}, "
            f"{len(self.accuracy)} tasks))"
        )


def measure(
    predict: Callable[[Model, Tensor, str], Tensor],
    tasks: Mapping[str, Data],
    *,
    model: Model,
    clean_merge: Model,
    clean: Model,
    base: Model,
    attacked: str,
    target: int,
    trigger: Trigger,
    batch: int = 512,
) -> Measurement:
    """Measure a merge with a backdoored member, together with every control.

    Args:
        predict: `(model, images, task) -> logits` or class indices.
        tasks: name -> images and labels of the tasks in the merge.
        model: the merge with the backdoored member, defended or not.
        clean_merge: the same merge, defended in the same way, with the clean twin in the attacker's place.
        clean: the attacker's clean twin alone.
        base: the pre-trained model.
        attacked: the task whose images are triggered.
        target: the target class.
        trigger: images to images, in pixel space.
        batch: images a call.

    Returns:
        A `Measurement`.

    Raises:
        MismatchError: the attacked task is not among the tasks.

    Example:
        >>> row = measure(
        ...     lambda bias, x, task: x + bias, {"t": (torch.eye(3), torch.arange(3))},
        ...     model=torch.tensor([2.0, 0.0, 0.0]), clean_merge=0, clean=0, base=0,
        ...     attacked="t", target=0, trigger=lambda x: x * 0.5,
        ... )
        >>> row.asr.value, row.on_clean_merge.value, row.gain
        (1.0, 0.0, 1.0)
    """
    if attacked not in tasks:
        raise MismatchError(f"the attacked task {attacked!r} is not among {list(tasks)}")

    def accuracies(own: Model) -> dict[str, Rate]:
        return {
            task: accuracy(partial(_answer, predict, own, task), *data, batch=batch) for task, data in tasks.items()
        }

    def rate(own: Model) -> Rate:
        return attack_success_rate(
            partial(_answer, predict, own, attacked), *tasks[attacked], target=target, trigger=trigger, batch=batch
        )

    return Measurement(
        clean_accuracy=accuracies(clean_merge),
        accuracy=accuracies(model),
        asr=rate(model),
        on_base=rate(base),
        on_clean=rate(clean),
        on_clean_merge=rate(clean_merge),
        target=target,
        attacked=attacked,
    )


def sweep(
    scales: Iterable[float], model_at: Callable[[float], Model], score: Callable[[Model], Score]
) -> dict[float, Score]:
    """Score a family of models over a scale: an injection curve, a defence's front.

    Args:
        scales: the values; one model is in memory at a time.
        model_at: scale -> model, such as `lambda s: bv.inject(clean, s)`.
        score: model -> anything.

    Returns:
        scale -> score, in the order given.

    Raises:
        DegenerateError: no scales.

    Example:
        >>> sweep([0.0, 0.5, 1.0], lambda s: s, lambda model: model**2)
        {0.0: 0.0, 0.5: 0.25, 1.0: 1.0}
    """
    found = {scale: score(model_at(scale)) for scale in scales}
    if not found:
        raise DegenerateError("no scales to sweep over")
    return found


def transfer_matrix(
    vectors: Sequence[BackdoorVector],
    clean: Sequence[Mapping[str, Tensor]],
    rates: Sequence[Callable[[Mapping[str, Tensor]], float]],
    scale: float = 1.0,
) -> Tensor:
    """What each backdoor vector does for each trigger: `rates[j](clean[j] + scale * vectors[i])`.

    Args:
        vectors: n backdoor vectors.
        clean: m clean models, one for each trigger: of the trigger's task, and not a twin of any of the vectors.
        rates: m functions, a model's attack success rate on one trigger, such as
            `lambda model: attack_success_rate(partial(predict, model), images, labels, target=1, trigger=w).value`.
        scale: the coefficient of the vectors.

    Returns:
        `(n, m)` float64: row i is vector i, column j trigger j.

    Raises:
        DegenerateError: no vectors, or no triggers.
        MismatchError: not one clean model a trigger, or other names or shapes.

    Example:
        >>> vectors = [BackdoorVector({"w": torch.tensor(x)}) for x in ([1.0, 0.0], [0.0, 1.0])]
        >>> model = {"w": torch.zeros(2)}
        >>> transfer_matrix(vectors, [model, model], [lambda m: float(m["w"][0]), lambda m: float(m["w"][1])], 0.5)
        tensor([[0.5000, 0.0000],
                [0.0000, 0.5000]], dtype=torch.float64)
    """
    if not vectors or not rates:
        raise DegenerateError(f"{len(vectors)} vectors on {len(rates)} triggers: there is nothing to transfer")
    if len(clean) != len(rates):
        raise MismatchError(f"{len(clean)} clean models for {len(rates)} triggers; give one for each")
    rows = [[rate(vector.inject(model, scale)) for model, rate in zip(clean, rates, strict=True)] for vector in vectors]
    return torch.tensor(rows, dtype=torch.float64)


@dataclass(frozen=True)
class Roc:
    """How well a number tells positives from negatives.

    Attributes:
        area: under the ROC: the chance that a positive's number is above a negative's, ties counting half.
        found: the share of positives above all but the allowed share of negatives.
    """

    area: float
    found: float


def roc(positives: Sequence[float], negatives: Sequence[float], *, false_positives: float = 0.05) -> Roc:
    """How well a number tells two kinds apart, high for positives: area under the ROC, and one point of it.

    Args:
        positives: the number for each backdoored model.
        negatives: for each clean one.
        false_positives: the share of negatives that may be taken for positives, in [0, 1).

    Returns:
        A `Roc`.

    Raises:
        DegenerateError: none of either.
        RangeError: a share outside [0, 1).

    Example:
        >>> roc([0.9, 0.4, 0.8], [0.1, 0.2, 0.3, 0.5])
        Roc(area=0.9166666666666666, found=0.6666666666666666)
    """
    if not positives or not negatives:
        raise DegenerateError(f"{len(positives)} positives against {len(negatives)} negatives")
    if not 0 <= false_positives < 1:
        raise RangeError(f"false_positives is a share in [0, 1), not {false_positives!r}")
    above = [(p > n) + (p == n) / 2 for p in positives for n in negatives]
    limit = sorted(negatives, reverse=True)[int(false_positives * len(negatives))]  # so many may lie above it
    return Roc(_mean(above), _mean([float(p > limit) for p in positives]))


def recalibrate(module: nn.Module, batches: Iterable[Tensor]) -> nn.Module:
    """Measure BatchNorm's statistics anew, after a merge: they are no part of a task vector.

    Args:
        module: a module with merged weights, changed in place.
        batches: inputs of the module; unlabelled validation images do.

    Returns:
        The module, in the mode it was in.

    Raises:
        DegenerateError: no batches.

    Example:
        >>> norm = recalibrate(nn.BatchNorm1d(1), [torch.tensor([[1.0], [3.0]])])
        >>> norm.running_mean
        tensor([2.])
    """
    norms = [m for m in module.modules() if isinstance(m, BATCH_NORMS)]
    was_training, momenta = module.training, [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean over the batches
    module.train()
    seen = 0
    try:
        with torch.no_grad():
            for batch in batches:
                module(batch)
                seen += 1
    finally:
        module.train(was_training)
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
    if not seen:
        raise DegenerateError("no batches: the statistics were reset and not measured")
    return module


def _answer(predict: Callable[[Any, Tensor, str], Tensor], model: Any, task: str, images: Tensor) -> Tensor:
    return predict(model, images, task)


def _check_data(images: Tensor, labels: Tensor) -> None:
    if len(images) == 0:
        raise DegenerateError("no images to measure on")
    if labels.ndim != 1 or len(labels) != len(images) or labels.is_floating_point():
        raise MismatchError(
            f"labels are one integer an image: {len(images)} images, labels {tuple(labels.shape)} {labels.dtype}"
        )


def _classes(predict: Predict, images: Tensor, batch: int, target: int | None = None) -> Tensor:
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
            answers.append(answer)
    return torch.cat(answers)


def _check_logits(logits: Tensor, target: int | None) -> None:
    if not bool(logits.isfinite().all()):
        raise NonFiniteError("logits are NaN or inf: the model is broken, and its accuracy would mean nothing")
    if target is not None and not 0 <= target < logits.shape[1]:
        raise RangeError(f"target class {target} is not one of {logits.shape[1]} classes")


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
