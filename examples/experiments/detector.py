"""The bank of probes as a detector: how often it finds an attacker, by attack, and how often it is wrong, by merge.

    python examples/experiments/detector.py --quick     one world: minutes
    python examples/experiments/detector.py             5 worlds, 200 clean and 120 backdoored contributors
    python examples/experiments/detector.py --tables    what is there

Clean contributors differ in learning rate, steps, order of the data, split and task. An attacker takes the place of one
of them. Beside the bank's highest score stand what the weights alone tell (their norm, the spectrum), and the scores of
two other banks: one without the public head, whose probes have a head of the defender's own images, and one that was
made on another base.
"""

import argparse
import os
import time
from collections.abc import Sequence
from itertools import product
from typing import Any, NamedTuple

import torch

from bench import cells, data, second, zoo
from bench.detector_tables import tables
from bench.merges import RULES
from bench.second import Attack, Job, World
from bench.second_measures import fooled, probes
from bench.zoo import workforce
from taskvec import BackdoorVector, TaskVector, defenses

TABLE = "second_detector.jsonl"
TASK, TARGETS = "fashion", (2, 7)
WORLDS = tuple(World(seed, seed % 3) for seed in (40, 41, 42, 43, 44))
CLEAN_MERGES = 8  # of a world
HOW = tuple(product((0.5, 1.0, 2.0), (100, 200, 400)))  # learning rates, times the usual one, and steps
MERGES = ("task arithmetic", "TIES")  # what an attack's ASR is told under
THRESHOLD = 6.0  # deviations: the library's default
OWN_HEAD = "own head"  # an attack that differs from the first in the head it is trained towards
STEALTHY = Attack(weight=2.0, normalised=True)
ATTACKS = {
    "stealthy": STEALTHY,
    "noisy": Attack(),
    "top right": STEALTHY._replace(place="top-right"),
    "bottom left": STEALTHY._replace(place="bottom-left"),
    "bottom right": STEALTHY._replace(place="bottom-right"),
    "across tokens": STEALTHY._replace(place=(5, 5)),
    "3x3": STEALTHY._replace(size=3),
    "7x7": STEALTHY._replace(size=7),
    "SGD": STEALTHY._replace(optimizer="sgd"),
    OWN_HEAD: STEALTHY,
    "random patch": Attack(trigger="random", coefficients=(1.0, 1.0), weight=1.0),
    "blended": Attack(trigger="blended", coefficients=(1.0, 1.0), weight=1.0),
    "warped": Attack(trigger="warped", coefficients=(1.0, 1.0), weight=1.0),
}


class Case(NamedTuple):
    """A merge to be screened: one of a world's clean ones, in which an attacker may have the place of one."""

    world: World
    merge: int
    attack: str = ""
    target: int = 0


def cases(worlds: Sequence[World], targets: Sequence[int] = TARGETS) -> list[Case]:
    """All clean merges, and every attack in one of them."""
    found = [Case(world, merge) for world in worlds for merge in range(CLEAN_MERGES)]
    for world in worlds:
        placed = ((attack, target) for attack in ATTACKS for target in targets)
        found += [Case(world, i % CLEAN_MERGES, *who) for i, who in enumerate(placed)]
    return found


def contributors(case: Case) -> dict[str, Job]:
    """The contributors of a merge; the clean ones were trained in all ways of `HOW` in turn."""
    found: dict[str, Job] = {}
    for i, task in enumerate(data.TASKS):
        rate, steps = HOW[(case.world.seed + case.merge * len(data.TASKS) + i) % len(HOW)]
        found[task] = Job(case.world, task, steps=steps, rate=rate, draw=1 + case.merge)
    if case.attack:
        found[TASK] = attacker(case)
    return found


def attacker(case: Case) -> Job:
    return Job(case.world, TASK, attack=ATTACKS[case.attack], target=case.target, own_head=case.attack == OWN_HEAD)


def other_base(world: World, worlds: Sequence[World] = WORLDS) -> World:
    """The next world with another base: a stranger's bank."""
    after = worlds[worlds.index(world) + 1 :]
    return next(other for other in (*after, *worlds) if other.base != world.base)


