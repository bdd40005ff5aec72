"""One cell of the table: an attack, merged by a rule, under a defence, beside its control.

The control of a cell is the same merge, defended in the same way, with the clean twin in the attacker's place.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

from torch import Tensor

from taskvec import BackdoorVector, TaskVector
from taskvec.attacks.triggers import Patch, stamp
from taskvec.defenses import choose_strength, injection_subtraction, random_twin, shrink, shuffled_twin, weight_average
from taskvec.metrics import Measurement, Rate, accuracy, attack_success_rate, measure, sweep

from .data import Split
from .judge import WHOLE, Model, Predict, model
from .mergers import RULES

KEEP = 0.98  # the share of the undefended merge's validation accuracy that a defence must leave

Params = Mapping[str, Tensor]
Combine = Callable[[Model], Params]
"""A fine-tune of the attacked task, put in the attacker's place -> the merged model."""
Defend = Callable[[Combine, Model, float], Params]
"""How to merge, what is in the attacker's place, a strength -> the defended merge."""


class Merge(NamedTuple):
    """A rule, the scale its paper applies the result with, and scales to choose from on validation data, if any."""

    name: str
    rule: Callable[[Sequence[TaskVector]], TaskVector]
    scale: float
    scales: tuple[float, ...]


class Attack(NamedTuple):
    """A vector planted in a clean model, what the attacker hands in, and the patch that wakes it."""

    name: str
    clean: Model
    vector: BackdoorVector
    upload: Model
    patch: Patch
    target: int


class Defence(NamedTuple):
    """What is done about an attack nobody may know of, and what it takes."""

    name: str
    given: str
    defend: Defend
    strengths: tuple[float, ...] = ()


class Bench(NamedTuple):
    """What all cells share."""

    predict: Predict
    base: Model
    others: Sequence[TaskVector]  # the other tasks' vectors, all clean
    attacked: str
    tests: Mapping[str, Split]
    validations: Mapping[str, Split]
    made: dict[tuple[str, str], TaskVector]  # merges by rule and member, each made once


class Point(NamedTuple):
    """A model on validation data: mean accuracy over the tasks, and ASR."""

    accuracy: float
    asr: float


MERGES = (
    Merge("average", *RULES["average"], ()),  # any other scale of it is task arithmetic
    Merge("task arithmetic", *RULES["task arithmetic"], (0.1, 0.15, 0.2, 0.3, 0.4, 0.5)),
    Merge("ties", *RULES["TIES"], (0.2, 0.4, 0.6, 0.8, 1.0, 1.2)),
)


def combiner(bench: Bench, how: Merge, scale: float | None = None) -> Combine:
    """The merge of the other tasks with whatever takes the attacker's place, at the paper's scale by default."""

    def combine(member: Model) -> Params:
        key = how.name, member.digest
        if key not in bench.made:
            bench.made[key] = how.rule([TaskVector.between(bench.base.params, member.params), *bench.others])
        return bench.made[key].apply(bench.base.params, how.scale if scale is None else scale)

    return combine


def subtraction(vector: BackdoorVector) -> Defend:
    """The defence that subtracts this vector from the merge."""
    return lambda combine, member, by: injection_subtraction(combine(member), vector, by)


def undefended(combine: Combine, member: Model, _by: float) -> Params:
    """The merge as it is."""
    return combine(member)


UNDEFENDED = Defence("none", "nothing", undefended)


def defences(
    bench: Bench, attack: Attack, probe: BackdoorVector, clean_others: Sequence[Params]
) -> tuple[Defence, ...]:
    """The defences with a strength of their own; the probe's twins follow it: see `twins`."""

    def averaged(combine: Combine, member: Model, count: float) -> Params:
        return combine(model(weight_average([member.params, *clean_others[: int(count)]])))

    def shrunk(combine: Combine, member: Model, by: float) -> Params:
        return shrink(combine(member), bench.base.params, by)

    counts = tuple(float(count + 1) for count in range(len(clean_others)))
    return (
        UNDEFENDED,
        Defence("IBVS", "half of the task's data, labelled", subtraction(probe), (0.05, 0.1, 0.15, 0.2, 0.3, 0.5)),
        Defence("WAG", f"{len(counts)} clean fine-tunes of the task", averaged, counts),
        Defence("shrinking", "the base", shrunk, (0.15, 0.3, 0.45, 0.6, 0.75, 0.9)),
        Defence("oracle", "the attack's own vector", subtraction(attack.vector), (0.05, 0.1, 0.2, 0.3, 0.5, 0.8)),
    )


