"""The primary comparison of the second edition, written down in docs/primary.md before its run.

    python examples/experiments/primary.py --quick      one world, one target: minutes
    python examples/experiments/primary.py              3 bases x 5 seeds x 2 targets
    python examples/experiments/primary.py --tables     what is there
    python examples/experiments/primary.py --leaderboard    the same, defense by defense
    python examples/experiments/primary.py --defences mine.py:trim --worlds 3 --leaderboard    with one of yours

A stealthy BadMerging attack whose patch differs in size and place from the defender's probes, on a task that no defense
was chosen on. Each defense has a front: a point for every strength, on validation rows (by which a strength is taken)
and on test rows. The headline is the ASR where so much of the attacked task's gain over the base is retained.
"""

import argparse
import os
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from itertools import product
from statistics import fmean
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench import cells, data, mine, second, zoo
from bench.defenders import Defence
from bench.encoders import features
from bench.heads import logits
from bench.merges import RULES, Rule
from bench.progress import progress
from bench.second import Attack, Job, World
from bench.second_tables import leaderboard, tables
from bench.zoo import workforce
from taskvec import BackdoorVector, TaskVector, defenses, merge
from taskvec.merges import mean
from taskvec.metrics import spectrum

TABLE = "primary.jsonl"
TASK, TARGETS = "fashion", (3, 8)
WORLDS = tuple(World(seed, base) for seed in (30, 31, 32, 33, 34) for base in (0, 1, 2))
MERGES = ("task arithmetic", "TIES")
ATTACKS = {
    "stealthy": Attack(weight=2.0, normalised=True),
    "noisy": Attack(),
}
VALIDATED = {True: 300, False: 100}  # validation rows of the attacked task, and of each other
TESTED = {True: 600, False: 100}

Params = Mapping[str, Tensor]


class Cell(NamedTuple):
    """One attack of one world under one merge."""

    world: World
    target: int
    attack: str
    rule: str


# --- what a defender sees and does -----------------------------------------------------------------------------------


class Scene(NamedTuple):
    """A merge to defend.

    Attributes:
        base: the pre-trained model.
        task: the attacked one, which the defender has probes of.
        vectors: task -> the contributor's task vector.
        rule: of the merge.
        probes: class -> the defender's probe.
        found: contributor -> the probes of the classes that it is flagged for.
        suspect: the contributor and the class of the highest score, flagged or not.
        others: clean vectors of the attacked task, for defenses that are given more.
        planted: what the attack added; for the oracle alone.
    """

    base: Params
    task: str
    vectors: Mapping[str, TaskVector]
    rule: Rule
    probes: Mapping[int, BackdoorVector]
    found: Mapping[str, Sequence[BackdoorVector]]
    suspect: tuple[str, int]
    others: Sequence[TaskVector]
    planted: TaskVector


def merged(scene: Scene, changed: Mapping[str, TaskVector] | None = None) -> Params:
    """The merge, with some contributors' vectors replaced."""
    vectors = {**scene.vectors, **(changed or {})}
    return scene.rule.merge(list(vectors.values())).apply(scene.base, scene.rule.scale)


def nothing(scene: Scene, _by: float) -> Params:
    return merged(scene)


def shrinking(scene: Scene, by: float) -> Params:
    return defenses.shrink(merged(scene), scene.base, by)


def clipping(scene: Scene, by: float) -> Params:
    """All contributors at most at (1 - by) times the median norm."""
    if by == 1:
        return scene.base
    clipped = defenses.clip_norms(list(scene.vectors.values()), 1 / (1 - by))
    return merged(scene, dict(zip(scene.vectors, clipped, strict=True)))


def subtracting(scene: Scene, by: float) -> Params:
    """IBVS with the probe of the class that the bank suspects most."""
    return defenses.injection_subtraction(merged(scene), scene.probes[scene.suspect[1]], by)


def subtracting_noise(scene: Scene, by: float) -> Params:
    """Its control: a random vector of the same norm in each tensor."""
    probe = scene.probes[scene.suspect[1]]
    return defenses.injection_subtraction(merged(scene), defenses.random_twin(probe, seed=0), by)


def consensus(scene: Scene, by: float) -> Params:
    """What all probes of the bank agree on."""
    return defenses.consensus_subtraction(merged(scene), list(scene.probes.values()), by, agree=0.8)


