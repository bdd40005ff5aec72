"""What makes BadMerging strong: one thing changed at a time.

    python examples/experiments/badmerging_ladder.py --quick       one seed
    python examples/experiments/badmerging_ladder.py               three seeds
    python examples/experiments/badmerging_ladder.py --redraw      the pictures, from the kept rows

The small ViT, the owner of mnist, target class 1, unless a panel says otherwise. These are sweeps, so they are measured
on validation images; the test set is for badmerging.py. Every point has its control: the same trigger on the
all-clean merge. What was measured before is kept in .cache.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from bench import asking, attackers, command, data, merges, pictures, report, zoo
from bench import cache as disk
from bench.attackers import Backdoor, Plan
from bench.progress import progress
from bench.zoo import Recipe, Setting
from taskvec.attacks.triggers import stamp
from taskvec.metrics import Estimate, attack_success_rate, clustered

PICTURES = Path(__file__).parents[2] / "docs" / "images"
SETTING, TASK, TARGET, SEEDS = Setting("vits"), "mnist", 1, (0, 1, 2)
RULES = {name: merges.RULES[name] for name in ("task arithmetic", "TIES")}  # at the papers' scales
SWEPT = {"task arithmetic": (0.05, 0.1, 0.2, 0.3, 0.4, 0.6), "TIES": (0.2, 0.4, 0.6, 0.8, 1.0, 1.4)}


class Point(NamedTuple):
    """One attack under one merge."""

    figure: str
    label: str
    x: float | None  # None: a bar
    plan: Plan
    rule: str
    scale: float
    tasks: tuple[str, ...] = data.TASKS


def points(seed: int) -> list[Point]:
    """All of them, for one seed."""
    on = attackers.on_task(TASK, TARGET, seed)
    (patch,) = on.backdoors
    badnets = attackers.plain(TASK, TARGET, seed)
    made: list[Point] = []

    def add(figure: str, label: str, plan: Plan, x: float | None = None, **changes: object) -> None:
        made.extend(Point(figure, label, x, plan, rule, scale, **changes) for rule, (_, scale) in RULES.items())

    kinds = {"BadNets": "random", "dynamic": "dynamic", "TrojanNN": "trojan", "blended": "blended", "WaNet": "warped"}
    for name, trigger in kinds.items():
        add("plain attacks", name, attackers.plain(TASK, TARGET, seed, trigger))
    add("steps on-task", "random patch, plain loss", badnets)
    add("steps on-task", "the same, weight 5", badnets._replace(weight=5.0))
    add("steps on-task", "optimised patch", on._replace(coefficients=(1.0, 1.0)))
    add("steps on-task", "with interpolation", on)
    add("steps on-task", "interpolation, random patch", on._replace(backdoors=(patch._replace(trigger="random"),)))
    for victim in ("glyph_latin", "fashion"):
        off = attackers.off_task(TASK, victim, TARGET, seed)
        (trigger,) = off.backdoors
        unaided = off._replace(backdoors=(trigger._replace(augmented=False),))
        add("steps off-task", f"{victim}: shadow classes", unaided)
        add("steps off-task", f"{victim}: with augmentation", off)
        add("steps off-task", f"{victim}: and keep (ours)", off._replace(keep=1.0))
    for rule, scales in SWEPT.items():
        for name, plan in (("BadNets", badnets), ("BadMerging-on", on)):
            made.extend(Point("merging coefficient", name, scale, plan, rule, scale) for scale in scales)
    for count in range(2, len(data.TASKS) + 1):
        add("merged tasks", "BadMerging-on", on, count, tasks=data.TASKS[:count])
    for size in (3, 4, 5, 7, 10):
        add("trigger size", "BadMerging-on", on._replace(backdoors=(patch._replace(size=size),)), size)
    for weight in (0.5, 1.0, 2.0, 5.0, 10.0):
        add("loss weight", "BadMerging-on", on._replace(weight=weight), weight)
    for low in (0.0, 0.1, 0.2, 0.5, 1.0):
        add("range of the coefficient", "one a batch", on._replace(coefficients=(low, 1.0)), low)
        add("range of the coefficient", "one a sample", on._replace(coefficients=(low, 1.0), draw="sample"), low)
    add("knowledge", "others unknown", on)
    add("knowledge", "others known", on._replace(known=True))
    add("what it costs", "BadMerging-on", on)
    add("what it costs", "directions (ours)", on._replace(normalised=True))
    add("what it costs", "keep (ours)", on._replace(keep=1.0))
    add("what it costs", "both of ours", on._replace(normalised=True, keep=1.0))
    for count, stamped in ((1, 32), (5, 16), (15, 8)):
        pairs = tuple(Backdoor("glyph_latin", target, "optimised") for target in range(count))
        several = on._replace(task="glyph_latin", backdoors=pairs, stamped=stamped)
        add("trigger-target pairs", "owner of glyph_latin", several, count)
    return made


# --- measuring -------------------------------------------------------------------------------------------------------


def value(point: Point) -> dict[str, float]:
    """ASR, its control, and accuracies in per cent, means over the model's backdoors; on validation images."""
    plan = point.plan
    about = attackers.key(SETTING, plan) | {"rule": point.rule, "scale": point.scale, "tasks": point.tasks}
    return disk.values("ladder", about, partial(_measured, point))


