"""Inherent against injected: how much of a trigger's success needs no backdoor at all.

    python examples/experiments/study_inherent.py [--quick | --redraw]

An optimized patch on models without any backdoor, by its size, by encoder and by how long the base was trained; and on
the merge that holds a BadMerging model with the same patch. What the clean merge shows is inherent, the rest injected.
mnist, three target classes and three seeds, validation images.
"""

import argparse
import os
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import torch
from matplotlib.figure import Figure

from bench import asking, attackers, command, data, pictures, report, zoo
from bench import cache as disk
from bench.attackers import Backdoor, Plan
from bench.defenders import merged
from bench.merges import RULES
from bench.progress import progress
from bench.zoo import Recipe, Setting
from taskvec import TaskVector, plot
from taskvec.metrics import accuracy, attack_success_rate, clustered

PICTURES = Path(__file__).parents[2] / "docs" / "images"
TASK, TARGETS, SEEDS = "mnist", (1, 4, 7), (0, 1, 2)
SIZES = (3, 4, 5, 7, 10)
ENCODERS = ("cnn", "vits", "vit7")
BUDGETS = (100, 300, 1000, 3000)  # steps of pre-training, of vits at 10x10
MERGES = ("task arithmetic", "TIES")


class Point(NamedTuple):
    """One trigger, on everything."""

    setting: Setting
    size: int
    target: int
    seed: int

    def plan(self) -> Plan:
        """BadMerging with this trigger."""
        return Plan(TASK, self.seed, (Backdoor(TASK, self.target, "optimised", self.size),), 5.0, (0.2, 1.0))


def points(
    encoders: Sequence[str], targets: Sequence[int], seeds: Sequence[int], budgets: Sequence[int]
) -> list[Point]:
    """Every size on every encoder, and the largest one by budget."""
    settings = [(Setting(encoder), size) for encoder in encoders for size in SIZES]
    settings += [(Setting("vits", pretrain_steps=budget), max(SIZES)) for budget in budgets]
    return [Point(setting, size, target, seed) for setting, size in settings for target in targets for seed in seeds]


def value(point: Point) -> dict[str, float]:
    """ASR in per cent: of the base, of the clean twin, of the clean merges, and of those with the backdoored member."""
    plan = point.plan()
    return disk.values("inherent", attackers.key(point.setting, plan), partial(_measured, point, plan))


def _measured(point: Point, plan: Plan) -> dict[str, float]:
    setting, (backdoor,) = point.setting, plan.backdoors
    trigger = attackers.trigger_of(setting, plan, backdoor)

    def asks(params: Mapping[str, torch.Tensor]) -> partial:
        return partial(asking.remembering(setting), asking.model(params), task=TASK)

    def rate(params: Mapping[str, torch.Tensor]) -> float:
        split = data.validation(TASK)
        fooled = attack_success_rate(asks(params), *split, target=point.target, trigger=trigger, batch=asking.WHOLE)
        return 100 * fooled.value

    base = zoo.base(setting)
    clean = {task: zoo.fine_tuned(setting, Recipe(task, point.seed)) for task in data.TASKS}
    vectors = {task: TaskVector.between(base, model) for task, model in clean.items()}
    planted = vectors | {TASK: TaskVector.between(base, attackers.upload(setting, plan))}
    found = {"base": rate(base), "clean model": rate(clean[TASK])}
    right = accuracy(asks(clean[TASK]), *data.validation(TASK), batch=asking.WHOLE)
    found["accuracy"] = 100 * right.value  # of the clean model alone: what the budget buys
    for name in MERGES:
        found[f"{name}: inherent"] = rate(merged(setting, RULES[name], vectors))
        found[f"{name}: whole"] = rate(merged(setting, RULES[name], planted))
        found[f"{name}: injected"] = found[f"{name}: whole"] - found[f"{name}: inherent"]
    return found


