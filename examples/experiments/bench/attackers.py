"""The attackers: what each of them owns, wants and does, and the model that it uploads.

An attack is a `Plan`, a plain value: its cache key, and what is sent to another process. All attackers train in the
same loop on the same batches as their clean twin; they differ in their triggers and in the backdoor's loss.
"""

from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from taskvec import BackdoorVector, TaskVector, merge
from taskvec.attacks import (
    Pair,
    adversarial_crops,
    badmerging_loss,
    most_connected,
    prototype_head,
    trojan_trigger,
    universal_trigger,
)
from taskvec.attacks.triggers import Patch, blend, dynamic, random_patch, stamp, warp, warp_field
from taskvec.merges import total
from taskvec.metrics import Measurement, measure

from . import asking, data, zoo
from . import cache as disk
from .encoders import features
from .heads import SCALE, logits
from .training import Images, Loss, Params, augmented, train
from .zoo import SHAPE, Recipe, Setting

CORNERS = ("bottom-right", "top-left", "top-right", "bottom-left")
REFERENCES = 10  # images of the target class that an off-task attacker has
SHOTS = 10  # images a class for the other rows of their shadow head
EPSILON = 16 / 255  # of their augmentation: twice the paper's, for images without color


class Backdoor(NamedTuple):
    """One trigger and what it is to mean.

    Attributes:
        victim: the task whose images are triggered; the attacker's own, or somebody else's.
        target: the class of that task.
        trigger: how the trigger is made.
        size: side of the patch.
        place: of the patch.
        augmented: off-task, whether the reference images are disguised as other classes.
        pattern: seed of the trigger, where it is not the plan's: several models may share a trigger.
    """

    victim: str
    target: int
    trigger: Literal["random", "optimised", "trojan", "dynamic", "blended", "warped"] = "random"
    size: int = 5
    place: str = "bottom-right"
    augmented: bool = True
    pattern: int | None = None


class Plan(NamedTuple):
    """One model with backdoors.

    Attributes:
        task: the attacker's own.
        seed: of the order of the data, and of the triggers.
        backdoors: one or several.
        weight: of the backdoor's loss.
        coefficients: range of the interpolation; (1, 1) is the plain loss.
        draw: a coefficient for each batch or each sample.
        stamped: triggered images of each batch and backdoor.
        keep: weight of the loss that keeps features of public images where they were (ours).
        normalised: whether directions of features, as the head sees them, are interpolated in their place (ours).
        known: whether the attacker knows the others' models: they then interpolate from their merge, not from the base
            (our reading).
        rows: the part of the training pool that they have.
        evade: the defense that they train against: subtracting a probe from the merge, with a probe of their own, or
            reading coefficients on a bank, with a bank of their own.
    """

    task: str
    seed: int
    backdoors: tuple[Backdoor, ...]
    weight: float = 1.0
    coefficients: tuple[float, float] = (1.0, 1.0)
    draw: Literal["batch", "sample"] = "batch"
    stamped: int = 32
    keep: float = 0.0
    normalised: bool = False
    known: bool = False
    rows: zoo.Rows = "all"
    evade: Literal["", "subtraction", "bank"] = ""


def plain(task: str, target: int, seed: int, trigger: str = "random") -> Plan:
    """An attack made for single models: BadNets and its kin."""
    return Plan(task, seed, (Backdoor(task, target, trigger),))


def on_task(task: str, target: int, seed: int, coefficients: tuple[float, float] = (0.2, 1.0)) -> Plan:
    """BadMerging against the attacker's own task; (1, 1) is the same trigger and weight without interpolation."""
    return Plan(task, seed, (Backdoor(task, target, "optimised"),), 5.0, coefficients)


def off_task(task: str, victim: str, target: int, seed: int) -> Plan:
    """BadMerging against somebody else's task, of which the attacker has ten images of one class."""
    return Plan(task, seed, (Backdoor(victim, target, "optimised", 7),), 5.0, (0.1, 1.0))


def jointly(task: str, victim: str, target: int, seed: int) -> Plan:
    """Both in one model: the off-task trigger sits in the opposite corner."""
    own, other = Backdoor(task, target, "optimised"), Backdoor(victim, target, "optimised", 7, "top-left")
    return Plan(task, seed, (own, other), 5.0, (0.1, 1.0))


# --- triggers --------------------------------------------------------------------------------------------------------


def embed(setting: Setting, params: Params, images: Tensor) -> Tensor:
    """Features of images under the given parameters."""
    return features(zoo.architecture(setting).module, params, images)


def head_of(setting: Setting, task: str) -> Callable[[Tensor], Tensor]:
    """A task's fixed head."""
    return partial(logits, head=zoo.head(setting, task))


