"""Defences that were made for single models, against merges: Neural Cleanse, Fine-Pruning, Scale-Up.

    python examples/badmerging_defences.py --quick      one seed
    python examples/badmerging_defences.py              three seeds

The paper says that none of them finds BadMerging. Here each is also run on what it must tell it from, the all-clean
merge: an anomaly that a clean merge shows as well is no finding. The small ViT, the owner of mnist, target class 1;
everything on validation images, of which one half of the rows is the defender's and the other is measured on.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import attackers, command, data, detectors, merges, report, zoo
from bench import cache as disk
from bench.data import Split
from bench.progress import progress
from bench.training import Params, train
from bench.zoo import Recipe, Setting
from taskvec.metrics import accuracy, attack_success_rate, clustered, roc

SETTING, TASK, TARGET, SEEDS = Setting("vits"), "mnist", 1, (0, 1, 2)
ATTACKS = {"none": None, "BadNets": attackers.plain, "BadMerging-on": attackers.on_task}
PLACES = ("alone", "task arithmetic .3", "TIES 20 %, 1")
FRACTIONS = (0.0, 0.2, 0.4, 0.6, 0.8, 0.95)
LAYER, UNITS = "blocks.2.mlp.1", "blocks.2.mlp.0"  # the last block's hidden units


def halves(task: str) -> tuple[Split, Split]:
    """The defender's validation rows, and those that are measured on."""
    rows = data.validation(task)
    return rows.take(slice(0, None, 2)), rows.take(slice(1, None, 2))


def model_of(attack: str, place: str, seed: int) -> Params:
    """The attacker's upload alone, or a merge that holds it; "none" is the clean twin in its place."""
    made = {task: zoo.fine_tuned(SETTING, Recipe(task, seed)) for task in data.TASKS}
    if ATTACKS[attack] is not None:
        made[TASK] = attackers.upload(SETTING, ATTACKS[attack](TASK, TARGET, seed))
    return made[TASK] if place == "alone" else dict(merges.FAST[place](SETTING, made).params)


def triggers(attack: str, seed: int) -> dict[str, attackers.Images]:
    """The model's own trigger; for a clean model, both attacks', as controls."""
    names = [attack] if ATTACKS[attack] is not None else [name for name, made in ATTACKS.items() if made is not None]
    plans = {name: ATTACKS[name](TASK, TARGET, seed) for name in names}
    return {name: attackers.trigger_of(SETTING, plan, plan.backdoors[0]) for name, plan in plans.items()}


def found(attack: str, place: str, seed: int) -> dict[str, disk.Json]:
    """All figures of one model."""
    about = {
        "setting": zoo.settings(SETTING),
        "attack": attack,
        "place": place,
        "seed": seed,
        "task": TASK,
        "target": TARGET,
    }
    return disk.values("defences", about, partial(_found, attack, place, seed))


def _found(attack: str, place: str, seed: int) -> dict[str, disk.Json]:
    params = model_of(attack, place, seed)
    return {
        "Neural Cleanse": neural_cleanse(params, seed),
        "Fine-Pruning": fine_pruning(params, triggers(attack, seed), [TASK] if place == "alone" else data.TASKS),
        "Scale-Up": scale_up(params, triggers(attack, seed)),
    }


def score(params: Params, task: str, images: Tensor) -> Tensor:
    return attackers.head_of(SETTING, task)(attackers.embed(SETTING, params, images))


def neural_cleanse(params: Params, seed: int) -> dict[str, disk.Json]:
    images = halves(TASK)[0].images
    classes = range(len(data.CLASSES[TASK]))
    ask = partial(score, params, TASK)
    sizes = [detectors.reversed_trigger(ask, images, target, seed=seed)[2] for target in classes]
    return {"sizes": sizes, "anomaly": detectors.anomaly_indices(sizes)}


def fine_pruning(
    params: Params, stamped: Mapping[str, attackers.Images], tasks: Sequence[str]
) -> list[dict[str, disk.Json]]:
    """Accuracy and ASR by the fraction pruned, before and after 40 steps of fine-tuning on the defender's images."""
    module = zoo.architecture(SETTING).module
    activations = detectors.mean_activations(module, params, LAYER, halves(TASK)[0].images)
    rows = []
    for fraction in FRACTIONS:
        prune = partial(detectors.pruned, linear=UNITS, activations=activations, fraction=fraction)
        tuned = _tuned(params, prune, tasks)
        rows.append(
            {"fraction": fraction} | _both(prune(params), stamped, tasks) | {"tuned": _both(tuned, stamped, tasks)}
        )
    return rows


def _both(params: Params, stamped: Mapping[str, attackers.Images], tasks: Sequence[str]) -> dict[str, disk.Json]:
    rates = [accuracy(partial(score, params, task), *halves(task)[1]).value for task in tasks]
    measured = halves(TASK)[1]
    asr = {
        name: attack_success_rate(partial(score, params, TASK), *measured, target=TARGET, trigger=trigger).value
        for name, trigger in stamped.items()
    }
    return {"accuracy": sum(rates) / len(rates), "asr": asr}


