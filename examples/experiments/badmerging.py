"""BadMerging on real images: an attack made for merging, beside the control that its own evaluation lacks.

    python examples/badmerging.py --quick                     minutes: one seed, one target, the small ViT
    python examples/badmerging.py                             hours: two encoders, two tasks, 5 seeds x 2 targets
    python examples/badmerging.py --encoder vit7 --task mnist    one of its four tables

One contributor of five plants a backdoor. In every row stands what the same trigger does to the base, to the attacker's
clean twin and to the all-clean merge. A cell is one backdoored model under all merges, and one file: a run that was
stopped goes on where it was, and the full run's cells, docs/results/badmerging/cells, are part of the repository.
"""

import argparse
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import torch

from bench import asking, attackers, cells, data, merges, report, zoo
from bench import cache as disk
from bench.attackers import Plan
from bench.progress import progress
from bench.zoo import Recipe, Setting
from taskvec import metrics
from taskvec.metrics import Estimate, Measurement, Rate, clustered

TABLE = "badmerging.jsonl"
QUICK = Path(__file__).parent / ".cache" / "badmerging"
ROWS = 1000  # test images a task, where there are as many
VICTIM = "glyph_latin"  # of off-task attacks
ENCODERS, TASKS, TARGETS, SEEDS = ("vit7", "cnn"), ("mnist", "fashion"), (1, 4), (0, 1, 2, 3, 4)
SLOW_SEEDS = (0, 1)  # of the merges that learn

ATTACKS: dict[str, Callable[[str, int, int], Plan]] = {
    "BadNets": attackers.plain,
    "TrojanNN": partial(attackers.plain, trigger="trojan"),
    "without interpolation": partial(attackers.on_task, coefficients=(1.0, 1.0)),
    "BadMerging-on": attackers.on_task,
    "directions": lambda task, target, seed: attackers.on_task(task, target, seed)._replace(normalised=True),
    "BadMerging-off": lambda task, target, seed: attackers.off_task(task, VICTIM, target, seed),
    "both": lambda task, target, seed: attackers.jointly(task, VICTIM, target, seed),
}


class Cell(NamedTuple):
    """One backdoored model, and the merges it is measured under."""

    encoder: str
    task: str
    target: int
    seed: int
    attack: str
    merges: tuple[str, ...]

    def plan(self) -> Plan:
        """What the attacker does."""
        return ATTACKS[self.attack](self.task, self.target, self.seed)


# --- one cell --------------------------------------------------------------------------------------------------------


def fill(folder: Path, cell: Cell) -> None:
    """Measure the merges of a cell that are not there yet."""
    kept = cells.read(folder / TABLE)
    for name in cell.merges:
        if (key := key_of(cell, name)) not in kept:
            label = [cell.encoder, cell.task, cell.attack, cell.target, cell.seed, name]
            cells.append(folder / TABLE, key, label, measured(cell, name))


def about(cell: Cell) -> dict[str, disk.Json]:
    """What a cell's figures depend on."""
    made = attackers.key(Setting(cell.encoder), cell.plan()) | {"test_rows": ROWS, "merge_steps": merges.STEPS}
    return json.loads(json.dumps(made))  # tuples become lists, as in the file


def key_of(cell: Cell, name: str) -> str:
    """The key of a row: its cell, its settings, and the code of its attack and merge."""
    code = [cells.code_of(f) for f in (ATTACKS[cell.attack], attackers.upload, everything()[name])]
    place = [cell.encoder, cell.task, cell.target, cell.seed, cell.attack, name]
    return cells.key({"about": about(cell), "cell": place, "code": code})


def earlier(cell: Cell, kept: Mapping[str, list[dict[str, disk.Json]]]) -> dict[str, list[dict[str, disk.Json]]]:
    """The rows measured before, if they were made in the same way."""
    return {name: kept[key] for name in cell.merges if (key := key_of(cell, name)) in kept}