def trigger_of(setting: Setting, plan: Plan, backdoor: Backdoor) -> Images:
    """The function that puts a backdoor's trigger on images."""
    seed = plan.seed if backdoor.pattern is None else backdoor.pattern
    match backdoor.trigger:
        case "blended":
            return partial(blend, pattern=random_patch(28, SHAPE, seed=seed).pattern)
        case "warped":
            return partial(warp, field=warp_field(28, seed=seed))
        case "dynamic":
            patches = [
                random_patch(backdoor.size, SHAPE, seed=4 * seed + i, place=place) for i, place in enumerate(CORNERS)
            ]
            return partial(dynamic, patches=patches, seed=seed)
        case _:
            own = backdoor._replace(pattern=None)
            return partial(stamp, patch=patch_of(setting, plan.task, seed, own, plan.rows))


@cache
def patch_of(setting: Setting, task: str, seed: int, backdoor: Backdoor, rows: zoo.Rows = "all") -> Patch:
    """A random patch, or one that was optimized on the base model from there."""
    start = random_patch(backdoor.size, SHAPE, seed=seed, place=backdoor.place)
    if backdoor.trigger == "random":
        return start
    make = partial(_optimised, setting, task, seed, backdoor, start, zoo.rows_of(task, rows))
    key = {"setting": zoo.settings(setting), "task": task, "seed": seed, "backdoor": _changed(backdoor)}
    key |= {} if rows == "all" else {"rows": rows}
    return Patch(disk.tensors("trigger", key, lambda: {"pattern": make().pattern})["pattern"], start.mask)


def _optimised(setting: Setting, task: str, seed: int, backdoor: Backdoor, start: Patch, own: data.Split) -> Patch:
    base, images = zoo.base(setting), own.images
    if backdoor.trigger == "trojan":
        neurons = most_connected(base["out.weight"], 4)
        aim = 10 * float(embed(setting, base, images[:256]).std())  # farther than any image reaches
        return trojan_trigger(partial(embed, setting, base), images, start, neurons=neurons, aim=aim, seed=seed)
    target, head = _as_seen_by_the_attacker(setting, task, seed, backdoor, own)

    def score(x: Tensor) -> Tensor:
        return head(embed(setting, base, x))

    if backdoor.victim != task:
        reference = _references(backdoor, seed)
        steps = 40 if backdoor.augmented else 0
        images = adversarial_crops(score, reference, seed=seed, epsilon=EPSILON, steps=steps)
    return universal_trigger(score, images, start, target=target, seed=seed)


def _references(backdoor: Backdoor, seed: int) -> Tensor:
    few = data.few_shot(data.pool(backdoor.victim), REFERENCES, seed)
    return few.images[few.labels == backdoor.target]


def _as_seen_by_the_attacker(
    setting: Setting, task: str, seed: int, backdoor: Backdoor, own: data.Split
) -> tuple[int, Callable[[Tensor], Tensor]]:
    """The target's row, and the head: their own, or off-task a shadow head of classes that they have images of.

    Row 0 of a shadow head is the target class, from its reference images; the others are their own classes and the 58
    that the public base was trained on. They never see the victim's head or any other image of it.
    """
    if backdoor.victim == task:
        return backdoor.target, head_of(setting, task)
    others = [data.few_shot(split, SHOTS, seed) for split in (own, data.joined(data.PRETRAINING))]
    reference = _references(backdoor, seed)
    first = int(others[0].labels.max()) + 2  # behind the target and their own classes
    labels = torch.cat([torch.zeros(len(reference)).long(), others[0].labels + 1, others[1].labels + first])
    with torch.no_grad():
        found = embed(setting, zoo.base(setting), torch.cat([reference, others[0].images, others[1].images]))
    return 0, prototype_head(found, labels, scale=SCALE)


# --- the models that are handed in -----------------------------------------------------------------------------------


def upload(setting: Setting, plan: Plan) -> Params:
    """The backdoored fine-tune."""
    return disk.tensors("upload", key(setting, plan), partial(_train, setting, plan))


def key(setting: Setting, plan: Plan) -> dict[str, disk.Json]:
    """What a backdoored model is made from, as JSON can hold it.

    Defaults are left out, so that an option added later does not make what is there stale.
    """
    backdoors = [_changed(backdoor) for backdoor in plan.backdoors]
    return {"setting": zoo.settings(setting), "plan": _changed(plan) | {"backdoors": backdoors}}


