"""How alike backdoor vectors are, and what one does for another's trigger.

    python examples/experiments/study_vectors.py [--encoder vits] [--task mnist] [--quick | --redraw]

For every seed one reference: a 5x5 BadNets patch for class 1. Beside it, vectors that differ from it in one thing or in
several; each has its own order of the data and its own clean twin. Their cosines are compared with what no backdoor
explains: two differences of clean twins, a shared twin, a shared seed. Transfer: the vector is added to a clean model
that it has never seen, or subtracted from the reference's own, and the reference's trigger is put on validation images.
"""

import time
from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path

import torch
from matplotlib.figure import Figure

from bench import asking, attackers, cells, command, data, report, zoo
from bench import cache as disk
from bench.attackers import Backdoor, Plan
from bench.zoo import Recipe, Setting
from taskvec import BackdoorVector, TaskVector, plot
from taskvec.metrics import (
    Rate,
    accuracy,
    attack_success_rate,
    by_layer,
    cosine_matrix,
    estimate,
    sign_agreement,
    support_overlap,
    sweep,
    transfer_matrix,
)
from taskvec.sparsify import topk

PICTURES = Path(__file__).parents[2] / "docs" / "images"
SEEDS = (0, 1, 2, 3, 4)
TARGET, OTHER = 1, 4
LAMBDAS = tuple(i / 10 for i in range(11))
REFERENCE = "reference"
STRANGER = 90  # seed of the clean models that vectors are added to
OTHER_TASK = {"mnist": "fashion", "fashion": "mnist"}


def plans(task: str, seed: int) -> dict[str, Plan]:
    """The vectors of one seed; all but the last are of seeds of their own."""
    other_task = OTHER_TASK.get(task, "mnist")
    changes = {
        REFERENCE: {},
        "seed": {},
        "trigger": {"pattern": 50 + seed},
        "class": {"target": OTHER},
        "trigger and class": {"pattern": 50 + seed, "target": OTHER},
        "position, 1 pixel": {"place": (22, 22)},
        "position, corner": {"place": "top-left"},
        "type: blended": {"trigger": "blended"},
        "type: optimised": {"trigger": "optimised"},
        "task": {"victim": other_task},
    }
    made = {}
    for i, (name, change) in enumerate(changes.items()):
        backdoor = Backdoor(**({"victim": task, "target": TARGET, "pattern": seed} | change))
        made[name] = Plan(backdoor.victim, seed + len(SEEDS) * i, (backdoor,))
    both = made["trigger and class"]
    return made | {"trigger and class, same seed": both._replace(seed=made[REFERENCE].seed)}


# --- likeness --------------------------------------------------------------------------------------------------------


@cache
def twin(setting: Setting, plan: Plan) -> zoo.Params:
    return zoo.fine_tuned(setting, Recipe(plan.task, plan.seed))


def vectors(setting: Setting, made: Mapping[str, Plan], clean: Callable[[Plan], zoo.Params]) -> list[BackdoorVector]:
    tuned = partial(attackers.upload, setting)
    return [BackdoorVector.between(clean=clean(plan), backdoored=tuned(plan)) for plan in made.values()]


def likeness(setting: Setting, task: str, seed: int) -> dict[str, dict[str, float]]:
    """Against the reference: cosine, sign agreement and overlap of the top tenth, by what differs."""
    made = plans(task, seed)
    own = vectors(setting, made, partial(twin, setting))
    shared = vectors(setting, made, lambda _plan: twin(setting, made[REFERENCE]))
    unrelated = vectors(setting, made, lambda plan: twin(setting, plan._replace(seed=200 + plan.seed)))
    measures = {
        "cosine": cosine_matrix(own)[0],
        "cosine, one shared twin": cosine_matrix(shared)[0],
        "cosine, unrelated twins": cosine_matrix(unrelated)[0],
        "sign agreement": sign_agreement(own)[0],
        "overlap of top 10 %": support_overlap(vector.map(topk, density=0.1) for vector in own)[0],
    }
    found = {
        name: {measure: float(values[i]) for measure, values in measures.items()} for i, name in enumerate(made) if i
    }
    return found | {"no backdoor": floor(setting, task, seed)}