def _measured(point: Point) -> dict[str, float]:
    setting, plan = SETTING, point.plan
    clean = {task: zoo.fine_tuned(setting, Recipe(task, plan.seed)) for task in point.tasks}
    merger = merges.elementwise(RULES[point.rule]._replace(scale=point.scale))
    rows = [
        attackers.measuring(setting, plan, backdoor)(
            {task: data.validation(task) for task in point.tasks},
            model=merger(setting, clean | {plan.task: attackers.upload(setting, plan)}),
            clean_merge=merger(setting, clean),
        )
        for backdoor in plan.backdoors
    ]
    return {
        "asr": 100 * sum(row.asr.value for row in rows) / len(rows),
        "control": 100 * sum(row.on_clean_merge.value for row in rows) / len(rows),
        "base": 100 * sum(row.on_base.value for row in rows) / len(rows),
        "cost": 100 * (rows[0].ba - rows[0].ca),
        "n": rows[0].asr.n,
    }


def without_backdoor(encoder: str, seed: int, size: int, target: int) -> dict[str, float]:
    """What an optimized trigger does to models that have no backdoor: ASR in per cent, on validation images."""
    setting, backdoor = Setting(encoder), Backdoor(TASK, target, "optimised", size)

    def rate(params: Mapping[str, Tensor]) -> float:
        asked, split = asking.model(params), data.validation(TASK)
        ask: Callable[[Tensor], Tensor] = lambda images: asking.remembering(setting)(asked, images, TASK)  # noqa: E731
        patch = attackers.patch_of(setting, TASK, seed, backdoor)
        found = attack_success_rate(ask, *split, target=target, trigger=partial(stamp, patch=patch), batch=asking.WHOLE)
        return 100 * found.value

    def make() -> dict[str, float]:
        clean = {task: zoo.fine_tuned(setting, Recipe(task, seed)) for task in data.TASKS}
        alone = {"base": rate(zoo.base(setting)), "clean twin": rate(clean[TASK])}
        return alone | {name: rate(merges.elementwise(rule)(setting, clean).params) for name, rule in RULES.items()}

    about = {"setting": zoo.settings(setting), "backdoor": backdoor._asdict(), "seed": seed}
    return disk.values("no backdoor", about, make)


def inherent(encoder: str, seed: int, workers: int) -> dict[str, list[dict[str, disk.Json]]]:
    """The same for every target class, at three sizes."""
    zoo.prepare(Setting(encoder), zoo.clean([seed]))
    asked = [(size, target) for size in (5, 7, 10) for target in range(len(data.CLASSES[TASK]))]
    made: dict[str, list[dict[str, disk.Json]]] = {}
    with zoo.workforce(workers) as pool, progress(f"no backdoor, {encoder}", len(asked)) as step:
        found = pool.map(partial(without_backdoor, encoder, seed), *zip(*asked, strict=True))
        for (size, target), row in zip(asked, found, strict=True):
            made.setdefault(f"{size}x{size}", []).append({"target": target} | row)
            step()
    return made


def inherent_table(encoder: str, found: Mapping[str, Sequence[Mapping[str, disk.Json]]]) -> str:
    body = [
        [size, row["target"], *(f"{row[name]:.1f}" for name in ("base", "clean twin", *RULES))]
        for size, rows in found.items()
        for row in rows
    ]
    title = f"no backdoor at all: ASR of an optimised trigger on clean models, {encoder}, one seed"
    return report.text_table(
        title, ["patch", "class", "base", "clean twin", *(f"{rule} of all" for rule in RULES)], body
    )