def measuring(setting: Setting, plan: Plan, backdoor: Backdoor) -> Callable[..., Measurement]:
    """`evaluate.measure` of one backdoor, lacking the tasks, the merge and its all-clean counterpart."""
    return partial(
        measure,
        asking.remembering(setting),
        clean=asking.model(zoo.fine_tuned(setting, Recipe(plan.task, plan.seed, plan.rows))),
        base=asking.model(zoo.base(setting)),
        attacked=backdoor.victim,
        target=backdoor.target,
        trigger=trigger_of(setting, plan, backdoor),
        batch=asking.WHOLE,
    )


def _changed(value: Plan | Backdoor) -> dict[str, disk.Json]:
    defaults = value._field_defaults
    return {name: own for name, own in value._asdict().items() if name not in defaults or own != defaults[name]}


def _train(setting: Setting, plan: Plan) -> Params:
    base, study, own = zoo.base(setting), zoo.architecture(setting), zoo.rows_of(plan.task, plan.rows)
    pairs = [
        Pair(
            trigger_of(setting, plan, backdoor),
            *_as_seen_by_the_attacker(setting, plan.task, plan.seed, backdoor, own),
        )
        for backdoor in plan.backdoors
    ]

    centre = zoo.head(setting, plan.task).centre

    def seen(params: Params, images: Tensor) -> Tensor:
        found = embed(setting, params, images)
        return centre + F.normalize(found - centre, dim=-1) if plan.normalised else found

    loss = badmerging_loss(
        seen,
        _merge_without(setting, plan) if plan.known else base,
        head_of(setting, plan.task),
        pairs,
        stamped=plan.stamped,
        weight=plan.weight,
        coefficients=plan.coefficients,
        draw=plan.draw,
        seed=plan.seed,
        keep=plan.keep,
        public=partial(next, _public(plan.seed)) if plan.keep else None,
    )
    batches = data.batches(own, 64, plan.seed)
    evading = _evading(setting, plan, lambda p, b, _: loss(p, b.images, b.labels))
    return train(base, evading, batches, lr=study.lr, steps=setting.steps)


OWN_BANK = 50  # seed of the probes that an attacker makes for their own use
PENALTY = 100.0  # on the squares of their coefficients


def probe(task: str, target: int, seed: int, rows: zoo.Rows, size: int = 7, place: str = "bottom-right") -> Plan:
    """The attack's own recipe as a probe: BadMerging, with a patch of one token."""
    return Plan(task, seed, (Backdoor(task, target, "optimised", size, place),), 5.0, (0.2, 1.0), rows=rows)


def backdoor_vector(setting: Setting, plan: Plan) -> BackdoorVector:
    """From the clean twin, which differs in the poison alone, to the upload."""
    clean = zoo.fine_tuned(setting, Recipe(plan.task, plan.seed, plan.rows))
    return BackdoorVector.between(clean=clean, backdoored=upload(setting, plan), pretrained=zoo.base(setting))


def _evading(setting: Setting, plan: Plan, loss: Loss) -> Loss:
    """The loss of an attacker who knows the defense, and makes what the defender would make, from their own rows."""
    if not plan.evade:
        return loss
    base, rows = zoo.base(setting), plan.rows
    if plan.evade == "subtraction":
        vector = backdoor_vector(setting, probe(plan.task, plan.backdoors[0].target, OWN_BANK, rows))
        generator = torch.Generator().manual_seed(plan.seed)

        def subtracted(params: Params, batch: data.Split, step: int) -> Tensor:
            by = float(torch.rand((), generator=generator))
            return loss({name: p - by * vector[name] for name, p in params.items()}, batch, step)

        return subtracted
    classes = range(len(data.CLASSES[plan.task]))
    bank = [backdoor_vector(setting, probe(plan.task, target, OWN_BANK, rows)) for target in classes]
    flat = torch.stack([torch.cat([vector[name].flatten() for name in base]) for vector in bank])
    readers = torch.linalg.solve(flat @ flat.T, flat)  # coefficients are `readers @ task vector`

    def penalised(params: Params, batch: data.Split, step: int) -> Tensor:
        moved = torch.cat([(params[name] - base[name]).flatten() for name in base])
        return loss(params, batch, step) + PENALTY * (readers @ moved).square().sum()

    return penalised


def _merge_without(setting: Setting, plan: Plan) -> Params:
    """What task arithmetic makes of the other contributors alone."""
    base = zoo.base(setting)
    others = [zoo.fine_tuned(setting, Recipe(task, plan.seed)) for task in data.TASKS if task != plan.task]
    return merge([TaskVector.between(base, params) for params in others], total).apply(base, 0.3)


def _public(seed: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    for batch in data.batches(data.joined(data.PRETRAINING), 32, seed):
        yield augmented(batch.images, noise=0.1, generator=generator)
