"""One row of a table: a merge with a backdoored member, measured with every control. See docs/protocol.md."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar, overload

import torch
from torch import Tensor

from .._vectors.backdoor import BackdoorVector
from ..errors import DegenerateError, MismatchError
from ..metrics._intervals import mean_of
from ..metrics._rates import Data, Rate, Trigger, accuracy, attack_success_rate

__all__ = ["Measurement", "measure", "sweep", "transfer_matrix"]

Model = TypeVar("Model")


Score = TypeVar("Score")


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
        return mean_of([rate.value for rate in self.clean_accuracy.values()])

    @property
    def ba(self) -> float:
        """BA: the mean clean accuracy over the tasks, with the backdoored member."""
        return mean_of([rate.value for rate in self.accuracy.values()])

    @property
    def gain(self) -> float:
        """What the backdoor adds to the trigger: ASR minus the same on the all-clean merge."""
        return self.asr.value - self.on_clean_merge.value

    def row(self) -> dict[str, float | int | str]:
        """The measurement as one flat row, for a data frame: names of columns to numbers and names."""
        rates = {
            "asr": self.asr,
            "base": self.on_base,
            "clean_model": self.on_clean,
            "clean_merge": self.on_clean_merge,
        }
        tasks = {f"accuracy_{task}": rate.value for task, rate in self.accuracy.items()}
        return {
            "attacked": self.attacked,
            "target": self.target,
            "n": self.asr.n,
            **{key if key == "asr" else f"asr_{key}": rate.value for key, rate in rates.items()},
            "gain": self.gain,
            "ba": self.ba,
            "ca": self.ca,
            **tasks,
            **{f"clean_{task}": rate.value for task, rate in self.clean_accuracy.items()},
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
        batch: images a call.

    Returns:
        A `Measurement`.

    Raises:
        MismatchError: the attacked task is not among the tasks.

    Examples:
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


@overload
def sweep(strengths: Iterable[float], model_at: Callable[[float], Model]) -> dict[float, Model]: ...
@overload
def sweep(
    strengths: Iterable[float], model_at: Callable[[float], Model], score: Callable[[Model], Score]
) -> dict[float, Score]: ...
def sweep(
    strengths: Iterable[float], model_at: Callable[[float], Any], score: Callable[[Any], Any] | None = None
) -> dict[float, Any]:
    """Score a family of models over its strength: an injection curve, a defense's front.

    Args:
        strengths: the values; with a score, one model is in memory at a time.
        model_at: strength -> model, such as `partial(shrink, model, base)` or `partial(bv.inject, clean)`.
        score: model -> anything; without it the models themselves are returned.

    Returns:
        strength -> score, in the order given.

    Raises:
        DegenerateError: no strengths.

    Examples:
        >>> sweep([0.0, 0.5, 1.0], lambda s: s, lambda model: model**2)
        {0.0: 0.0, 0.5: 0.25, 1.0: 1.0}
    """
    found = {s: model_at(s) if score is None else score(model_at(s)) for s in strengths}
    if not found:
        raise DegenerateError("there are no strengths to sweep over")
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

    Examples:
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


def _answer(predict: Callable[[Any, Tensor, str], Tensor], model: Any, task: str, images: Tensor) -> Tensor:
    return predict(model, images, task)