def run(wanted: Sequence[Point], workers: int) -> dict[Point, dict[str, float]]:
    """All values; the models they share are made first."""
    for setting in dict.fromkeys(point.setting for point in wanted):
        zoo.prepare(setting, zoo.clean(point.seed for point in wanted if point.setting == setting))
    found = {}
    with zoo.workforce(workers) as pool, progress("triggers", len(wanted)) as step:
        for point, row in zip(wanted, pool.map(value, wanted), strict=True):
            found[point] = row
            step()
    return found


def label(setting: Setting) -> str:
    """An encoder, and its budget where that is not its own."""
    return setting.encoder if setting.pretrain_steps is None else f"{setting.encoder}, {setting.pretrain_steps} steps"


def table(found: Mapping[Point, Mapping[str, float]]) -> str:
    names = list(next(iter(found.values())))
    groups = dict.fromkeys((point.setting, point.size) for point in found)
    body = []
    for setting, size in groups:
        own = {(p.seed, p.target): row for p, row in found.items() if (p.setting, p.size) == (setting, size)}
        cells = [clustered({key: row[name] for key, row in own.items()}) for name in names]
        body.append([label(setting), f"{size}x{size}", *cells])
    title = (
        "An optimised trigger without and with a backdoor: ASR in per cent, means over classes, intervals over seeds"
    )
    return report.text_table(title, ["encoder", "patch", *names], body)


def mean_over_classes(
    found: Mapping[Point, Mapping[str, float]], encoder: str, size: int, seed: int, name: str
) -> float:
    """Of the encoder's own budget."""
    return fmean(row[name] for p, row in found.items() if (p.setting, p.size, p.seed) == (Setting(encoder), size, seed))


def draw(found: Mapping[Point, Mapping[str, float]]) -> None:
    """The inherent part of every encoder over the size of the patch, and the whole beside it."""
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    titles = {
        "inherent": "No backdoor (all-clean merge): little up to 5x5",
        "whole": "With a BadMerging model: large at every size",
    }
    for axes, (part, title) in zip(figure.subplots(1, 2, sharey=True), titles.items(), strict=True):
        lines: dict[str, dict[float, list[float]]] = {}
        for encoder in dict.fromkeys(point.setting.encoder for point in found):
            for size in SIZES:
                means = [mean_over_classes(found, encoder, size, seed, f"task arithmetic: {part}") for seed in SEEDS]
                lines.setdefault(encoder, {})[float(size)] = means
        plot.curve(lines, xlabel="side of the patch, pixels", ylabel="ASR in task arithmetic, %", axes=axes)
        axes.set(title=title, ylim=(0, 101), xlim=(min(SIZES), max(SIZES)), xticks=SIZES)
        axes.label_outer()
        pictures.label_lines(axes)
    figure.savefig(PICTURES / "inherent.png", dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="vits, one class and seed, nothing written")
    parser.add_argument("--encoder", choices=ENCODERS, action="append", help="one of them only")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    given = command.can_redraw(parser).parse_args()
    if given.redraw:
        kept = [row for row in report.kept("inherent", "all")["rows"] if row["encoder"] in ENCODERS]
        draw({Point(Setting(row["encoder"]), row["size"], row["target"], row["seed"]): row for row in kept})
        return
    start = time.monotonic()
    torch.set_num_threads(1)
    if given.quick:
        wanted = points(("vits",), TARGETS[:1], SEEDS[:1], ())
    else:
        wanted = points(given.encoder or ENCODERS, TARGETS, SEEDS, () if given.encoder else BUDGETS)
    found = run(wanted, given.workers)
    text = table(found)
    print(text)
    if not (given.quick or given.encoder):
        names = [{"encoder": label(p.setting), "size": p.size, "target": p.target, "seed": p.seed} for p in found]
        rows = [name | row for name, row in zip(names, found.values(), strict=True)]
        report.keep("inherent", "all", {"rows": rows})
        draw(found)
    print(f"{time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
