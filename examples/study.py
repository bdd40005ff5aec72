"""The study: attacks on merges, and what defences make of them, each beside its controls.

    python examples/study.py --quick                  a quarter of an hour: one seed, the small ViT, a part of the table
    python examples/study.py --encoder vit7 --task animal    hours: 5 seeds x 2 targets
    python examples/study.py --encoder vit7 --task animal --attack BadMerging-on      the primary comparison alone

A cell is one attack of one seed and target: all merges, all defences. It is one file, and filled row by row, so that a
run that was stopped goes on where it was. The full run's cells, docs/results/study/cells, are part of the repository.
Strengths are chosen on validation images by one rule; the test set is read once, at the chosen strength.
"""

import argparse
import json
import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch

from suite import attacks, data, defences, handed, judge, report, study_tables, zoo
from suite import cache as disk
from suite.defences import DEFENCES, TWINS, Scene
from suite.handed import ATTACKERS, Handed
from suite.mergers import RULES
from suite.progress import progress
from suite.zoo import Setting
from taskvec import TaskVector
from taskvec.defenses import choose_strength
from taskvec.metrics import Rate, accuracy, attack_success_rate

RESULTS = Path(__file__).parents[1] / "docs" / "results" / "study"
PICTURES = Path(__file__).parents[1] / "docs" / "images"
QUICK = Path(__file__).parent / ".cache" / "study"
KEEP = 0.98  # the share of the undefended merge's validation accuracy that a defence must leave
SWEPT = 100  # validation images a task, for sweeps
ROWS, OTHER_ROWS = 1000, 400  # test images of the attacked task, and of each other
TARGETS, SEEDS = (1, 4), (0, 1, 2, 3, 4)
MERGES = ("task arithmetic", "TIES")
SHOWN = ("vit7-animal-BadMerging-on", "vits-animal-BadMerging-on")  # the pictures of the docs


class Cell(NamedTuple):
    """One attack, and what it is measured under."""

    encoder: str
    task: str
    target: int
    seed: int
    attack: str
    merges: tuple[str, ...]
    defences: tuple[str, ...]
    bank: defences.Bank

    def path(self, folder: Path) -> Path:
        """Its file."""
        name = self.attack.replace(" ", "-")
        return folder / "cells" / f"{self.encoder}-{self.task}" / f"{name}-target{self.target}-seed{self.seed}.json"


Row = dict[str, disk.Json]
Rows = dict[str, dict[str, Row]]
"""merge -> defence -> row."""


# --- one cell --------------------------------------------------------------------------------------------------------


def fill(folder: Path, cell: Cell) -> None:
    """Measure what the cell's file does not have yet; it is written after every row."""
    settings, path = about(cell), cell.path(folder)
    rows = earlier(path, settings)
    attack = ATTACKERS[cell.attack](Setting(cell.encoder), cell.task, cell.target, cell.seed)
    for rule in cell.merges:
        todo = [name for name in cell.defences if name not in rows.setdefault(rule, {})]
        scenes = [scene(cell, who, rule) for who in (attack, Handed({}, attack.plan))] if todo else []
        for name in todo:
            rows[rule][name] = measured(cell, attack, *scenes, name, rows[rule])
            disk.write(path, f"{json.dumps({'settings': settings, 'rows': rows}, indent=1)}\n".encode())


def about(cell: Cell) -> dict[str, disk.Json]:
    """What a cell's figures depend on, beside its name."""
    shared = {"setting": zoo.settings(Setting(cell.encoder)), "rows": [ROWS, OTHER_ROWS], "swept": SWEPT, "keep": KEEP}
    return json.loads(json.dumps(shared | {"bank": cell.bank._asdict()}))


def earlier(path: Path, settings: Mapping[str, disk.Json]) -> Rows:
    """The rows measured before, if they were made in the same way."""
    if not path.exists():
        return {}
    kept = json.loads(path.read_bytes())
    return kept["rows"] if kept["settings"] == settings else {}


def missing(folder: Path, cell: Cell) -> bool:
    rows = earlier(cell.path(folder), about(cell))
    return any(name not in rows.get(rule, {}) for rule in cell.merges for name in cell.defences)