def measured(cell: Cell, name: str) -> list[dict[str, disk.Json]]:
    """A row for each backdoor of the model, under one merge."""
    setting, plan = Setting(cell.encoder), cell.plan()
    predict, tests = asking.remembering(setting), {task: data.test(task).take(slice(ROWS)) for task in data.TASKS}
    handed_in = attackers.upload(setting, plan)
    clean = contributors(setting, plan.seed)
    merged = everything()[name](setting, {**clean, plan.task: handed_in})

    def on_its_own_task(params: zoo.Params) -> Rate:
        own = partial(predict, asking.model(params), task=plan.task)
        return metrics.accuracy(own, *tests[plan.task], batch=asking.WHOLE)

    handed = {"upload": on_its_own_task(handed_in), "twin": on_its_own_task(clean[plan.task])}
    rows = []
    for backdoor in plan.backdoors:
        row = attackers.measuring(setting, plan, backdoor)
        whole = row(tests, model=merged, clean_merge=clean_merge(setting, plan.seed, name))
        victim = {backdoor.victim: tests[backdoor.victim]}
        alone = row(victim, model=asking.model(handed_in), clean_merge=asking.model(clean[plan.task]))
        rows.append({"victim": backdoor.victim} | compact(whole, alone.asr, handed))
    return rows


def compact(row: Measurement, alone: Rate, handed: Mapping[str, Rate]) -> dict[str, disk.Json]:
    """A measurement as [hits, n], accuracies by task; those of upload and clean twin alone on the attacker's task."""
    rates = {
        "asr": row.asr,
        "alone": alone,
        "clean_merge": row.on_clean_merge,
        "clean_twin": row.on_clean,
        "base": row.on_base,
    }
    accuracies = {"accuracy": row.accuracy, "clean_accuracy": row.clean_accuracy, "alone_accuracy": handed}
    return {name: [rate.hits, rate.n] for name, rate in rates.items()} | {
        name: {task: [rate.hits, rate.n] for task, rate in by_task.items()} for name, by_task in accuracies.items()
    }


@cache
def contributors(setting: Setting, seed: int) -> dict[str, zoo.Params]:
    return {task: zoo.fine_tuned(setting, Recipe(task, seed)) for task in data.TASKS}


@cache
def clean_merge(setting: Setting, seed: int, name: str) -> asking.Model:
    return everything()[name](setting, contributors(setting, seed))


def everything() -> dict[str, merges.Merger]:
    return merges.FAST | merges.SLOW


# --- many cells ------------------------------------------------------------------------------------------------------


def cells_of(
    encoder: str, task: str, targets: Sequence[int], seeds: Sequence[int], slow_seeds: Sequence[int]
) -> list[Cell]:
    """Every cell of one table, seed by seed."""
    return [
        Cell(encoder, task, target, seed, attack, tuple(everything() if seed in slow_seeds else merges.FAST))
        for seed in seeds
        for target in targets
        for attack in ATTACKS
    ]


def run(folder: Path, wanted: Sequence[Cell], workers: int) -> None:
    """Train and measure what is not there yet."""
    kept = cells.read(folder / TABLE)
    todo = [cell for cell in wanted if not set(cell.merges) <= set(earlier(cell, kept))]
    for encoder in dict.fromkeys(cell.encoder for cell in todo):
        zoo.prepare(Setting(encoder), zoo.clean(cell.seed for cell in todo if cell.encoder == encoder))
    if todo:
        with zoo.workforce(workers) as pool, progress("cells", len(todo)) as step:
            for _ in pool.map(partial(fill, folder), todo):
                step()


# --- tables ----------------------------------------------------------------------------------------------------------


class Line(NamedTuple):
    """One backdoor under one merge, over targets and seeds: estimates in per cent."""

    own: Estimate  # accuracy of the upload on its own task, minus its clean twin's
    alone: Estimate
    asr: Estimate
    control: Estimate
    gain: Estimate
    twin: Estimate
    base: Estimate
    ba: Estimate
    cost: Estimate
    n: int


Rows = Mapping[tuple[str, str, str], Mapping[tuple[int, int], Mapping[str, disk.Json]]]
"""(attack, merge, victim) -> (seed, target) -> a row."""


def read(folder: Path, wanted: Sequence[Cell]) -> Rows:
    kept = cells.read(folder / TABLE)
    rows: dict[tuple[str, str, str], dict[tuple[int, int], Mapping[str, disk.Json]]] = {}
    for cell in wanted:
        for name, found in earlier(cell, kept).items():
            for row in found:
                rows.setdefault((cell.attack, name, row["victim"]), {})[cell.seed, cell.target] = row
    return rows


def fraction(counts: Sequence[int]) -> float:
    hits, n = counts
    return 100 * hits / n


def rate(row: Mapping[str, disk.Json], name: str) -> float:
    return fraction(row[name])


def accuracy(row: Mapping[str, disk.Json], name: str) -> float:
    return sum(map(fraction, row[name].values())) / len(row[name])


