"""An attack or a defense measured with its controls: docs/protocol.md as functions."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import Any, TypeAlias, TypeVar, overload

import torch
from torch import Tensor

from .._vectors.backdoor import BackdoorVector
from .._vectors.checks import checked_vectors
from .._vectors.model import Params
from ..errors import DegenerateError, MismatchError
from ._rates import Rate, Trigger, accuracy, attack_success_rate

__all__ = ["Measurement", "measure", "sweep", "transfer_matrix"]

Model = TypeVar("Model")
Score = TypeVar("Score")
Data: TypeAlias = tuple[Tensor, Tensor]
"""Images `(n, ...)` and labels `(n,)`."""


@dataclass(frozen=True, repr=False)
class Measurement:
    """One row of a table: a merge with a backdoored member, and the same trigger without the backdoor.

    Attributes:
        clean_accuracy: task -> accuracy of the merge with the clean twin in the attacker's place.
        accuracy: task -> accuracy of the merge with the backdoored member.
        asr: attack success rate (ASR) of the merge with the backdoored member.
        on_base: the ASR of the same trigger on the base model.
        on_clean: the ASR of the same trigger on the clean single model.
        on_clean_merge: the ASR of the same trigger on the all-clean merge.
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
        """CA: the mean accuracy over the tasks, of the all-clean merge."""
        return fmean(rate.value for rate in self.clean_accuracy.values())

    @property
    def ba(self) -> float:
        """BA: the mean accuracy over the tasks, of the merge with the backdoored member."""
        return fmean(rate.value for rate in self.accuracy.values())

    @property
    def gain(self) -> float:
        """The injected part of the ASR: ASR minus the ASR of the all-clean merge."""
        return self.asr.value - self.on_clean_merge.value

    def row(self) -> dict[str, float | int | str]:
        """Flatten to one row for a data frame: `pandas.DataFrame([m.row() for m in measurements])`.

        Returns:
            `attacked`, `target`, `asr`, `n`, `on_base`, `on_clean`, `on_clean_merge`, `gain`, `ca`, `ba`, and for each
            task `clean_accuracy.<task>` and `accuracy.<task>`; rates as fractions.

        Examples:
            >>> rates = {"a": Rate(1, 2)}, {"a": Rate(1, 4)}
            >>> rest = Rate(3, 4), Rate(0, 4), Rate(0, 4), Rate(1, 4)
            >>> list(Measurement(*rates, *rest, 1, "a").row().items())[:4]
            [('attacked', 'a'), ('target', 1), ('asr', 0.75), ('n', 4)]
        """
        rates = {name: getattr(self, name).value for name in ("on_base", "on_clean", "on_clean_merge")}
        return {
            "attacked": self.attacked,
            "target": self.target,
            "asr": self.asr.value,
            "n": self.asr.n,
            **rates,
            "gain": self.gain,
            "ca": self.ca,
            "ba": self.ba,
            **{f"clean_accuracy.{task}": rate.value for task, rate in self.clean_accuracy.items()},
            **{f"accuracy.{task}": rate.value for task, rate in self.accuracy.items()},
        }

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
        batch: images per call.

    Returns:
        A `Measurement`.

    Raises:
        MismatchError: the attacked task is not among the tasks.

    Examples:
        >>> row = measure(
        ...     lambda bias, x, task: x + bias,
        ...     {"t": (torch.eye(3), torch.arange(3))},
        ...     model=torch.tensor([2.0, 0.0, 0.0]), clean_merge=0, clean=0, base=0,
        ...     attacked="t", target=0, trigger=lambda x: x * 0.5,
        ... )
        >>> row.asr.value, row.on_clean_merge.value, row.gain
        (1.0, 0.0, 1.0)
    """
    if attacked not in tasks:
        raise MismatchError(f"attacked must be one of the tasks {list(tasks)}; got {attacked!r}")

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


@overload
def sweep(strengths: Iterable[float], model_at: Callable[[float], Model]) -> dict[float, Model]: ...
@overload
def sweep(
    strengths: Iterable[float], model_at: Callable[[float], Model], score: Callable[[Model], Score]
) -> dict[float, Score]: ...
def sweep(
    strengths: Iterable[float], model_at: Callable[[float], Any], score: Callable[[Any], Any] | None = None
) -> dict[float, Any]:
    """Score a family of models over a strength: an injection curve, or the front of a defense.

    Args:
        strengths: the strengths. With a score one model is in memory at a time, without one all of them are.
        model_at: strength -> model, such as `partial(shrink, model, base)` or `partial(bv.inject, clean)`.
        score: model -> anything; without it the models themselves are returned.

    Returns:
        strength -> score, or strength -> model, in the order given.

    Raises:
        DegenerateError: no strengths.

    Examples:
        >>> sweep([0.0, 0.5, 1.0], lambda s: s, lambda model: model**2)
        {0.0: 0.0, 0.5: 0.25, 1.0: 1.0}
        >>> sweep([0.0, 1.0], lambda s: f"model at {s}")
        {0.0: 'model at 0.0', 1.0: 'model at 1.0'}
    """
    found = {strength: model_at(strength) if score is None else score(model_at(strength)) for strength in strengths}
    if not found:
        raise DegenerateError("strengths must not be empty; got none to sweep over")
    return found


def transfer_matrix(
    vectors: Sequence[BackdoorVector],
    clean: Sequence[Params],
    rates: Sequence[Callable[[Params], float]],
    scale: float = 1.0,
) -> Tensor:
    """Measure the effect of each backdoor vector on each trigger: `rates[j](clean[j] + scale * vectors[i])`.

    Args:
        vectors: n backdoor vectors.
        clean: m clean models, one per trigger: of the trigger's task, and not a twin of any of the vectors.
        rates: m functions, each a model's attack success rate on one trigger, such as
            `lambda model: attack_success_rate(partial(predict, model), images, labels, target=1, trigger=w).value`.
        scale: the coefficient of the vectors.

    Returns:
        `(n, m)` float64: row i is vector i, column j trigger j.

    Raises:
        DegenerateError: no vectors, or no triggers.
        MismatchError: not one clean model per trigger, or other names or shapes.
        OptionError: an argument that is not a list of backdoor vectors.

    Examples:
        >>> a, b = (BackdoorVector({"w": w}) for w in torch.eye(2))
        >>> model = {"w": torch.zeros(2)}
        >>> rates = [lambda m: float(m["w"][0]), lambda m: float(m["w"][1])]
        >>> transfer_matrix([a, b], [model, model], rates, scale=0.5)
        tensor([[0.5000, 0.0000],
                [0.0000, 0.5000]], dtype=torch.float64)
    """
    given = checked_vectors("vectors", vectors, BackdoorVector)
    if not given or not rates:
        raise DegenerateError(f"vectors and rates must not be empty; got {len(given)} vectors and {len(rates)} rates")
    if len(clean) != len(rates):
        raise MismatchError(f"clean must hold one model per trigger; got {len(clean)} models for {len(rates)} triggers")
    rows = [[rate(vector.inject(model, scale)) for model, rate in zip(clean, rates, strict=True)] for vector in given]
    return torch.tensor(rows, dtype=torch.float64)


def _answer(predict: Callable[[Any, Tensor, str], Tensor], model: Any, task: str, images: Tensor) -> Tensor:
    return predict(model, images, task)