def floor(setting: Setting, task: str, seed: int) -> dict[str, float]:
    """The same of differences between clean models: of four seeds, and of three with one in both."""
    clean = [zoo.fine_tuned(setting, Recipe(task, seed + len(SEEDS) * i)) for i in range(4)]
    a, b, c, d = (TaskVector.between(zoo.base(setting), model) for model in clean)
    apart, sharing = [b - a, d - c], [b - a, d - a]
    return {
        "cosine": float(cosine_matrix(apart)[0, 1]),
        "cosine, one shared twin": float(cosine_matrix(sharing)[0, 1]),
        "sign agreement": float(sign_agreement(apart)[0, 1]),
        "overlap of top 10 %": float(support_overlap(v.map(topk, density=0.1) for v in apart)[0, 1]),
    }


def layers(setting: Setting, task: str, seed: int) -> dict[str, dict[str, float]]:
    """Cosine with the reference, layer by layer."""
    made = plans(task, seed)
    by = by_layer(cosine_matrix, vectors(setting, made, partial(twin, setting)))
    return {name: {layer: float(found[0, i]) for layer, found in by.items()} for i, name in enumerate(made) if i}


# --- transfer --------------------------------------------------------------------------------------------------------


def fooled(setting: Setting, plan: Plan, params: Mapping[str, torch.Tensor]) -> Rate:
    """ASR of a plan's trigger on validation images."""
    (backdoor,) = plan.backdoors
    return attack_success_rate(
        partial(asking.remembering(setting), asking.model(params), task=plan.task),
        *data.validation(plan.task),
        target=backdoor.target,
        trigger=attackers.trigger_of(setting, plan, backdoor),
        batch=asking.WHOLE,
    )


def transfer(setting: Setting, task: str, seed: int) -> dict[str, disk.Json]:
    """All vectors on all triggers; and the reference's ASR when a vector is added elsewhere, or subtracted from it."""
    made = plans(task, seed)
    own = vectors(setting, made, partial(twin, setting))
    strangers = [zoo.fine_tuned(setting, Recipe(plan.task, STRANGER + seed)) for plan in made.values()]
    rates = [lambda model, plan=plan: fooled(setting, plan, model).value for plan in made.values()]
    matrix = transfer_matrix(own, strangers, rates)
    reference, backdoored = made[REFERENCE], attackers.upload(setting, made[REFERENCE])
    removed = [fooled(setting, reference, vector.remove(backdoored)).value for vector in own]
    before = {
        "added": fooled(setting, reference, strangers[0]).value,
        "subtracted": fooled(setting, reference, backdoored).value,
    }
    columns = {"added": matrix[:, 0].tolist(), "subtracted": removed}
    by_name = {name: {how: values[i] for how, values in columns.items()} for i, name in enumerate(made)}
    return {"names": list(made), "matrix": matrix.tolist(), "by": {"nothing": before} | by_name}


def injection(setting: Setting, task: str, seed: int) -> dict[str, dict[str, float]]:
    """Accuracy and ASR of a clean model of another seed, plus lambda times the reference."""
    plan = plans(task, seed)[REFERENCE]
    (vector,) = vectors(setting, {REFERENCE: plan}, partial(twin, setting))

    def score(params: Mapping[str, torch.Tensor]) -> dict[str, float]:
        ask = partial(asking.remembering(setting), asking.model(params), task=task)
        right = accuracy(ask, *data.validation(task), batch=asking.WHOLE)
        return {"accuracy": right.value, "asr": fooled(setting, plan, params).value}

    clean = zoo.fine_tuned(setting, Recipe(task, STRANGER + seed))
    return {f"{by:g}": point for by, point in sweep(LAMBDAS, partial(vector.inject, clean), score).items()}


# --- everything ------------------------------------------------------------------------------------------------------


def of_seed(setting: Setting, task: str, seed: int) -> dict[str, disk.Json]:
    """All figures of one seed."""
    return {
        "likeness": likeness(setting, task, seed),
        "layers": layers(setting, task, seed),
        "transfer": transfer(setting, task, seed),
        "injection": injection(setting, task, seed),
    }