def then_shrinking(change: Callable[[Scene], Mapping[str, TaskVector]], scene: Scene, by: float) -> Params:
    """Contributors changed, then the merge shrunk by what is beyond 1."""
    return defenses.shrink(merged(scene, change(scene)), scene.base, by - 1)


def without_flagged(scene: Scene) -> dict[str, TaskVector]:
    return {task: scene.vectors[task] * 0 for task in scene.found}


def halved(scene: Scene) -> dict[str, TaskVector]:
    return {task: scene.vectors[task] / 2 for task in scene.found}


def disarmed(scene: Scene) -> dict[str, TaskVector]:
    return {task: defenses.disarm(scene.vectors[task], own) for task, own in scene.found.items()}


def disarmed_by_size(scene: Scene) -> dict[str, TaskVector]:
    """No entry loses more than twice what the probes have there."""
    return {task: defenses.disarm(scene.vectors[task], own, 2.0) for task, own in scene.found.items()}


def disarmed_of_a_wrong_class(scene: Scene) -> dict[str, TaskVector]:
    """The control of disarming: the same contributors, the probe of another class."""
    wrong = scene.probes[(scene.suspect[1] + 5) % len(scene.probes)]
    return {task: defenses.disarm(scene.vectors[task], [wrong]) for task in scene.found}


def without_longest(scene: Scene) -> dict[str, TaskVector]:
    longest = max(scene.vectors, key=lambda task: float(scene.vectors[task].norm()))
    return {longest: scene.vectors[longest] * 0}


def without_steepest(scene: Scene) -> dict[str, TaskVector]:
    """Without the contributor whose matrices have the largest share of their energy in one direction."""

    def steepness(v: TaskVector) -> float:
        return fmean(float(s[0].square() / s.square().sum()) for s in spectrum(v).values())

    steepest = max(scene.vectors, key=lambda task: steepness(scene.vectors[task]))
    return {steepest: scene.vectors[steepest] * 0}


def averaged(scene: Scene) -> dict[str, TaskVector]:
    """WAG + 2: the attacked task's contributor with two clean models of it."""
    return {scene.task: merge([scene.vectors[scene.task], *scene.others], mean)}


def oracle(scene: Scene, by: float) -> Params:
    return merged(scene, {scene.task: scene.vectors[scene.task] - scene.planted * by})


SHRINKS = (0.15, 0.3, 0.45, 0.6, 0.8, 1.0)
BEYOND = (1.0, *(1 + by for by in SHRINKS))
SCALES = (0.1, 0.25, 0.5, 1.0, 2.0, 4.0)
BANK = "10 images a class of the task, the head, the attack's recipe"
DEFENCES: dict[str, Defence] = {
    "none": Defence("nothing", nothing, (0.0,)),
    "shrinking": Defence("the base", shrinking, SHRINKS),
    "clipping": Defence("nothing", clipping, SHRINKS),
    "IBVS, the bank's probe": Defence(BANK, subtracting, SCALES),
    "random vector of its norm": Defence("nothing", subtracting_noise, SCALES),
    "consensus of the bank": Defence(BANK, consensus, SCALES),
    "bank: leave out": Defence(BANK, partial(then_shrinking, without_flagged), BEYOND),
    "bank: halve": Defence(BANK, partial(then_shrinking, halved), BEYOND),
    "bank: disarm": Defence(BANK, partial(then_shrinking, disarmed), BEYOND),
    "bank: disarm by size": Defence(BANK, partial(then_shrinking, disarmed_by_size), BEYOND),
    "bank: disarm, wrong class": Defence(BANK, partial(then_shrinking, disarmed_of_a_wrong_class), BEYOND),
    "drop the longest": Defence("the base", partial(then_shrinking, without_longest), BEYOND),
    "drop the steepest": Defence("the base", partial(then_shrinking, without_steepest), BEYOND),
    "WAG + 2": Defence("2 clean models of the task", partial(then_shrinking, averaged), BEYOND),
    "oracle": Defence("the attack's own vector", oracle, (0.25, 0.5, 0.75, 1.0)),
}


def yours(scene: Scene, by: float, *, own: Callable[[Params, Params, float], Params]) -> Params:
    """A defense of one function: of the merged model, the base, and a strength."""
    return own(merged(scene), scene.base, by)