def line(rows: Mapping[tuple[int, int], Mapping[str, disk.Json]]) -> Line:
    def over(value: Callable[[Mapping[str, disk.Json]], float]) -> Estimate:
        return clustered({key: value(row) for key, row in rows.items()})

    return Line(
        over(lambda row: fraction(row["alone_accuracy"]["upload"]) - fraction(row["alone_accuracy"]["twin"])),
        *(over(partial(rate, name=name)) for name in ("alone", "asr", "clean_merge")),
        over(lambda row: rate(row, "asr") - rate(row, "clean_merge")),
        *(over(partial(rate, name=name)) for name in ("clean_twin", "base")),
        over(partial(accuracy, name="accuracy")),
        over(lambda row: accuracy(row, "accuracy") - accuracy(row, "clean_accuracy")),
        min(row["asr"][1] for row in rows.values()),
    )


def table(title: str, rows: Rows) -> str:
    rates = ["own acc.", "alone", "ASR", "all-clean", "gain", "clean twin", "base"]
    header = ["attack", "merge", *rates, "n", "BA", "BA - CA", "of"]
    body = []
    for name in everything():
        for attack in ATTACKS:
            for victim in data.TASKS:
                if found := rows.get((attack, name, victim)):
                    own = line(found)
                    label = f"{attack} ({victim})" if attack in ("BadMerging-off", "both") else attack
                    own_task = f"{own.own.mean:+.1f}"
                    shown = [own_task, own.alone.mean, own.asr, own.control, own.gain, own.twin.mean, own.base.mean]
                    seeds = f"{len({s for s, _ in found})} x {len({t for _, t in found})}"
                    body.append([label, name, *map(text, shown), own.n, text(own.ba.mean), text(own.cost), seeds])
    return report.text_table(title, header, body)


def text(value: Estimate | float | str) -> str:
    return value if isinstance(value, str) else f"{value:.1f}"


def interpolation_gain(rows: Rows, task: str) -> str:
    """ASR with minus ASR without interpolation, the same trigger and weight: paired."""
    lines = []
    for name in everything():
        ours, plain = (rows.get((attack, name, task), {}) for attack in ("BadMerging-on", "without interpolation"))
        both = ours.keys() & plain.keys()
        if both:
            paired = clustered({key: rate(ours[key], "asr") - rate(plain[key], "asr") for key in sorted(both)})
            lines.append([name, paired, f"{len({s for s, _ in both})} x {len({t for _, t in both})}"])
    return report.text_table("What interpolation adds to ASR, points", ["merge", "gain", "of"], lines)


def finish(folder: Path, encoder: str, task: str, wanted: Sequence[Cell]) -> None:
    """Print a table of what is there."""
    rows = read(folder, wanted)
    title = (
        f"{encoder}, the attacker owns {task}: ASR and accuracy in per cent; 'of' is seeds x targets;\n"
        "+- is the half width of a 95 % t interval over seeds"
    )
    print(table(title, rows), interpolation_gain(rows, task), sep="\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one seed, one target, the small ViT, mnist")
    parser.add_argument("--encoder", choices=["vits", *ENCODERS], action="append", help="one of the tables only")
    parser.add_argument("--task", choices=data.TASKS, action="append", help="the attacker's, of one of the tables only")
    parser.add_argument("--targets", type=int, nargs="+", default=TARGETS)
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--slow-seeds", type=int, nargs="*", default=SLOW_SEEDS, help="of the merges that learn")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--tables", action="store_true", help="print the tables of what is there, measure nothing")
    given = parser.parse_args()
    start = time.monotonic()
    torch.set_num_threads(1)
    encoders, tasks = given.encoder or ENCODERS, given.task or TASKS
    targets, seeds, folder = given.targets, given.seeds, cells.FOLDER
    if given.quick:
        encoders, tasks, targets, seeds, folder = given.encoder or ["vits"], given.task or ["mnist"], [1], [0], QUICK
    for task in {*tasks, VICTIM}:
        if not all(0 <= target < len(data.CLASSES[task]) for target in targets):
            parser.error(f"targets of {task} are 0 to {len(data.CLASSES[task]) - 1}")
    for encoder in encoders:
        for task in tasks:
            wanted = cells_of(encoder, task, targets, seeds, given.slow_seeds)
            if not given.tables:
                run(folder, wanted, given.workers)
            finish(folder, encoder, task, wanted)
    print(f"{time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