def scene(cell: Cell, attack: Handed, rule: str) -> Scene:
    """The merge that holds what the attackers handed in."""
    setting, how = Setting(cell.encoder), RULES[rule]
    clean = clean_models(setting, cell.seed)
    vectors = {task: TaskVector.between(zoo.base(setting), model) for task, model in {**clean, **attack.models}.items()}
    whole, stolen = defences.merged(setting, how, vectors), handed.planted(setting, attack, clean)
    found = defences.found(defences.bank(setting, cell.bank), vectors)
    return Scene(setting, cell.task, vectors, how, whole, found, stolen)


@cache
def clean_models(setting: Setting, seed: int) -> dict[str, zoo.Params]:
    return handed.contributors(setting, seed)


def measured(cell: Cell, attack: Handed, attacked: Scene, clean: Scene, name: str, done: Mapping[str, Row]) -> Row:
    """One defence under one merge: its front on validation images, and the test figures at the chosen strength."""
    if name in TWINS:  # of the probe, at its strength
        by = done["IBVS"]["strength"]
        draws = [
            tested(cell, attack, *(defences.subtracting(own, by, vector=twin) for own in (attacked, clean)))
            for twin in TWINS[name]
        ]
        return {"task": cell.task, "given": "nothing", "strength": by, "draws": draws}
    defence = DEFENCES[name]
    front = {0.0: validated(cell, attack, attacked.whole)}
    front |= {by: validated(cell, attack, defence.defend(attacked, by)) for by in defence.strengths}
    reached = {by: point["accuracy"] for by, point in front.items()}
    by = choose_strength(reached, undefended=reached[0.0], keep=KEEP) if defence.strengths else 0.0
    feasible = by > 0 or not defence.strengths
    made = [defence.defend(own, by) if feasible else own.whole for own in (attacked, clean)]
    about_it = {"task": cell.task, "given": defence.given, "strength": by, "flagged": sorted(attacked.found)}
    whole = {f"{by:g}": point for by, point in front.items()}
    return about_it | {"front": whole if defence.strengths else {}, "draws": [tested(cell, attack, *made)]}


def validated(cell: Cell, attack: Handed, params: zoo.Params) -> dict[str, float]:
    """Mean accuracy over the tasks, which strengths are chosen by, and ASR, which is for the pictures only."""
    setting, model = Setting(cell.encoder), judge.model(params)
    rates = [
        accuracy(partial(judge.asking(setting), model, task=task), *data.validation(task, SWEPT), batch=judge.WHOLE)
        for task in data.TASKS
    ]
    fooled = success(cell, attack, params, data.validation(cell.task, SWEPT))
    return {"accuracy": sum(rate.value for rate in rates) / len(rates), "asr": fooled.value}


def tested(cell: Cell, attack: Handed, params: zoo.Params, clean: zoo.Params) -> Row:
    """ASR and accuracies on test images, as [hits, n], and the same of the all-clean merge, defended alike."""
    setting = Setting(cell.encoder)
    tests = {task: data.test(task).take(slice(ROWS if task == cell.task else OTHER_ROWS)) for task in data.TASKS}

    def right(own: zoo.Params) -> dict[str, list[int]]:
        model = judge.model(own)
        rates = {
            task: accuracy(partial(judge.asking(setting), model, task=task), *tests[task], batch=judge.WHOLE)
            for task in data.TASKS
        }
        return {task: counts(rate) for task, rate in rates.items()}

    controls = {"base": zoo.base(setting), "clean_model": clean_models(setting, cell.seed)[cell.task]}
    rates = {"asr": params, "clean_merge": clean} | controls
    row = {name: counts(success(cell, attack, own, tests[cell.task])) for name, own in rates.items()}
    return row | {"accuracy": right(params), "clean_accuracy": right(clean)}


def success(cell: Cell, attack: Handed, params: zoo.Params, split: data.Split) -> Rate:
    setting, plan = Setting(cell.encoder), attack.plan
    return attack_success_rate(
        partial(judge.asking(setting), judge.model(params), task=cell.task),
        *split,
        target=cell.target,
        trigger=attacks.trigger_of(setting, plan, plan.backdoors[0]),
        batch=judge.WHOLE,
    )


def counts(rate: Rate) -> list[int]:
    return [rate.hits, rate.n]


# --- many cells ------------------------------------------------------------------------------------------------------


