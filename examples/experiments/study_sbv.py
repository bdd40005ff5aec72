"""Several backdoor vectors in one: what makes a sparse backdoor vector (SBV) strong.

    python examples/experiments/study_sbv.py [--encoder vits] [--task mnist] [--quick | --redraw]

Collections of 1 to 8 vectors that share the trigger (other orders of the data and clean twins), or the class only, or
nothing; of plain patches and of BadMerging at a size below saturation. Whatever is made of a collection has the mean
norm of its members, so that length explains nothing, and goes into the clean twin of the first member. Beside every
figure stands the cosine with a vector of the same trigger that is in no collection. All on validation images.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean

import torch

from bench import asking, attackers, command, data, pictures, report, zoo
from bench import cache as disk
from bench.attackers import Backdoor, Plan
from bench.defenders import merged
from bench.merges import RULES
from bench.significance import holm, t_test
from bench.zoo import Recipe, Setting
from taskvec import BackdoorVector, TaskVector, merge, plot
from taskvec.attacks import sparse_backdoor
from taskvec.merges import mean
from taskvec.metrics import accuracy, attack_success_rate, estimate
from taskvec.sparsify import drop, topk

PICTURES = Path(__file__).parents[2] / "docs" / "images"
SEEDS = (0, 1, 2, 3, 4)
COUNTS = (2, 3, 5, 8)
TARGET = 1
LOUDER = 1.5
MEAN, MEMBER, LONGER = "mean of the vectors", "average member", f"amplified single, both x {LOUDER}"
SATURATED = 0.5  # points: both merges have all of it
KINDS = ("same trigger", "same class", "nothing shared", "same trigger, BadMerging")
SMALL = 3  # side of BadMerging's patch: larger ones leave nothing to gain


def collection(kind: str, task: str, seed: int) -> list[Plan]:
    """Plans of one vector more than the largest collection has: the last one is kept apart."""
    made = []
    for i in range(max(COUNTS) + 1):
        held_out = i == max(COUNTS)  # shares the first one's trigger whatever the kind
        own = seed + len(SEEDS) * i
        pattern = seed if kind.startswith("same trigger") or held_out else own
        target = TARGET if kind != "nothing shared" or held_out else (TARGET + i) % len(data.CLASSES[task])
        if kind.endswith("BadMerging"):
            backdoor = Backdoor(task, target, "optimised", SMALL, pattern=pattern)
            made.append(Plan(task, own, (backdoor,), 5.0, (0.2, 1.0)))
        else:
            made.append(Plan(task, own, (Backdoor(task, target, pattern=pattern),)))
    return made


def combined(vectors: Sequence[BackdoorVector]) -> dict[str, BackdoorVector]:
    """What can be made of several vectors, all but the last as long as they are in the mean."""
    norm = sum(float(vector.norm()) for vector in vectors) / len(vectors)
    averaged, consistent = merge(vectors, mean), sparse_backdoor(vectors)
    density = sum(float(t.count_nonzero()) for t in consistent.values()) / sum(t.numel() for t in consistent.values())
    made: dict[str, TaskVector] = {
        "mean": averaged,
        "SBV_SC": consistent,
        "SBV, 60 % agree": sparse_backdoor(vectors, agree=0.6),
        "SBV, largest": sparse_backdoor(vectors, reduce="largest"),
        "magnitude, same density": averaged.map(topk, density=density),
        "random, same density": averaged.map(drop, density=density, seed=0, rescale=None),
        "magnitude, top 10 %": averaged.map(topk, density=0.1),
    }
    level = {name: BackdoorVector(vector) * (norm / float(vector.norm())) for name, vector in made.items()}
    return level | {f"SBV_SC x {LOUDER}": level["SBV_SC"] * LOUDER, "mean, norm not restored": BackdoorVector(averaged)}


def of_seed(setting: Setting, task: str, seed: int) -> list[dict[str, disk.Json]]:
    """A row for every kind, number and variant, under every merge."""
    rows = []
    for kind in KINDS:
        plans = collection(kind, task, seed)
        *vectors, apart = (attackers.backdoor_vector(setting, plan) for plan in plans)
        measure = partial(measured, setting, plans[0], seed)
        label = {"seed": seed, "kind": kind}
        singles = [measure(vector) for vector in vectors] if kind.startswith("same trigger") else [measure(vectors[0])]
        likes = [float(vector.cosine(apart)) for vector in vectors[: len(singles)]]
        for i, (single, cosine) in enumerate(zip(singles, likes, strict=True)):
            rows.append(label | {"variant": f"single {i}", "count": 1, "cosine": cosine, "merges": single})
        louder = measure(vectors[0] * LOUDER)
        rows.append(label | {"variant": f"single 0 x {LOUDER}", "count": 1, "cosine": likes[0], "merges": louder})
        for count in COUNTS:
            for variant, vector in combined(vectors[:count]).items():
                like = {"variant": variant, "count": count, "cosine": float(vector.cosine(apart))}
                rows.append(label | like | {"merges": measure(vector)})
    return rows


def measured(setting: Setting, plan: Plan, seed: int, vector: BackdoorVector) -> dict[str, dict[str, float]]:
    """A vector in the clean twin of the collection's first member, merged: ASR, control and accuracy by rule.

    Under task arithmetic also added behind the scaling, to the all-clean merge.
    """
    clean = {task: zoo.fine_tuned(setting, Recipe(task, seed)) for task in data.TASKS}
    base = zoo.base(setting)
    contributors = {task: TaskVector.between(base, model) for task, model in clean.items()}
    planted = contributors | {plan.task: contributors[plan.task] + TaskVector(vector)}
    found = {}
    for name in ("average", "task arithmetic", "TIES"):
        rule = RULES[name]
        control = merged(setting, rule, contributors)
        found[name] = figures(setting, plan, merged(setting, rule, planted), control)
        if name == "task arithmetic":
            after = dict(vector.inject(control, rule.scale))
            found["task arithmetic, after scaling"] = figures(setting, plan, after, control)
    return found


def figures(setting: Setting, plan: Plan, params: zoo.Params, control: zoo.Params) -> dict[str, float]:
    (backdoor,) = plan.backdoors

    def rate(model: zoo.Params) -> float:
        return attack_success_rate(
            partial(asking.remembering(setting), asking.model(model), task=plan.task),
            *data.validation(plan.task),
            target=backdoor.target,
            trigger=attackers.trigger_of(setting, plan, backdoor),
            batch=asking.WHOLE,
        ).value

    def right(model: zoo.Params) -> float:
        ask = asking.remembering(setting)
        rates = [
            accuracy(
                partial(ask, asking.model(model), task=task), *data.validation(task, 100), batch=asking.WHOLE
            ).value
            for task in data.TASKS
        ]
        return sum(rates) / len(rates)

    return {"asr": rate(params), "control": rate(control), "cost": right(params) - right(control)}


# --- tables ----------------------------------------------------------------------------------------------------------


def tables(title: str, rows: Sequence[Mapping[str, disk.Json]]) -> str:
    merges = list(rows[0]["merges"])
    body, gains = [], []
    for kind in KINDS:
        keys = dict.fromkeys((row["variant"], row["count"]) for row in rows if row["kind"] == kind)
        for variant, count in keys:
            if variant.startswith("single ") and variant not in ("single 0", f"single 0 x {LOUDER}"):
                continue
            own = [row for row in rows if (row["kind"], row["variant"], row["count"]) == (kind, variant, count)]
            asr = [f"{estimate(100 * row['merges'][m]['asr'] for row in own):.1f}" for m in merges]
            like = f"{estimate(row['cosine'] for row in own):.2f}"
            body.append([kind, variant, count, like, *asr])
        if kind.startswith("same trigger"):
            gains += [[kind, *line] for line in against(rows, kind, merges)]
    return "\n".join(
        [
            report.text_table(
                f"{title}: ASR in per cent, validation images; cosine: with another vector of the same trigger",
                ["collection", "made of it", "of", "cosine", *merges],
                body,
            ),
            report.text_table(
                "SBV_SC minus ..., at equal norm: ASR, points, paired by seed",
                ["collection", "of", "minus", *merges],
                gains,
            ),
            *([family(rows)] if len({row["seed"] for row in rows}) > 1 else []),
        ]
    )


def differences(
    rows: Sequence[Mapping[str, disk.Json]], kind: str, count: int, merges: Sequence[str]
) -> dict[str, dict[str, list[float]]]:
    """ASR of SBV_SC at equal norm minus others', by seed: rival -> merge -> points.

    The best single one is known afterwards: a maximum over noise.
    """

    def asr(seed: int, variant: str, count: int, rule: str) -> float:
        found = (r for r in rows if (r["seed"], r["kind"], r["variant"], r["count"]) == (seed, kind, variant, count))
        return 100 * next(found)["merges"][rule]["asr"]

    def singles(seed: int, rule: str) -> list[float]:
        return [asr(seed, f"single {i}", 1, rule) for i in range(count)]

    pairs: dict[str, Callable[[int, str], float]] = {
        MEAN: lambda seed, rule: asr(seed, "SBV_SC", count, rule) - asr(seed, "mean", count, rule),
        MEMBER: lambda seed, rule: asr(seed, "SBV_SC", count, rule) - fmean(singles(seed, rule)),
        "best single": lambda seed, rule: asr(seed, "SBV_SC", count, rule) - max(singles(seed, rule)),
        "random, same density": lambda seed, rule: (
            asr(seed, "SBV_SC", count, rule) - asr(seed, "random, same density", count, rule)
        ),
        LONGER: lambda seed, rule: (
            asr(seed, f"SBV_SC x {LOUDER}", count, rule) - asr(seed, f"single 0 x {LOUDER}", 1, rule)
        ),
    }
    seeds = list(dict.fromkeys(row["seed"] for row in rows))
    return {name: {rule: [pair(seed, rule) for seed in seeds] for rule in merges} for name, pair in pairs.items()}


def against(rows: Sequence[Mapping[str, disk.Json]], kind: str, merges: Sequence[str]) -> list[list[object]]:
    """The paired comparisons of SBV_SC at equal norm, for every number of vectors."""
    return [
        [count, name, *(f"{estimate(values):.1f}" for values in by_rule.values())]
        for count in COUNTS
        for name, by_rule in differences(rows, kind, count, merges).items()
    ]


def family(rows: Sequence[Mapping[str, disk.Json]]) -> str:
    """The comparisons of the largest vectors that the paper's claims are judged by, corrected by Holm.

    Two merges that are both saturated, with no difference at all, are no comparison.
    """
    found = {
        (kind, name, rule): values
        for kind in (kind for kind in KINDS if kind.startswith("same trigger"))
        for name, by_rule in differences(rows, kind, max(COUNTS), ("task arithmetic", "TIES")).items()
        if name in (MEAN, MEMBER, LONGER)
        for rule, values in by_rule.items()
        if max(map(abs, values)) > SATURATED
    }
    ps = {key: t_test(values) for key, values in found.items()}
    corrected = holm(ps)
    return report.text_table(
        f"SBV_SC of {max(COUNTS)} minus ..., points: two-sided t tests over seeds, corrected by Holm over {len(found)}",
        ["collection", "minus", "merge", "difference", "p", "p (Holm)"],
        [[*key, f"{estimate(v):.1f}", f"{ps[key]:.4f}", f"{corrected[key]:.3f}"] for key, v in found.items()],
    )


def draw(name: str, rows: Sequence[Mapping[str, disk.Json]]) -> None:
    """ASR over the number of vectors, for what shares a trigger and what does not; and over the cosine."""
    from matplotlib.figure import Figure  # noqa: PLC0415 - only here

    figure = Figure(figsize=(13, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    lines = {}
    for kind in KINDS:
        points = {
            1.0: [100 * r["merges"]["TIES"]["asr"] for r in rows if (r["kind"], r["variant"]) == (kind, "single 0")]
        }
        for count in COUNTS:
            own = [r for r in rows if (r["kind"], r["variant"], r["count"]) == (kind, "SBV_SC", count)]
            points[float(count)] = [100 * r["merges"]["TIES"]["asr"] for r in own]
        lines[kind] = points
    plot.curve(lines, xlabel="vectors in the SBV_SC, of equal norm", ylabel="ASR under TIES, %", axes=left)
    left.set(title="Only vectors of one trigger add up", ylim=(0, 103))
    pictures.label_lines(left)
    for rule, color in (("TIES", "tab:red"), ("task arithmetic", "tab:blue")):
        level = [
            r
            for r in rows
            if r["kind"] == "same trigger" and str(LOUDER) not in r["variant"] and "not" not in r["variant"]
        ]
        x, y = [r["cosine"] for r in level], [100 * r["merges"][rule]["asr"] for r in level]
        right.plot(x, y, "o", markersize=3, alpha=0.5, color=color, label=rule)
    right.set(xlabel="cosine with another vector of the same trigger", ylabel="ASR, %", ylim=(0, 103))
    right.set_title("Task arithmetic follows the cosine, TIES does not")
    right.grid(alpha=0.3)
    for line in right.get_lines():
        right.text(0.63, 85 if line.get_label() == "TIES" else 22, line.get_label(), color=line.get_color())
    figure.savefig(PICTURES / f"sbv-{name}.png", dpi=120)


def main() -> None:
    given = command.can_redraw(command.suite_options(__doc__, SEEDS)).parse_args()
    if given.redraw:
        name = f"{given.encoder}-{given.task}"
        rows = report.kept("sbv", name)["rows"]
        print(tables(f"{given.encoder}, {given.task}, {len({row['seed'] for row in rows})} seeds", rows))
        draw(name, rows)
        return
    start = time.monotonic()
    torch.set_num_threads(1)
    setting, seeds = Setting(given.encoder), [0] if given.quick else given.seeds
    zoo.prepare(setting, zoo.clean(seeds))
    found = command.by_seed(partial(of_seed, setting, given.task), seeds, given.workers)
    rows = [row for own in found.values() for row in own]
    name = f"{given.encoder}-{given.task}"
    text = tables(f"{given.encoder}, {given.task}, {len(seeds)} seeds", rows)
    print(text)
    if not given.quick:
        report.keep("sbv", name, {"rows": rows})
        draw(name, rows)
    print(f"{time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