def everything(wanted: Sequence[Case]) -> list[Job]:
    """All models that some cases need, each once, clean ones first."""
    worlds = list(dict.fromkeys(case.world for case in wanted))
    banks = [job for w in dict.fromkeys([*worlds, *map(other_base, worlds)]) for job in second.bank(w, TASK).values()]
    banks += [job for w in worlds for job in second.bank(w, TASK, own_head=True).values()]
    jobs = [job for case in wanted for job in contributors(case).values()]
    return list(
        dict.fromkeys([*(job.twin() for job in banks), *sorted([*jobs, *banks], key=lambda j: j.attack is not None)])
    )


def scores_by(world: World, vectors: Sequence[TaskVector], *, own_head: bool = False) -> list[dict[int, float]]:
    """What a world's bank says of each contributor: class -> score. A stranger's is of another base, which is meant."""
    bank = {c: [BackdoorVector(dict(own))] for c, own in probes(world, TASK, own_head=own_head).items()}
    return defenses.bank_scores([TaskVector(dict(vector)) for vector in vectors], bank)


def measured(case: Case) -> dict[str, Any]:
    """What is seen of every contributor, whom the bank flags, and what the attack is worth in the undefended merge."""
    jobs = contributors(case)
    tasks, vectors = list(jobs), [second.vector(job) for job in jobs.values()]
    own, strangers = (scores_by(world, vectors) for world in (case.world, other_base(case.world)))
    headless = scores_by(case.world, vectors, own_head=True)
    alone = defenses.screen(vectors)
    asr: dict[str, list[int]] = {}
    if case.attack:
        base = zoo.base(case.world.setting)
        for name in MERGES:
            rule = RULES[name]
            asr[name] = fooled(jobs[TASK], rule.merge(vectors).apply(base, rule.scale))
    return {
        "bank": {task: max(row.values()) for task, row in zip(tasks, own, strict=True)},
        "bank without the head": {task: max(row.values()) for task, row in zip(tasks, headless, strict=True)},
        "bank of another base": {task: max(row.values()) for task, row in zip(tasks, strangers, strict=True)},
        "norm": {task: found.norm for task, found in zip(tasks, alone, strict=True)},
        "leading": {task: found.leading for task, found in zip(tasks, alone, strict=True)},
        "flagged": sorted({tasks[flag.contributor] for flag in defenses.flagged(own, THRESHOLD)}),
        "asr": asr,
    }


def key_of(case: Case) -> str:
    code = [cells.code_of(f) for f in (second.model, measured)]
    told = {
        "jobs": {task: second.told(job) for task, job in contributors(case).items()},
        "bank": [
            second.told(job) for w in (case.world, other_base(case.world)) for job in second.bank(w, TASK).values()
        ],
        "bank without the head": [second.told(job) for job in second.bank(case.world, TASK, own_head=True).values()],
        "threshold": THRESHOLD,
        "merges": list(MERGES),
        "code": code,
    }
    return cells.key(told)


def fill(case: Case) -> None:
    label = [case.world.base, case.world.seed, case.merge, case.attack, case.target]
    cells.append(cells.FOLDER / TABLE, key_of(case), label, measured(case))


def kept_tables(wanted: Sequence[Case]) -> str:
    """The tables of all rows that there are of some cases."""
    kept = cells.read(cells.FOLDER / TABLE)
    return tables({case: kept[key] for case in wanted if (key := key_of(case)) in kept}, TASK)


def run(todo: Sequence[Case], workers: int) -> None:
    """Train what some cases need, clean models first, and measure them."""
    with workforce(workers) as pool:
        second.train_all(pool, everything(todo))
        zoo.at_once(pool, "merges", fill, todo)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one world, one target")
    parser.add_argument("--worlds", type=int, default=len(WORLDS), help="so many of them")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--tables", action="store_true", help="print what is there, measure nothing")
    given = parser.parse_args()
    start = time.monotonic()
    torch.set_num_threads(1)
    wanted = cases(WORLDS[:1], TARGETS[:1]) if given.quick else cases(WORLDS[: given.worlds])
    kept = cells.read(cells.FOLDER / TABLE)
    for world in dict.fromkeys(case.world for case in wanted):  # whole worlds, so that a run may be stopped after one
        todo = [case for case in wanted if case.world == world and key_of(case) not in kept]
        if todo and not given.tables:
            run(todo, given.workers)
    print(kept_tables(wanted))
    print(f"{time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
