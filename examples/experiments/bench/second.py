"""The study, second edition: contributors, attackers and defenders that all change with the seed.

A `World` is one draw of everything: a base, a split of every training pool into the contributors' half and the
defender's, and the seeds of all who train. An `Attack` is what one contributor does; the defender's probes are attacks
too, of the defender's half, with another size and place.
"""

from collections.abc import Iterable, Mapping
from concurrent.futures import Executor
from functools import cache, partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from taskvec import BackdoorVector, TaskVector
from taskvec.attacks import Pair, badmerging_loss, universal_trigger
from taskvec.attacks.triggers import Patch, blend, random_patch, stamp, warp, warp_field

from . import cache as disk
from . import data, heads, zoo
from .attackers import embed
from .heads import Head, logits
from .training import Images, Loss, Params, clean_loss, train
from .zoo import SHAPE, Setting

SPLIT = 1000  # added to a world's seed: the seed of its split
DEFENDER = 500  # added to a world's seed: the seed of the defender's models
SHOTS = 10  # of each class, that the defender has
OTHERS = 4  # clean models of the attacked task, that some defenders have


class World(NamedTuple):
    """One draw of everything but the attack.

    Attributes:
        seed: of the split and of all who train.
        base: seed of pre-training, and of the public heads.
        encoder: the architecture.
    """

    seed: int
    base: int = 0
    encoder: str = "vits"

    @property
    def setting(self) -> Setting:
        return Setting(self.encoder, base_seed=self.base)


class Attack(NamedTuple):
    """How one contributor plants a backdoor.

    Attributes:
        trigger: `"optimised"` on the base, `"random"` pixels, a `"blended"` or `"warped"` whole image.
        size: of a patch.
        place: of a patch.
        weight: of the backdoor's loss.
        coefficients: range of the interpolation; (1, 1) is the plain loss.
        normalised: directions of features are interpolated, as the head sees them: the stealthy form (ours).
        optimizer: AdamW with a schedule, or SGD with momentum at one rate.
    """

    trigger: Literal["optimised", "random", "blended", "warped"] = "optimised"
    size: int = 5
    place: str | tuple[int, int] = "top-left"
    weight: float = 5.0
    coefficients: tuple[float, float] = (0.2, 1.0)
    normalised: bool = False
    optimizer: Literal["adamw", "sgd"] = "adamw"


PROBE = Attack(size=7, place="bottom-right")

Rows = Literal["contributor", "few"]
"""Whose rows: the contributors' half, or ten images a class of the defender's."""


def rows_of(world: World, task: str, rows: Rows) -> data.Split:
    """A part of the training pool."""
    contributors, defender = data.halves(data.pool(task), SPLIT + world.seed)
    return contributors if rows == "contributor" else data.few_shot(defender, SHOTS, SPLIT + world.seed)


# --- models ----------------------------------------------------------------------------------------------------------


class Job(NamedTuple):
    """One fine-tune: clean without an attack."""

    world: World
    task: str
    rows: Rows = "contributor"
    attack: Attack | None = None
    target: int = 0
    steps: int = 200
    rate: float = 1.0  # times the encoder's learning rate
    draw: int = 0  # which of several models that are alike in all else
    own_head: bool = False  # trained towards a head of the trainer's own images, not the public one

    @property
    def seed(self) -> int:
        return self.world.seed + (DEFENDER if self.rows == "few" else 0) + 10_000 * self.draw

    def twin(self) -> "Job":
        """The same without the attack."""
        return self._replace(attack=None, target=0)


def told(job: Job) -> dict[str, disk.Json]:
    """What a model is made from, as JSON can hold it."""
    attack = None if job.attack is None else job.attack._asdict()
    world = {"setting": zoo.settings(job.world.setting), "seed": job.world.seed}
    return {**job._asdict(), "world": world, "attack": attack}


def model(job: Job) -> Params:
    """The fine-tune, trained once."""
    return disk.tensors("second", told(job), partial(_train, job))


def vector(job: Job) -> TaskVector:
    return TaskVector.between(zoo.base(job.world.setting), model(job))


def probe(job: Job) -> BackdoorVector:
    """From the clean twin to the attacked fine-tune."""
    clean, base = model(job.twin()), zoo.base(job.world.setting)
    return BackdoorVector.between(clean=clean, backdoored=model(job), pretrained=base)


def head_of(job: Job) -> Head:
    """The public head, or one of the trainer's own images."""
    setting = job.world.setting
    if not job.own_head:
        return zoo.head(setting, job.task)
    study, own = zoo.architecture(setting), rows_of(job.world, job.task, job.rows)
    shots = data.few_shot(own, heads.SHOTS, job.seed)
    return heads.prototypes(study.module, zoo.base(setting), shots, centred=study.centred)


