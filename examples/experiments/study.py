"""The study: attacks on merges, and what defenses make of them, each beside its controls.

    python examples/experiments/study.py --quick    minutes: one seed, the small ViT, a part of the table
    python examples/experiments/study.py --defence mine.py:trim --task animal --quick    yours, beside all others
    python examples/experiments/study.py --encoder vits --task animal --tables    the tables of what is there
    python examples/experiments/study.py --families    the families of comparisons, corrected by Holm
    python examples/experiments/study.py --encoder vit7 --task animal    hours: 5 seeds x 2 targets

A cell is one attack of one seed and target: all merges, all defenses. Each of its rows is a line of a file, so that a
run that was stopped goes on where it was. The full run's rows are in examples/experiments/results.
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

import study_sbv
from bench import asking, attackers, cells, data, defenders, handed, mine, report, tables, zoo
from bench import cache as disk
from bench.defenders import DEFENCES, TWINS, Scene
from bench.handed import ATTACKERS, Handed
from bench.merges import RULES
from bench.progress import progress
from bench.zoo import Setting
from taskvec import TaskVector
from taskvec.defenses import choose_strength
from taskvec.metrics import Rate, accuracy, attack_success_rate

TABLE = "study.jsonl"
QUICK = Path(__file__).parent / ".cache" / "study"
KEEP = 0.98  # the share of the undefended merge's validation accuracy that a defense must leave
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
    bank: defenders.Bank


Row = dict[str, disk.Json]
Rows = dict[str, dict[str, Row]]
"""merge -> defense -> row."""


# --- one cell --------------------------------------------------------------------------------------------------------


def fill(folder: Path, cell: Cell) -> None:
    """Measure the rows of a cell that are not there yet; each is written when it is measured."""
    rows = earlier(folder, cell)
    attack = mine.attacker(cell.attack)(Setting(cell.encoder), cell.task, cell.target, cell.seed)
    for rule in cell.merges:
        todo = [name for name in cell.defences if name not in rows.setdefault(rule, {})]
        scenes = [scene(cell, who, rule) for who in (attack, Handed({}, attack.plan))] if todo else []
        for name in todo:
            rows[rule][name] = measured(cell, attack, *scenes, name, rows[rule])
            label = [cell.encoder, cell.task, cell.attack, cell.target, cell.seed, rule, name]
            cells.append(folder / TABLE, key_of(cell, rule, name), label, rows[rule][name])


def about(cell: Cell) -> dict[str, disk.Json]:
    """What a cell's figures depend on, beside its name."""
    shared = {"setting": zoo.settings(Setting(cell.encoder)), "rows": [ROWS, OTHER_ROWS], "swept": SWEPT, "keep": KEEP}
    return json.loads(json.dumps(shared | {"bank": cell.bank._asdict()}))


def key_of(cell: Cell, rule: str, name: str) -> str:
    """The key of a row: its cell, its settings, its strengths, and the code of its attack, merge and defense."""
    defence = None if mine.is_twin(name) else mine.defence(name)
    told = {
        "about": about(cell),
        "cell": [cell.encoder, cell.task, cell.target, cell.seed, cell.attack, rule, name],
        "strengths": list(defence.strengths) if defence else [],
        "code": [*codes(cell.attack, rule, name)],
    }
    return cells.key(told)


@cache
def codes(attack: str, rule: str, name: str) -> tuple[str, ...]:
    defence = defenders.subtracting if mine.is_twin(name) else mine.defence(name).defend
    return tuple(cells.code_of(f) for f in (mine.attacker(attack), mine.rule(rule).merge, defence))


def earlier(folder: Path, cell: Cell, kept: Mapping[str, Row] | None = None) -> Rows:
    """The rows measured before, if they were made in the same way."""
    kept = cells.read(folder / TABLE) if kept is None else kept
    found = {
        rule: {name: kept[own] for name in cell.defences if (own := key_of(cell, rule, name)) in kept}
        for rule in cell.merges
    }
    return {rule: rows for rule, rows in found.items() if rows}


def missing(cell: Cell, kept: Mapping[str, Row]) -> bool:
    return any(key_of(cell, rule, name) not in kept for rule in cell.merges for name in cell.defences)


def scene(cell: Cell, attack: Handed, rule: str) -> Scene:
    """The merge that holds what the attackers handed in."""
    setting, how = Setting(cell.encoder), mine.rule(rule)
    clean = clean_models(setting, cell.seed)
    vectors = {task: TaskVector.between(zoo.base(setting), model) for task, model in {**clean, **attack.models}.items()}
    whole, stolen = defenders.merged(setting, how, vectors), handed.planted(setting, attack, clean)
    found = defenders.found(defenders.bank(setting, cell.bank), vectors)
    return Scene(setting, cell.task, vectors, how, whole, found, stolen)


