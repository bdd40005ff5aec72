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
from collections.abc import Sequence
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import torch

from bench import cells, mine, second, zoo
from bench.second import Attack, Job, World
from bench.second_defenders import DEFENCES, defence_of
from bench.second_measures import TESTED, VALIDATED, point, scene
from bench.second_tables import leaderboard, tables
from bench.zoo import workforce

TABLE = "primary.jsonl"
TASK, TARGETS = "fashion", (3, 8)
WORLDS = tuple(World(seed, base) for seed in (30, 31, 32, 33, 34) for base in (0, 1, 2))
MERGES = ("task arithmetic", "TIES")
ATTACKS = {
    "stealthy": Attack(weight=2.0, normalised=True),
    "noisy": Attack(),
}


class Cell(NamedTuple):
    """One attack of one world under one merge."""

    world: World
    target: int
    attack: str
    rule: str


# --- measuring -------------------------------------------------------------------------------------------------------


def job_of(cell: Cell) -> Job:
    return Job(cell.world, TASK, attack=ATTACKS[cell.attack], target=cell.target)


def measured(cell: Cell, name: str) -> dict[str, Any]:
    """The front of a defense, that of the all-clean merge defended alike, and whom the bank flagged."""
    job, defence = job_of(cell), defence_of(name)
    attacked, clean = scene(job, cell.rule), scene(job.twin(), cell.rule)
    front = {f"{by:g}": point(job, defence.defend(attacked, by)) for by in defence.strengths}
    control = {
        f"{by:g}": point(job, defence.defend(clean, by))
        for by in defence.strengths[:: max(1, len(defence.strengths) // 3)]
    }
    return {"front": front, "clean": control, "flagged": sorted(attacked.found), "false": sorted(clean.found)}


def controls(world: World, target: int, attack: str) -> dict[str, Any]:
    """The base and the clean single model, asked about the same rows."""
    job = job_of(Cell(world, target, attack, MERGES[0]))
    return {"base": point(job, zoo.base(world.setting)), "clean model": point(job, second.model(job.twin()))}


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
            with workforce(given.workers) as pool:
                second.train_all(pool, second.everything(used, TASK, {ATTACKS[a]: targets for a in attacks}))
                zoo.at_once(pool, "cells", partial(fill, names=names), todo)
    if given.leaderboard:
        print(board(wanted, given.defences))
    else:
        print(tables(kept_rows(wanted), list(DEFENCES), TASK))
    print(f"{time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
