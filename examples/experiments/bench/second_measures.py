"""The second edition's measurements: the scene of an attack, and what a model does on validation and on test rows."""

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from taskvec import BackdoorVector, TaskVector, defenses

from . import data, second, zoo
from .encoders import features
from .heads import logits
from .merges import RULES
from .second import Job, World
from .second_defenders import Scene
from .training import Params

VALIDATED = {True: 300, False: 100}  # validation rows of the attacked task, and of each other
TESTED = {True: 600, False: 100}


@cache
def probes(world: World, task: str, *, own_head: bool = False) -> dict[int, BackdoorVector]:
    """The defender's bank: class -> probe."""
    return {c: second.probe(job) for c, job in second.bank(world, task, own_head=own_head).items()}


def suspects(
    vectors: Mapping[str, TaskVector], bank: Mapping[int, BackdoorVector]
) -> tuple[dict[str, list[BackdoorVector]], tuple[str, int]]:
    """The probes that each flagged contributor was flagged for, and the contributor and class of the highest score."""
    tasks = list(vectors)
    scores = defenses.bank_scores(vectors.values(), {c: [own] for c, own in bank.items()})
    found: dict[str, list[BackdoorVector]] = {}
    for flag in defenses.flagged(scores):
        found.setdefault(tasks[flag.contributor], []).append(bank[flag.label])
    by_label = {(tasks[i], c): score for i, row in enumerate(scores) for c, score in row.items()}
    return found, max(by_label, key=lambda label: by_label[label])


def scene(job: Job, rule: str) -> Scene:
    """The merge with one contributor's model; of a clean job, the all-clean merge."""
    world, attacked = job.world, job.task
    jobs = second.contributors(world) | {attacked: job}
    vectors = {task: second.vector(own) for task, own in jobs.items()}
    bank = probes(world, attacked)
    found, highest = suspects(vectors, bank)
    others = [second.vector(own) for own in second.others(world, attacked)]
    planted = vectors[attacked] - second.vector(job.twin())
    return Scene(zoo.base(world.setting), attacked, vectors, RULES[rule], bank, found, highest, others, planted)


def classes(world: World, params: Params, images: Tensor, task: str) -> Tensor:
    """What a model says to images."""
    setting = world.setting
    with torch.no_grad():
        parts = [features(zoo.architecture(setting).module, dict(params), part) for part in images.split(250)]
        return logits(torch.cat(parts), zoo.head(setting, task)).argmax(1)


def hits(world: World, params: Params, split: data.Split, task: str) -> list[int]:
    return [int((classes(world, params, split.images, task) == split.labels).sum()), len(split.labels)]


@cache
def triggered(job: Job) -> Tensor:
    """The test images of other classes, with the trigger."""
    split = data.test(job.task).take(slice(TESTED[True]))
    return second.trigger_of(job)(split.images[split.labels != job.target])


def fooled(job: Job, params: Params) -> list[int]:
    """How many of them are taken for the target, and how many there are."""
    own = triggered(job)
    return [int((classes(job.world, params, own, job.task) == job.target).sum()), len(own)]


def point(job: Job, params: Params) -> dict[str, Any]:
    """A model: hits on validation and on test rows by task, and triggered rows taken for the target, as [hits, n]."""

    def right(part: Callable[[str], data.Split], most: Mapping[bool, int]) -> dict[str, list[int]]:
        return {t: hits(job.world, params, part(t).take(slice(most[t == job.task])), t) for t in data.TASKS}

    return {
        "validation": right(data.validation, VALIDATED),
        "test": right(data.test, TESTED),
        "asr": fooled(job, params),
    }
