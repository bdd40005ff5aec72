"""What the attackers of the study hand in: the contributors they replace, and the backdoor that is measured.

All contributors train on one half of every training pool; the other half is the defender's.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import torch

from taskvec import BackdoorVector, TaskVector
from taskvec.attacks import amplify, sparse_backdoor

from . import attackers, data, zoo
from .attackers import Backdoor, Plan
from .training import Params
from .zoo import Recipe, Setting

ROWS: zoo.Rows = "attacker"
MEMBERS = 3  # vectors in an SBV: other seeds and clean twins, one trigger
LOUDER = 1.5  # how much the amplified vector is longer


class Handed(NamedTuple):
    """An attack on a merge.

    Attributes:
        models: task -> what is handed in for it; the other contributors are clean.
        plan: whose first backdoor is measured.
    """

    models: Mapping[str, Params]
    plan: Plan


Attacker = Callable[[Setting, str, int, int], Handed]
"""Encoder's setting, the attacked task, target class, seed."""


def contributors(setting: Setting, seed: int) -> dict[str, Params]:
    """The clean fine-tunes of every task."""
    return {task: zoo.fine_tuned(setting, Recipe(task, seed, ROWS)) for task in data.TASKS}


def from_plan(
    setting: Setting, task: str, target: int, seed: int, *, plan: Callable[[str, int, int], Plan], **changes: str
) -> Handed:
    """One model with a backdoor."""
    made = plan(task, target, seed)._replace(rows=ROWS, **changes)
    return Handed({task: attackers.upload(setting, made)}, made)


def nobody(_setting: Setting, task: str, target: int, seed: int) -> Handed:
    """No attack, under the trigger of one: what a defense costs where there is nothing to defend against."""
    return Handed({}, attackers.on_task(task, target, seed)._replace(rows=ROWS))


def off_task(setting: Setting, task: str, target: int, seed: int) -> Handed:
    """The owner of the next task plants it; of the attacked one they have ten images of the target class."""
    plan = attackers.off_task(after(task), task, target, seed)._replace(rows=ROWS)
    return Handed({plan.task: attackers.upload(setting, plan)}, plan)


def sparse(setting: Setting, task: str, target: int, seed: int) -> Handed:
    """SBV_SC of BadNets vectors that share the trigger and have seeds and clean twins of their own."""
    backdoor = Backdoor(task, target, pattern=seed)
    plans = [Plan(task, seed + 5 * member, (backdoor,), rows=ROWS) for member in range(MEMBERS)]
    return _planted(setting, plans[0], sparse_backdoor(attackers.backdoor_vector(setting, plan) for plan in plans))


def amplified(setting: Setting, task: str, target: int, seed: int) -> Handed:
    """A BadNets vector made longer."""
    plan = attackers.plain(task, target, seed)._replace(rows=ROWS)
    return _planted(setting, plan, amplify(attackers.backdoor_vector(setting, plan), LOUDER))


def colluding(setting: Setting, task: str, target: int, seed: int) -> Handed:
    """Two contributors, each with half of one BadMerging vector: the owner of the task, and the owner of the next."""
    plan = attackers.on_task(task, target, seed)._replace(rows=ROWS)
    half = attackers.backdoor_vector(setting, plan) / 2
    clean = contributors(setting, seed)
    return Handed({own: dict(half.inject(clean[own])) for own in (task, after(task))}, plan)


def after(task: str) -> str:
    """The next task."""
    return data.TASKS[(data.TASKS.index(task) + 1) % len(data.TASKS)]


def _planted(setting: Setting, plan: Plan, vector: BackdoorVector) -> Handed:
    clean = zoo.fine_tuned(setting, Recipe(plan.task, plan.seed, ROWS))
    return Handed({plan.task: dict(vector.inject(clean))}, plan)


ATTACKERS: dict[str, Attacker] = {
    "none": nobody,
    "BadNets": partial(from_plan, plan=attackers.plain),
    "blended": partial(from_plan, plan=partial(attackers.plain, trigger="blended")),
    "BadMerging-on": partial(from_plan, plan=attackers.on_task),
    "BadMerging-off": off_task,
    "SBV": sparse,
    "amplified": amplified,
    "colluding": colluding,
    "against subtraction": partial(from_plan, plan=attackers.on_task, evade="subtraction"),
    "against the bank": partial(from_plan, plan=attackers.on_task, evade="bank"),
}


def planted(setting: Setting, handed: Handed, clean: Mapping[str, Params]) -> TaskVector:
    """All that the attackers added to the clean contributors: the oracle's knowledge."""
    base = zoo.base(setting)
    nothing = TaskVector({name: torch.zeros_like(tensor) for name, tensor in base.items()})
    moved = [
        TaskVector.between(base, model) - TaskVector.between(base, clean[task]) for task, model in handed.models.items()
    ]
    return sum(moved, start=nothing)
