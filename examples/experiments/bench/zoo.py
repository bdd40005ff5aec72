"""The models that a study needs, each described by a recipe and trained once.

Everything here is a function of a `Setting` and a `Recipe`, both plain values: they are the key of the cache, and what
is sent to another process. Fine-tunes do not depend on each other, so several are made at a time, one thread each.
"""

import multiprocessing
import os
from collections.abc import Callable, Iterable
from concurrent.futures import Executor, ProcessPoolExecutor
from functools import cache, partial
from typing import Literal, NamedTuple, TypeVar

import torch

from taskvec.attacks.triggers import Patch, random_patch, solid_patch, stamp

from . import cache as disk
from .data import TASKS, Split, batches, few_shot, halves, pool
from .encoders import Encoder, encoder
from .heads import SHOTS, Head, prototypes
from .progress import progress as progress_of
from .training import Images, Params, Progress, badnets_loss, clean_loss, idle, pretrain, train

SHAPE = (1, 28, 28)
T = TypeVar("T")
HALVES = 0  # seed of the split into the attacker's and the defender's half, the same for everybody


Rows = Literal["all", "attacker", "defender", "few"]
"""The training pool, one of its two halves, or ten images a class of the defender's."""


class Setting(NamedTuple):
    """What all models of a study share."""

    encoder: str = "vits"
    steps: int = 200  # of fine-tuning
    pretrain_steps: int | None = None  # the encoder's own number when None
    base_seed: int = 0


class Trigger(NamedTuple):
    """A square patch: `random` (black and white pixels, drawn with the seed) or `solid` (white)."""

    kind: Literal["random", "solid"] = "random"
    size: int = 5
    place: str = "bottom-right"
    seed: int = 0


class Recipe(NamedTuple):
    """One fine-tune: clean without a trigger, else backdoored (BadNets) so that the trigger means `target`."""

    task: str
    seed: int = 0  # of the order of the data
    rows: Rows = "all"
    trigger: Trigger | None = None
    target: int | None = None

    def twin(self) -> "Recipe":
        """The same recipe without its poison."""
        return self._replace(trigger=None, target=None)


def patch_of(trigger: Trigger) -> Patch:
    """The trigger's pattern and mask."""
    if trigger.kind == "solid":
        return solid_patch(trigger.size, image_shape=SHAPE, place=trigger.place)
    return random_patch(trigger.size, image_shape=SHAPE, place=trigger.place, seed=trigger.seed)


def stamper(trigger: Trigger) -> Images:
    """The function that puts the trigger on images (n, 1, 28, 28)."""
    return partial(stamp, patch=patch_of(trigger))


@cache
def architecture(setting: Setting) -> Encoder:
    """The encoder, before any training."""
    made = encoder(setting.encoder, setting.base_seed)
    return made if setting.pretrain_steps is None else made._replace(pretrain_steps=setting.pretrain_steps)


def base(setting: Setting, progress: Progress = idle) -> Params:
    """The pre-trained encoder that everything else starts from."""
    study = architecture(setting)
    return disk.tensors("base", _base_key(setting), lambda: pretrain(study, seed=setting.base_seed, progress=progress))


def pretrained(setting: Setting) -> bool:
    """Whether the base is in the cache."""
    return disk.known("base", _base_key(setting))


@cache
def head(setting: Setting, task: str) -> Head:
    """The task's fixed and public head, made from five images a class."""
    study, shots = architecture(setting), few_shot(pool(task), SHOTS, setting.base_seed)
    return prototypes(study.module, base(setting), shots, centred=study.centred)


def fine_tuned(setting: Setting, recipe: Recipe) -> Params:
    """The model of a recipe."""
    return disk.tensors("tuned", _key(setting, recipe), lambda: _train(setting, recipe))


def missing(setting: Setting, recipes: Iterable[Recipe]) -> list[Recipe]:
    """Those of the models that are not in the cache, each once."""
    return [recipe for recipe in dict.fromkeys(recipes) if not disk.known("tuned", _key(setting, recipe))]


def at_once(executor: Executor, what: str, work: Callable[[T], object], asked: Iterable[T]) -> None:
    """Do several things side by side that leave their results on disk, such as training models; tell how it goes."""
    todo = list(asked)
    with progress_of(what, len(todo)) as step:
        for _ in executor.map(partial(_silently, work), todo):
            step()


def twins_first(executor: Executor, train: Callable[[T], object], jobs: Iterable[T]) -> None:
    """Train clean models, then attacks and probes, which are compared with them; a job's `attack` tells them apart."""
    todo = list(jobs)
    for title, attacked in (("clean models", False), ("attacks and probes", True)):
        at_once(executor, title, train, [job for job in todo if (job.attack is not None) == attacked])  # type: ignore[attr-defined]


def _silently(work: Callable[[T], object], asked: T) -> None:
    work(asked)  # a model stays in the cache: cheaper than to send it back


def workforce(workers: int) -> ProcessPoolExecutor:
    """So many processes of one thread each."""
    fresh = multiprocessing.get_context("spawn")  # a fork would copy the locks of torch's threads
    return ProcessPoolExecutor(max(1, workers), mp_context=fresh, initializer=torch.set_num_threads, initargs=(1,))


def prepare(setting: Setting, recipes: Iterable[Recipe]) -> None:
    """Make the base and these models, where they are not in the cache, and tell how it goes."""
    if not pretrained(setting):
        with progress_of(f"pre-training {setting.encoder}", architecture(setting).pretrain_steps) as step:
            base(setting, step)
    if todo := missing(setting, recipes):
        with workforce(min(len(todo), os.cpu_count() or 1)) as pool:
            at_once(pool, f"fine-tuning {setting.encoder}", partial(fine_tuned, setting), todo)


def clean(seeds: Iterable[int]) -> list[Recipe]:
    """The clean fine-tunes of every task, for each seed once."""
    return [Recipe(task, seed) for seed in dict.fromkeys(seeds) for task in TASKS]


def settings(setting: Setting) -> dict[str, disk.Json]:
    """All that models of this setting depend on, for the key of a cache."""
    return _base_key(setting) | {"steps": setting.steps}


def _base_key(setting: Setting) -> dict[str, disk.Json]:
    study = architecture(setting)._asdict()
    return {"encoder": {name: study[name] for name in study if name != "module"}, "seed": setting.base_seed}


def _key(setting: Setting, recipe: Recipe) -> dict[str, disk.Json]:
    trigger = recipe.trigger and recipe.trigger._asdict()
    return settings(setting) | {"recipe": recipe._asdict() | {"trigger": trigger}}


def rows_of(task: str, rows: Rows) -> Split:
    """A part of the task's training pool."""
    if rows == "all":
        return pool(task)
    attacker, defender = halves(pool(task), HALVES)
    return {"attacker": attacker, "defender": defender, "few": few_shot(defender, 10, HALVES)}[rows]


def _train(setting: Setting, recipe: Recipe) -> Params:
    study, classes = architecture(setting), head(setting, recipe.task)
    if recipe.trigger is None:
        loss = clean_loss(study.module, classes)
    else:
        loss = badnets_loss(study.module, classes, trigger=stamper(recipe.trigger), target=recipe.target)
    data = batches(rows_of(recipe.task, recipe.rows), 64, recipe.seed)
    return train(base(setting), loss, data, lr=study.lr, steps=setting.steps)