def lengths(encoder: str, seed: int) -> dict[str, dict[str, float]]:
    """How long features are, clean and triggered, and accuracy in per cent on the attacker's own task: no merge."""
    setting, on = Setting(encoder), attackers.on_task(TASK, TARGET, seed)
    trigger, (images, labels) = attackers.trigger_of(setting, on, on.backdoors[0]), data.validation(TASK)
    plans = {
        "without interpolation": on._replace(coefficients=(1.0, 1.0)),
        "BadMerging-on": on,
        "directions (ours)": on._replace(normalised=True),
    }
    models = {"base": zoo.base(setting), "clean twin": zoo.fine_tuned(setting, Recipe(TASK, seed))}
    models |= {name: attackers.upload(setting, plan) for name, plan in plans.items()}
    found = {}
    with torch.no_grad():
        for name, params in models.items():
            clean, stamped = (attackers.embed(setting, params, x) for x in (images, trigger(images)))
            right = attackers.head_of(setting, TASK)(clean).argmax(1) == labels
            means = {"clean": float(clean.norm(dim=1).mean()), "triggered": float(stamped.norm(dim=1).mean())}
            found[name] = means | {"accuracy": 100 * float(right.float().mean())}
    return found


def lengths_table(encoder: str, found: Mapping[str, Mapping[str, float]]) -> str:
    body = [[name, *(f"{row[what]:.1f}" for what in ("clean", "triggered", "accuracy"))] for name, row in found.items()]
    title = f"length of features of validation images, and accuracy on the own task, {encoder}, one seed"
    return report.text_table(title, ["model", "clean", "triggered", "accuracy"], body)


def _together(group: Sequence[Point]) -> list[dict[str, float]]:
    return [value(point) for point in group]


def run(wanted: Sequence[Point], workers: int) -> dict[Point, dict[str, float]]:
    """All values; points that share a model are measured by the same process."""
    zoo.prepare(SETTING, zoo.clean(point.plan.seed for point in wanted))
    groups: dict[Plan, list[Point]] = {}
    for point in wanted:
        groups.setdefault(point.plan, []).append(point)
    found: dict[Point, dict[str, float]] = {}
    with zoo.workforce(workers) as pool, progress("models", len(groups)) as step:
        for group, values in zip(groups.values(), pool.map(_together, groups.values()), strict=True):
            found |= dict(zip(group, values, strict=True))
            step()
    return found


# --- tables and the picture ------------------------------------------------------------------------------------------


Summary = dict[str, dict[str, dict[str, list[dict[str, disk.Json]]]]]
"""figure -> rule -> label -> points, each with x and estimates over seeds."""


def summary(found: Mapping[Point, Mapping[str, float]]) -> Summary:
    groups: dict[tuple[str, str, str, float | None], dict[tuple[int, int], Mapping[str, float]]] = {}
    for point, values in found.items():
        place = point.figure, point.rule, point.label, point.x
        groups.setdefault(place, {})[point.plan.seed, TARGET] = values
    made: Summary = {}
    for (figure, rule, label, x), rows in groups.items():
        estimates = {
            name: clustered({key: row[name] for key, row in rows.items()})._asdict()
            for name in ("asr", "control", "cost")
        }
        n = min(int(row["n"]) for row in rows.values())
        made.setdefault(figure, {}).setdefault(rule, {}).setdefault(label, []).append({"x": x, "n": n} | estimates)
    return made


def table(figure: str, by_rule: Mapping[str, Mapping[str, Sequence[Mapping[str, disk.Json]]]]) -> str:
    body = []
    for rule, lines in by_rule.items():
        for label, points_ in lines.items():
            for point in points_:
                shown = [Estimate(**point[name]) for name in ("asr", "control", "cost")]
                body.append([label, rule, "" if point["x"] is None else f"{point['x']:g}", *shown, point["n"]])
    return report.text_table(figure, ["", "merge", "x", "ASR", "all-clean", "BA - CA", "n"], body)


def draw(found: Summary) -> None:
    """Draw the steps of the attack and the sweeps, a picture each."""
    pictures.steps(PICTURES / "badmerging_ladder.png", found)
    pictures.sweeps(PICTURES / "badmerging_sweeps.png", found)


def main() -> None:
    given = command.can_redraw(command.options(__doc__, SEEDS)).parse_args()
    if given.redraw:
        draw(report.kept("ladder", "all")["figures"])
        return
    start = time.monotonic()
    torch.set_num_threads(1)
    seeds = [0] if given.quick else given.seeds
    found = summary(run([point for seed in seeds for point in points(seed)], given.workers))
    text = "\n".join(table(figure, by_rule) for figure, by_rule in found.items())
    clean = {} if given.quick else {encoder: inherent(encoder, 0, given.workers) for encoder in ("vit7", "cnn")}
    text += "".join(f"\n{inherent_table(encoder, rows)}" for encoder, rows in clean.items())
    long = {} if given.quick else {encoder: lengths(encoder, 0) for encoder in ("vit7", "cnn")}
    text += "".join(f"\n{lengths_table(encoder, rows)}" for encoder, rows in long.items())
    print(text)
    if not given.quick:
        about = {"seeds": list(seeds), "split": "validation"}
        report.keep("ladder", "all", about | {"figures": found, "without backdoor": clean, "lengths": long})
        draw(found)
    print(f"{time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