def _tuned(params: Params, prune: Callable[[Params], Params], tasks: Sequence[str], steps: int = 40) -> Params:
    """A little training of what is left, on the defender's images; what is pruned stays so, as in the paper."""
    lessons = {task: data.batches(halves(task)[0], 32, 0) for task in tasks}

    def loss(p: Mapping[str, Tensor], _batch: Split, _step: int) -> Tensor:
        batches, left = {task: next(rows) for task, rows in lessons.items()}, prune(dict(p))
        return torch.stack([F.cross_entropy(score(left, t, b.images), b.labels) for t, b in batches.items()]).mean()

    idle = data.batches(halves(TASK)[0], 1, 0)  # the loss draws its own
    return prune(train(params, loss, idle, lr=zoo.architecture(SETTING).lr, steps=steps, warmup=5))


def scale_up(params: Params, stamped: Mapping[str, attackers.Images]) -> dict[str, disk.Json]:
    """Area under the ROC of triggered against clean images, those of the target class left out."""
    images, labels = halves(TASK)[1]
    clean = images[labels != TARGET]

    def classes(x: Tensor) -> Tensor:
        with torch.no_grad():
            return score(params, TASK, x).argmax(1)

    plain = detectors.scaled_consistency(classes, clean).tolist()
    return {
        name: roc(detectors.scaled_consistency(classes, trigger(clean)).tolist(), plain).area
        for name, trigger in stamped.items()
    }


# --- tables ----------------------------------------------------------------------------------------------------------


def tables(rows: Mapping[tuple[str, str], Mapping[int, Mapping[str, disk.Json]]]) -> str:
    cleanse, prune, scaled = [], [], []
    for (attack, place), by_seed in rows.items():

        def over(value, by_seed=by_seed):
            return clustered({(seed, TARGET): value(row) for seed, row in by_seed.items()})

        index = over(lambda row: row["Neural Cleanse"]["anomaly"][TARGET])
        others = over(lambda row: max(a for c, a in enumerate(row["Neural Cleanse"]["anomaly"]) if c != TARGET))
        flagged = over(lambda row: float(row["Neural Cleanse"]["anomaly"][TARGET] > 2))
        mask = over(lambda row: row["Neural Cleanse"]["sizes"][TARGET])
        cleanse.append([attack, place, index, others, mask, f"{flagged.mean:.2f}"])
        for name in next(iter(by_seed.values()))["Scale-Up"]:
            label = f"none ({name}'s trigger)" if attack == "none" else attack
            scaled.append([label, place, over(lambda row, name=name: 100 * row["Scale-Up"][name])])
            for i, fraction in enumerate(FRACTIONS):
                figures = [
                    over(
                        lambda row, i=i, name=name, part=part, what=what: _figure(
                            row["Fine-Pruning"][i], part, what, name
                        )
                    )
                    for part in ("cut", "tuned")
                    for what in ("accuracy", "asr")
                ]
                prune.append([label, place, f"{fraction:g}", *figures])
    first = ["attack", "model"]
    return "\n".join(
        [
            report.text_table(
                "Neural Cleanse: anomaly index of the target class, flagged above 2",
                [*first, "target", "highest other", "mask", "flagged"],
                cleanse,
            ),
            report.text_table(
                "Fine-Pruning of the last block's units: accuracy and ASR, %, pruned and then fine-tuned",
                [*first, "pruned", "accuracy", "ASR", "tuned: accuracy", "ASR"],
                prune,
            ),
            report.text_table(
                "Scale-Up: area under the ROC, %, triggered against clean images; 50 is chance",
                [*first, "area"],
                scaled,
            ),
        ]
    )


def _figure(row: Mapping[str, disk.Json], part: str, what: str, name: str) -> float:
    chosen = row if part == "cut" else row["tuned"]
    return 100 * (chosen["asr"][name] if what == "asr" else chosen["accuracy"])


def main() -> None:
    given = command.options(__doc__, SEEDS).parse_args()
    start = time.monotonic()
    torch.set_num_threads(1)
    seeds = [0] if given.quick else given.seeds
    zoo.prepare(SETTING, zoo.clean(seeds))
    asked = [(attack, place, seed) for attack in ATTACKS for place in PLACES for seed in seeds]
    rows: dict[tuple[str, str], dict[int, dict[str, disk.Json]]] = {}
    with zoo.workforce(given.workers) as pool, progress("models", len(asked)) as step:
        for (attack, place, seed), row in zip(asked, pool.map(found, *zip(*asked, strict=True)), strict=True):
            rows.setdefault((attack, place), {})[seed] = row
            step()
    text = tables(rows)
    print(text)
    if not given.quick:
        kept = [
            {"attack": a, "model": p, "seed": s} | row for (a, p), by_seed in rows.items() for s, row in by_seed.items()
        ]
        report.keep("detectors", "all", {"rows": kept})
    print(f"{time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