def defence_of(name: str) -> Defence:
    """One of ours, or one of yours, as `mine.py:trim`."""
    if name in DEFENCES:
        return DEFENCES[name]
    own = mine.function(name)
    return Defence("the base", partial(yours, own=own), mine.strengths(own))


# --- measuring -------------------------------------------------------------------------------------------------------


@cache
def probes(world: World) -> dict[int, BackdoorVector]:
    return {c: second.probe(job) for c, job in second.bank(world, TASK).items()}


def job_of(cell: Cell) -> Job:
    return Job(cell.world, TASK, attack=ATTACKS[cell.attack], target=cell.target)


def scene(cell: Cell, attacker: Job) -> Scene:
    """The merge with one contributor's model; with the clean twin, the all-clean merge."""
    jobs = second.contributors(cell.world) | {TASK: attacker}
    vectors = {task: second.vector(job) for task, job in jobs.items()}
    bank, tasks = probes(cell.world), list(vectors)
    scores = defenses.bank_scores(vectors.values(), {c: [own] for c, own in bank.items()})
    found: dict[str, list[BackdoorVector]] = {}
    for flag in defenses.flagged(scores):
        found.setdefault(tasks[flag.contributor], []).append(bank[flag.label])
    highest = max(
        ((score, tasks[i], c) for i, row in enumerate(scores) for c, score in row.items()), key=lambda x: x[0]
    )
    others = [second.vector(job) for job in second.others(cell.world, TASK, 2)]
    planted = vectors[TASK] - second.vector(attacker.twin())
    base = zoo.base(cell.world.setting)
    return Scene(base, TASK, vectors, RULES[cell.rule], bank, found, highest[1:], others, planted)


def classes(world: World, params: Params, images: Tensor, task: str) -> Tensor:
    setting = world.setting
    with torch.no_grad():
        parts = [features(zoo.architecture(setting).module, dict(params), part) for part in images.split(250)]
        return logits(torch.cat(parts), zoo.head(setting, task)).argmax(1)


def hits(world: World, params: Params, split: data.Split, task: str) -> list[int]:
    return [int((classes(world, params, split.images, task) == split.labels).sum()), len(split.labels)]


@cache
def triggered(job: Job) -> Tensor:
    """The test images of other classes, with the trigger."""
    split = data.test(TASK).take(slice(TESTED[True]))
    return second.trigger_of(job)(split.images[split.labels != job.target])


def point(cell: Cell, params: Params) -> dict[str, Any]:
    """A model: accuracies on validation and on test rows, own task and mean, and ASR, as fractions or [hits, n]."""
    world, job = cell.world, job_of(cell)

    def right(part: Callable[[str], data.Split], most: Mapping[bool, int]) -> dict[str, list[int]]:
        return {t: hits(world, params, part(t).take(slice(most[t == TASK])), t) for t in data.TASKS}

    own = triggered(job)
    fooled = int((classes(world, params, own, TASK) == cell.target).sum())
    return {
        "validation": right(data.validation, VALIDATED),
        "test": right(data.test, TESTED),
        "asr": [fooled, len(own)],
    }