def twins(probe: BackdoorVector, draws: int, seed: int) -> list[list[Defence]]:
    """Vectors as long as the probe, tensor by tensor, that know nothing of any backdoor: draws of each kind."""
    random = [random_twin(probe, seed=1000 * seed + draw) for draw in range(draws)]
    shuffled = [shuffled_twin(probe, seed=seed)]
    kinds = {"random vector": random, "shuffled probe": shuffled}
    return [[Defence(name, "nothing", subtraction(twin)) for twin in drawn] for name, drawn in kinds.items()]


def right(bench: Bench, asked: Model, task: str) -> Rate:
    """Test accuracy of one task."""
    return accuracy(lambda images: bench.predict(asked, images, task), *bench.tests[task], batch=WHOLE)


def fooled(bench: Bench, attack: Attack, asked: Model, split: Split) -> Rate:
    """ASR of the attack's trigger on a split of the attacked task."""
    return attack_success_rate(
        lambda images: bench.predict(asked, images, bench.attacked),
        *split,
        target=attack.target,
        trigger=partial(stamp, patch=attack.patch),
        batch=WHOLE,
    )


def alone(bench: Bench, attack: Attack, params: Params) -> Point:
    """A model of the attacked task by itself on test data: its accuracy there, and ASR."""
    asked, task = model(params), bench.attacked
    return Point(right(bench, asked, task).value, fooled(bench, attack, asked, bench.tests[task]).value)


def validate(bench: Bench, attack: Attack, params: Params) -> Point:
    """Validation accuracy, which choices are made on, and ASR, which is for the pictures only."""
    asked = model(params)
    rates = [
        accuracy(lambda images, task=task: bench.predict(asked, images, task), *split, batch=WHOLE).value
        for task, split in bench.validations.items()
    ]
    rate = fooled(bench, attack, asked, bench.validations[bench.attacked])
    return Point(sum(rates) / len(rates), rate.value)


def front(bench: Bench, attack: Attack, how: Merge, defence: Defence) -> dict[float, Point]:
    """Strength -> what the defended merge does on validation data; 0 is no defence."""
    combine = combiner(bench, how)
    points = {0.0: validate(bench, attack, combine(attack.upload))}
    if defence.strengths:
        defended = partial(defence.defend, combine, attack.upload)
        points |= sweep(defence.strengths, defended, partial(validate, bench, attack))
    return points


def chosen(defence: Defence, points: Mapping[float, Point]) -> float:
    """The largest strength that keeps 98 % of the accuracy; WAG takes all the models it is given."""
    if not defence.strengths or defence.name == "WAG":
        return max(defence.strengths, default=0.0)
    accuracies = {by: point.accuracy for by, point in points.items()}
    return choose_strength(accuracies, undefended=accuracies[0.0], keep=KEEP)


def cell(bench: Bench, attack: Attack, combine: Combine, defence: Defence, by: float) -> Measurement:
    """Everything about one cell, on test images."""
    return measure(
        bench.predict,
        bench.tests,
        model=model(defence.defend(combine, attack.upload, by)),
        clean_merge=model(defence.defend(combine, attack.clean, by)),
        clean=attack.clean,
        base=bench.base,
        attacked=bench.attacked,
        target=attack.target,
        trigger=partial(stamp, patch=attack.patch),
        batch=WHOLE,
    )


def best_scale(bench: Bench, how: Merge, attack: Attack) -> float:
    """The scale of most validation accuracy, for the merge that holds what the attacker handed in."""

    def at(scale: float) -> Params:
        return combiner(bench, how, scale)(attack.upload)

    points = sweep(how.scales, at, partial(validate, bench, attack))
    return max(points, key=lambda scale: points[scale].accuracy)


def shrunk_to(accuracy_wanted: float, points: Mapping[float, Point]) -> float:
    """The validation ASR that shrinking leaves when it is as strong as this accuracy allows, between two strengths."""
    strengths = sorted(points, reverse=True)
    for weaker, stronger in zip(strengths[1:], strengths, strict=False):
        (low, asr_low), (high, asr_high) = points[stronger], points[weaker]
        if low >= accuracy_wanted:
            return asr_low
        if high >= accuracy_wanted:
            return asr_low + (asr_high - asr_low) * (accuracy_wanted - low) / (high - low)
    return points[0.0].asr