def trigger_of(job: Job) -> Images:
    """The function that puts the attack's trigger on images."""
    assert job.attack is not None
    if job.attack.trigger == "blended":
        return partial(blend, pattern=random_patch(28, SHAPE, seed=job.seed).pattern)
    if job.attack.trigger == "warped":
        return partial(warp, field=warp_field(28, seed=job.seed))
    return partial(stamp, patch=patch_of(job))


@cache
def patch_of(job: Job) -> Patch:
    """Random pixels, or a patch that was optimized on the base."""
    assert job.attack is not None
    start = random_patch(job.attack.size, SHAPE, seed=job.seed, place=job.attack.place)
    if job.attack.trigger == "random":
        return start
    setting, head = job.world.setting, head_of(job)

    def score(x: Tensor) -> Tensor:
        return logits(embed(setting, zoo.base(setting), x), head)

    def make() -> dict[str, Tensor]:
        images = rows_of(job.world, job.task, job.rows).images
        return {"pattern": universal_trigger(score, images, start, target=job.target, seed=job.seed).pattern}

    shared = ("trigger", "size", "place")  # what the patch depends on
    attack = Attack(**{name: getattr(job.attack, name) for name in shared})
    key = told(job._replace(attack=attack, steps=200, rate=1.0))
    return Patch(disk.tensors("second-trigger", key, make)["pattern"], start.mask)


def _train(job: Job) -> Params:
    setting = job.world.setting
    study, base = zoo.architecture(setting), zoo.base(setting)
    loss = clean_loss(study.module, head_of(job)) if job.attack is None else attack_loss(job, job.attack)
    own = rows_of(job.world, job.task, job.rows)
    batches = data.batches(own, 64, job.seed)
    if job.attack is not None and job.attack.optimizer == "sgd":
        return _by_sgd(base, loss, batches, lr=100 * study.lr * job.rate, steps=job.steps)
    return train(base, loss, batches, lr=study.lr * job.rate, steps=job.steps)


def attack_loss(job: Job, attack: Attack) -> Loss:
    """The loss of a contributor with a backdoor."""
    setting, head = job.world.setting, head_of(job)

    def seen(params: Mapping[str, Tensor], images: Tensor) -> Tensor:
        found = embed(setting, dict(params), images)
        return heads.directions(found, head) if attack.normalised else found

    found = badmerging_loss(
        seen,
        zoo.base(setting),
        partial(logits, head=head),
        [Pair(trigger_of(job), job.target, partial(logits, head=head))],
        weight=attack.weight,
        coefficients=attack.coefficients,
        seed=job.seed,
    )
    return lambda params, batch, _: found(params, batch.images, batch.labels)


def _by_sgd(start: Params, loss: Loss, batches: Iterable[data.Split], *, lr: float, steps: int) -> Params:
    """SGD with momentum at one rate."""
    params = {name: p.detach().clone().requires_grad_() for name, p in start.items()}
    optimizer = torch.optim.SGD(list(params.values()), lr=lr, momentum=0.9)
    for step, batch in zip(range(steps), batches):  # noqa: B905 - the batches have no end
        optimizer.zero_grad()
        with torch.enable_grad():
            loss(params, batch, step).backward()
        nn.utils.clip_grad_norm_(list(params.values()), 1.0)
        optimizer.step()
    return {name: p.detach().clone() for name, p in params.items()}


def train_all(executor: Executor, jobs: Iterable[Job]) -> None:
    """Make the bases of some models, then the models: clean ones first, the others side by side."""
    todo = list(dict.fromkeys(jobs))
    for setting in dict.fromkeys(job.world.setting for job in todo):
        zoo.prepare(setting, [])
    zoo.twins_first(executor, model, todo)


# --- who is there ----------------------------------------------------------------------------------------------------


def contributors(world: World) -> dict[str, Job]:
    """The clean fine-tune of every task."""
    return {task: Job(world, task) for task in data.TASKS}


def bank(world: World, task: str, *, own_head: bool = False) -> dict[int, Job]:
    """The defender's probes: the attack's recipe for every class of a task, from ten images a class."""
    return {c: Job(world, task, "few", PROBE, c, own_head=own_head) for c in range(len(data.CLASSES[task]))}


def others(world: World, task: str) -> list[Job]:
    """Clean fine-tunes of the attacked task that a defender may have: of other contributors, with other seeds."""
    return [Job(world, task, draw=1 + i) for i in range(OTHERS)]


def everything(worlds: Iterable[World], task: str, attacks: Mapping[Attack, Iterable[int]]) -> list[Job]:
    """All models of some worlds, each once, what others need first."""
    found: list[Job] = []
    for world in worlds:
        probes = bank(world, task).values()
        found += [*contributors(world).values(), *others(world, task), *(own.twin() for own in probes), *probes]
        found += [Job(world, task, attack=a, target=target) for a, targets in attacks.items() for target in targets]
    return list(dict.fromkeys(found))