def measured(cell: Cell, name: str) -> dict[str, Any]:
    """The front of a defense, that of the all-clean merge defended alike, and whom the bank flagged."""
    attacked, clean = scene(cell, job_of(cell)), scene(cell, job_of(cell).twin())
    defence = defence_of(name)
    front = {f"{by:g}": point(cell, defence.defend(attacked, by)) for by in defence.strengths}
    control = {
        f"{by:g}": point(cell, defence.defend(clean, by))
        for by in defence.strengths[:: max(1, len(defence.strengths) // 3)]
    }
    return {"front": front, "clean": control, "flagged": sorted(attacked.found), "false": sorted(clean.found)}


def controls(world: World, target: int, attack: str) -> dict[str, Any]:
    """The base and the clean single model, asked about the same rows."""
    cell = Cell(world, target, attack, MERGES[0])
    single = second.model(job_of(cell).twin())
    return {"base": point(cell, zoo.base(world.setting)), "clean model": point(cell, single)}


def key_of(cell: Cell, name: str) -> str:
    defence = None if name == "controls" else defence_of(name)
    code = [cells.code_of(f) for f in (second.model, point, scene, *([defence.defend] if defence else []))]
    told = {
        "job": second.told(job_of(cell)),
        "rule": cell.rule,
        "name": name,
        "strengths": list(defence.strengths) if defence else [],
        "rows": [[VALIDATED[own], TESTED[own]] for own in (True, False)],
        "code": code,
    }
    return cells.key(told)


def fill(cell: Cell, names: Sequence[str]) -> None:
    """Measure the rows of a cell that are not there, each written when it is measured."""
    path = cells.FOLDER / TABLE
    kept = cells.read(path)
    for name in names:
        key = key_of(cell, name)
        if key in kept or (name == "controls" and cell.rule != MERGES[0]):
            continue
        row = controls(cell.world, cell.target, cell.attack) if name == "controls" else measured(cell, name)
        label = [cell.world.base, cell.world.seed, cell.target, cell.attack, cell.rule, name]
        cells.append(path, key, label, row)


def train(jobs: Sequence[Job], workers: int) -> None:
    """Train what is missing, side by side, clean models first: probes and attacks are compared with them."""
    for world in dict.fromkeys(job.world for job in jobs):
        zoo.prepare(world.setting, [])
    with workforce(workers) as pool:
        twins = [job for job in jobs if job.attack is None]
        zoo.at_once(pool, "clean models", second.model, twins)
        zoo.at_once(pool, "attacks and probes", second.model, [job for job in jobs if job.attack is not None])


def kept_rows(wanted: Sequence[Cell], names: Sequence[str] = ()) -> dict[tuple[Cell, str], Any]:
    """All rows that there are of some cells: of our defenses, and of some of yours."""
    kept, asked = cells.read(cells.FOLDER / TABLE), dict.fromkeys(["controls", *DEFENCES, *names])
    return {(c, n): kept[key] for c in wanted for n in asked if (key := key_of(c, n)) in kept}


def every_cell(worlds: Sequence[World] = WORLDS) -> list[Cell]:
    return [Cell(*found) for found in product(worlds, TARGETS, ATTACKS, MERGES)]


def board(wanted: Sequence[Cell], names: Sequence[str] = ()) -> str:
    """The page docs/tables/leaderboard.txt, with your defenses among the others."""
    given = {name: defence_of(name).given for name in dict.fromkeys([*DEFENCES, *names])}
    return leaderboard(kept_rows(wanted, names), given, TASK)


def defence_name(name: str) -> str:
    """A name on the command line."""
    if name in DEFENCES or mine.is_mine(name):
        return name
    raise argparse.ArgumentTypeError(f"one of {', '.join(DEFENCES)}, or a function as mine.py:name; not {name!r}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one world, one target, the stealthy attack")
    parser.add_argument("--attacks", nargs="+", choices=ATTACKS, default=list(ATTACKS))
    parser.add_argument(
        "--defences", nargs="+", type=defence_name, default=list(DEFENCES), help="also of your own, as mine.py:name"
    )
    parser.add_argument("--worlds", type=int, default=len(WORLDS), help="so many of them")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--tables", action="store_true", help="print what is there, measure nothing")
    parser.add_argument("--leaderboard", action="store_true", help="print one table of all defenses in the end")
    given = parser.parse_args()
    start = time.monotonic()
    torch.set_num_threads(1)
    worlds, targets = (WORLDS[:1], TARGETS[:1]) if given.quick else (WORLDS[: given.worlds], TARGETS)
    attacks = ["stealthy"] if given.quick else given.attacks
    names = ["controls", *given.defences]
    wanted = [Cell(*found) for found in product(worlds, targets, attacks, MERGES)]
    if not given.tables and (not given.leaderboard or {*given.defences} - {*DEFENCES}):
        kept = cells.read(cells.FOLDER / TABLE)
        todo = [
            c for c in wanted if any(key_of(c, n) not in kept for n in names if n != "controls" or c.rule == MERGES[0])
        ]
        if todo:
            used = list(dict.fromkeys(c.world for c in todo))
            train(second.everything(used, TASK, {ATTACKS[a]: targets for a in attacks}), given.workers)
            with workforce(given.workers) as pool, progress("cells", len(todo)) as step:
                for _ in pool.map(partial(fill, names=names), todo):
                    step()
    if given.leaderboard:
        print(board(wanted, given.defences))
    else:
        print(tables(kept_rows(wanted), list(DEFENCES), TASK))
    print(f"{time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