@cache
def clean_models(setting: Setting, seed: int) -> dict[str, zoo.Params]:
    return handed.contributors(setting, seed)


def measured(cell: Cell, attack: Handed, attacked: Scene, clean: Scene, name: str, done: Mapping[str, Row]) -> Row:
    """One defense under one merge: its front on validation images, and the test figures at the chosen strength."""
    if mine.is_twin(name):  # of the probe, at its strength
        by = done["IBVS"]["strength"]
        draws = [
            tested(cell, attack, *(defenders.subtracting(own, by, vector=twin) for own in (attacked, clean)))
            for twin in TWINS[name]
        ]
        return {"task": cell.task, "given": "nothing", "strength": by, "draws": draws}
    defence = mine.defence(name)
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
    setting, model = Setting(cell.encoder), asking.model(params)
    rates = [
        accuracy(
            partial(asking.remembering(setting), model, task=task), *data.validation(task, SWEPT), batch=asking.WHOLE
        )
        for task in data.TASKS
    ]
    fooled = success(cell, attack, params, data.validation(cell.task, SWEPT))
    return {"accuracy": sum(rate.value for rate in rates) / len(rates), "asr": fooled.value}


def tested(cell: Cell, attack: Handed, params: zoo.Params, clean: zoo.Params) -> Row:
    """ASR and accuracies on test images, as [hits, n], and the same of the all-clean merge, defended alike."""
    setting = Setting(cell.encoder)
    tests = {task: data.test(task).take(slice(ROWS if task == cell.task else OTHER_ROWS)) for task in data.TASKS}

    def right(own: zoo.Params) -> dict[str, list[int]]:
        model = asking.model(own)
        rates = {
            task: accuracy(partial(asking.remembering(setting), model, task=task), *tests[task], batch=asking.WHOLE)
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
        partial(asking.remembering(setting), asking.model(params), task=cell.task),
        *split,
        target=cell.target,
        trigger=attackers.trigger_of(setting, plan, plan.backdoors[0]),
        batch=asking.WHOLE,
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
        recipes += [zoo.Recipe(task, defenders.SEED, cell.bank.rows) for cell in own for task in cell.bank.tasks]
        zoo.at_once(executor, f"fine-tuning {encoder}", partial(zoo.fine_tuned, setting), dict.fromkeys(recipes))
        plans = [plan for cell in own for by_place in cell.bank.plans().values() for plan in by_place]
        zoo.at_once(executor, f"bank of {encoder}", partial(attackers.upload, setting), dict.fromkeys(plans))


def run(folder: Path, wanted: Sequence[Cell], executor: Executor) -> None:
    """Fill the cells that are not there yet, on whatever executes them."""
    kept = cells.read(folder / TABLE)
    if todo := [cell for cell in wanted if missing(cell, kept)]:
        prepare(todo, executor)
        with progress("cells", len(todo)) as step:
            for _ in executor.map(partial(fill, folder), todo):
                step()


def finish(folder: Path, title: str, wanted: Sequence[Cell], pictures: Path | None) -> None:
    """Print the tables of what is there, and draw its pictures where a folder is given for them."""
    kept = cells.read(folder / TABLE)
    rows = {cell: found for cell in wanted if (found := earlier(folder, cell, kept))}
    print(tables.everything(title, rows), tables.glance(title, rows), sep="\n")
    if pictures and folder != QUICK:
        for page, text in pages(title, rows).items():
            (pictures.parent / "tables" / page).write_text(text, "utf-8")
    for attack in tables.named(rows)[0] if pictures else []:
        first = next(iter(rows))
        name = f"{first.encoder}-{first.task}-{attack.replace(' ', '-')}"
        if folder == QUICK or name in SHOWN:
            tables.draw(pictures / f"study-{name}.png", rows, attack)


def pages(title: str, rows: Mapping[Cell, Rows]) -> dict[str, str]:
    """The tables of the docs that are of these rows: file -> text."""
    shown = {"vit7": ("", tables.everything), "vits": ("-glance", tables.glance)}
    first = next(iter(rows))
    if first.task != "animal" or first.encoder not in shown:
        return {}
    suffix, text = shown[first.encoder]
    return {f"study-{first.encoder}-animal{suffix}.txt": text(title, rows).strip() + "\n"}


def kept_cells(encoder: str, task: str, attacks: Sequence[str] = ()) -> list[Cell]:
    """Every cell that the tables of an encoder and a task are of, whichever a run was for."""
    whole = tuple(dict.fromkeys([*DEFENCES, *TWINS]))
    found = product(SEEDS, TARGETS, dict.fromkeys([*ATTACKERS, *attacks]))
    bank = defenders.Bank()
    return [Cell(encoder, task, target, seed, attack, tuple(RULES), whole, bank) for seed, target, attack in found]


def families() -> str:
    """Families of comparisons, corrected by Holm: the page docs/tables/families.txt."""
    kept = cells.read(cells.FOLDER / TABLE)

    def rows(encoder: str, task: str) -> Mapping[Cell, Rows]:
        return {cell: found for cell in kept_cells(encoder, task) if (found := earlier(cells.FOLDER, cell, kept))}

    written_down = [
        tables.family_table(family, {encoder: rows(encoder, family.task) for encoder in family.encoders})
        for family in tables.FAMILIES
    ]
    return "\n".join([*written_down, study_sbv.family(report.kept("sbv", "vits-mnist")["rows"])])


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one seed and target, the small ViT, three attacks")
    parser.add_argument("--encoder", choices=["vits", "vit7", "cnn"], default="vit7")
    parser.add_argument("--task", choices=data.TASKS, default="animal", help="the attacked one")
    own = "or one of your own, as mine.py:name"
    parser.add_argument("--attack", action="append", help=f"one only: {', '.join(ATTACKERS)}; {own}, beside all")
    parser.add_argument(
        "--merge", action="append", help=f"task arithmetic and TIES by default: {', '.join(RULES)}; {own}"
    )
    parser.add_argument("--defence", action="append", default=[], help="one of your own, as mine.py:name, beside all")
    parser.add_argument("--targets", type=int, nargs="+", default=TARGETS)
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--tables", action="store_true", help="print the tables of what is there, measure nothing")
    parser.add_argument("--families", action="store_true", help="print the families of comparisons, by Holm")
    parser.add_argument("--pictures", type=Path, help="a folder to draw pictures into")
    given = parser.parse_args()
    known = {"attack": ATTACKERS, "merge": RULES, "defence": DEFENCES}
    for kind, names in known.items():
        for name in getattr(given, kind) or []:
            if name not in names and not mine.is_mine(name):
                parser.error(f"--{kind} is one of {', '.join(names)}, or a function as mine.py:name; not {name!r}")
    if not all(0 <= target < len(data.CLASSES[given.task]) for target in given.targets):
        parser.error(f"targets of {given.task} are 0 to {len(data.CLASSES[given.task]) - 1}")
    return given


def main() -> None:
    given = options()
    if given.families:
        print(families())
        return
    start = time.monotonic()
    torch.set_num_threads(1)
    encoder, targets, seeds, folder, bank = given.encoder, given.targets, given.seeds, cells.FOLDER, defenders.Bank()
    usual = tuple(ATTACKERS)
    if given.quick:
        encoder, targets, seeds, folder, bank = "vits", [1], [0], QUICK, defenders.Bank((given.task,))
        usual = ("none", "BadNets", "BadMerging-on")
    asked = given.attack or list(usual)
    names = tuple(dict.fromkeys([*(usual if any(map(mine.is_mine, asked)) else ()), *asked]))
    added = [name for name in given.merge or [] if mine.is_mine(name)]
    merges = tuple(dict.fromkeys([*(MERGES if added or not given.merge else ()), *(given.merge or ())]))
    whole = tuple(dict.fromkeys([*DEFENCES, *TWINS, *given.defence]))

    def every(attacks: Sequence[str], targets: Sequence[int], seeds: Sequence[int]) -> list[Cell]:
        found = product(seeds, targets, attacks)
        return [Cell(encoder, given.task, target, seed, attack, merges, whole, bank) for seed, target, attack in found]

    if not given.tables:
        with zoo.workforce(given.workers) as executor:
            run(folder, every(names, targets, seeds), executor)
    rules = tuple(dict.fromkeys([*RULES, *merges]))
    shown = (
        [cell._replace(merges=rules) for cell in every(names, targets, seeds)]
        if given.quick
        else [cell._replace(merges=rules, defences=whole) for cell in kept_cells(encoder, given.task, names)]
    )
    finish(folder, f"{encoder}, the attacked task is {given.task}", shown, given.pictures)
    print(f"{time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