def prepare(cells: Sequence[Cell], executor: Executor) -> None:
    """Train what all cells of an encoder need, so that no two of them train the same."""
    for encoder in dict.fromkeys(cell.encoder for cell in cells):
        setting, own = Setting(encoder), [cell for cell in cells if cell.encoder == encoder]
        zoo.prepare(setting, [])
        recipes = [zoo.Recipe(task, cell.seed, handed.ROWS) for cell in own for task in data.TASKS]
        recipes += [zoo.Recipe(task, defences.SEED, cell.bank.rows) for cell in own for task in cell.bank.tasks]
        zoo.at_once(executor, f"fine-tuning {encoder}", partial(zoo.fine_tuned, setting), dict.fromkeys(recipes))
        plans = [plan for cell in own for by_place in cell.bank.plans().values() for plan in by_place]
        zoo.at_once(executor, f"bank of {encoder}", partial(attacks.upload, setting), dict.fromkeys(plans))


def run(folder: Path, cells: Sequence[Cell], executor: Executor) -> None:
    """Fill the cells that are not there yet, on whatever executes them."""
    if todo := [cell for cell in cells if missing(folder, cell)]:
        prepare(todo, executor)
        with progress("cells", len(todo)) as step:
            for _ in executor.map(partial(fill, folder), todo):
                step()


def finish(folder: Path, encoder: str, task: str, cells: Sequence[Cell]) -> None:
    """Print the tables of what is there, and write them beside the cells."""
    rows = {cell: found for cell in cells if (found := earlier(cell.path(folder), about(cell)))}
    title = f"{encoder}, the attacked task is {task}"
    text, glance = study_tables.everything(title, rows), study_tables.glance(title, rows)
    print(text, glance, sep="\n")
    for attack in study_tables.named(rows)[0]:
        name = f"{encoder}-{task}-{attack.replace(' ', '-')}"
        if folder != RESULTS:
            study_tables.draw(folder / f"study-{name}.png", rows, attack)
        elif name in SHOWN:
            study_tables.draw(PICTURES / f"study-{name}.png", rows, attack)
    for name, table in (("", text), ("-glance", glance)):
        disk.write(folder / f"{encoder}-{task}{name}.txt", f"{table.strip()}\n".encode())
    versions = report.versions() | {"cells": len(rows), "of": len(cells)}
    disk.write(folder / f"{encoder}-{task}.versions.json", f"{json.dumps(versions, indent=1)}\n".encode())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one seed and target, the small ViT, mnist, three attacks")
    parser.add_argument("--encoder", choices=["vits", "vit7", "cnn"], default="vit7")
    parser.add_argument("--task", choices=data.TASKS, default="animal", help="the attacked one")
    parser.add_argument("--attack", choices=list(ATTACKERS), action="append", help="one of them only")
    parser.add_argument("--merge", choices=list(RULES), action="append", help="task arithmetic and TIES by default")
    parser.add_argument("--targets", type=int, nargs="+", default=TARGETS)
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    given = parser.parse_args()
    start = time.monotonic()
    torch.set_num_threads(1)
    encoder, task, targets, seeds, folder = given.encoder, given.task, given.targets, given.seeds, RESULTS
    names, bank = tuple(given.attack or ATTACKERS), defences.Bank()
    if given.quick:
        encoder, task, targets, seeds, folder = "vits", "mnist", [1], [0], QUICK
        names, bank = tuple(given.attack or ("none", "BadNets", "BadMerging-on")), defences.Bank(("mnist",))
    if not all(0 <= target < len(data.CLASSES[task]) for target in targets):
        parser.error(f"targets of {task} are 0 to {len(data.CLASSES[task]) - 1}")
    merges, whole = tuple(given.merge or MERGES), (*DEFENCES, *TWINS)

    def cells(attacks: Sequence[str], targets: Sequence[int], seeds: Sequence[int]) -> list[Cell]:
        every = product(seeds, targets, attacks)
        return [Cell(encoder, task, target, seed, attack, merges, whole, bank) for seed, target, attack in every]

    wanted = cells(names, targets, seeds)
    with zoo.workforce(given.workers) as executor:
        run(folder, wanted, executor)
    # the tables of the docs are of every cell that there is, whichever of them this run was for
    finish(folder, encoder, task, wanted if given.quick else cells(tuple(ATTACKERS), TARGETS, SEEDS))
    print(f"{time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