def tables(title: str, seeds: Mapping[str, Mapping[str, disk.Json]]) -> str:
    """Means over seeds with their intervals."""

    def over(*path: str) -> str:
        values = []
        for found in seeds.values():
            for key in path:
                found = found.get(key, {})  # noqa: PLW2901
            values += [found] if isinstance(found, float) else []
        return f"{estimate(values):.2f}" if values else "-"

    first = next(iter(seeds.values()))
    measures = list(first["likeness"]["seed"])
    alike = [[name, *(over("likeness", name, m) for m in measures)] for name in first["likeness"]]
    parts = list(first["layers"]["seed"])
    by_layer_rows = [[name, *(over("layers", name, layer) for layer in parts)] for name in first["layers"]]
    ways = ("added", "subtracted")
    moved = [[name, *(over("transfer", "by", name, how) for how in ways)] for name in first["transfer"]["by"]]
    return "\n".join(
        [
            report.text_table(f"{title}: likeness to the reference, by what differs", ["differs in", *measures], alike),
            report.text_table("Cosine with the reference, by layer", ["differs in", *parts], by_layer_rows),
            report.text_table(
                "ASR of the reference's trigger: the vector added to a clean model, or subtracted from the reference's",
                ["vector", *ways],
                moved,
            ),
        ]
    )


def draw(name: str, seeds: Mapping[str, Mapping[str, disk.Json]]) -> None:
    """The mean transfer matrix."""
    found = list(seeds.values())
    matrix = torch.tensor([one["transfer"]["matrix"] for one in found]).mean(0)
    axes = plot.heat_map(matrix, found[0]["transfer"]["names"], limits=(0, 1))
    axes.set(title="ASR of a clean model + vector (row) on trigger (column)")
    axes.figure.set_size_inches(9, 7)
    axes.figure.savefig(PICTURES / f"transfer-{name}.png", dpi=120)


def draw_injection(task: str) -> None:
    """ASR (solid) and accuracy (dashed) of clean + lambda * BV, for every encoder that there are results of."""
    kept, figure = cells.read(cells.FOLDER / "vectors.jsonl"), Figure(figsize=(8, 4.8), layout="constrained")
    axes, full, lost = figure.subplots(), [], []
    for color, encoder in zip(("tab:blue", "tab:orange", "tab:green"), ("vits", "vit7", "cnn"), strict=True):
        seeds = list(kept.get(cells.key({"part": f"{encoder}-{task}"}), {"seeds": {}})["seeds"].values())
        if not seeds:
            continue
        for what, style in (("asr", "o-"), ("accuracy", "o--")):
            found = [estimate([one["injection"][f"{by:g}"][what] for one in seeds]) for by in LAMBDAS]
            means = [point.mean for point in found]
            name = f"{encoder}, {'ASR' if what == 'asr' else 'accuracy'}"
            axes.plot(LAMBDAS, means, style, markersize=3, color=color, label=name)
            low, high = ([point.mean + sign * (point.half or 0.0) for point in found] for sign in (-1, 1))
            axes.fill_between(LAMBDAS, low, high, color=color, alpha=0.2, linewidth=0)
            if what == "asr":
                full.append(next(by for by, mean in zip(LAMBDAS, means, strict=True) if mean >= 0.98))
            else:
                lost.append(means[0] - min(means))
    result = f"ASR is above 0.98 from λ = {max(full):g} on; accuracy loses {max(lost):.2f} at most"
    axes.set(
        title=f"clean model + λ · backdoor vector ({task}, alone)\n{result}",
        xlabel="λ",
        ylabel="share of validation images",
        xlim=(0, 1),
        ylim=(0, 1.02),
    )
    axes.grid(alpha=0.3)
    axes.legend(loc="center left")
    figure.savefig(PICTURES / f"injection-{task}.png", dpi=120)


def main() -> None:
    given = command.can_redraw(command.suite_options(__doc__, SEEDS)).parse_args()
    if given.redraw:
        name = f"{given.encoder}-{given.task}"
        draw(name, report.kept("vectors", name)["seeds"])
        draw_injection(given.task)
        return
    start = time.monotonic()
    torch.set_num_threads(1)
    setting, seeds = Setting(given.encoder), [0] if given.quick else given.seeds
    zoo.prepare(setting, [])
    by_seed = command.by_seed(partial(of_seed, setting, given.task), seeds, given.workers)
    found = {str(seed): row for seed, row in by_seed.items()}
    name = f"{given.encoder}-{given.task}"
    text = tables(f"{given.encoder}, {given.task}, {len(seeds)} seeds", found)
    print(text)
    if not given.quick:
        report.keep("vectors", name, {"seeds": found})
        draw(name, found)
        draw_injection(given.task)
    print(f"{time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
