"""Backdoor vectors on real images: computed, injected, combined and subtracted, each beside its control.

    python examples/backdoor_vectors.py [--seed 0] [--attack-task mnist] [--encoder vits] [--quick]

A small encoder learns the letters of two alphabets, is fine-tuned on five other tasks, and the five are merged. One of
the contributors plants a backdoor. What it does to the merge, and what defences do to it, is measured as in the
protocol of the documentation: choices on validation images, test images once, every figure beside its control.
The first run takes minutes and leaves everything it trained in examples/.cache; the next takes seconds.
"""

import argparse
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from suite import bench, cache, data, judge, pictures, report, tables, zoo
from suite.bench import MERGES, Attack, Bench, Defence, Merge, Point
from suite.progress import progress
from suite.training import Progress
from suite.zoo import Recipe, Setting, Trigger
from taskvec import BackdoorVector, TaskVector
from taskvec.attacks import amplify, sparse_backdoor
from taskvec.metrics import cosine_matrix, sweep

RESULTS = Path(__file__).parent / "results"
TARGET, OTHER, PROBE = 1, 2, 3  # classes: of the attack, of the attack with another, of the defender's probe
LAMBDAS = tuple(i / 10 for i in range(11))
LOUDER = 1.5  # how much the amplified vector is longer
SAME = ("A, seed 0", "A, seed 1", "A, seed 2")  # one trigger, three seeds
DIFFERENT = ("A, seed 0", "B", "C")  # three triggers, one class
DEFENDED = ("single A, seed 0", "SBV of A's 3 seeds", f"SBV of A's 3 seeds x {LOUDER}")
TRIGGERS = {"trigger A": "A, seed 0", "trigger B": "B", "trigger C": "C", "defender's": "probe"}
ATTACKS = 10  # of `attacks`


class Options(NamedTuple):
    """What the command line says."""

    seed: int = 0
    attack_task: str = "mnist"
    setting: Setting = Setting()
    rows: int = 800  # test images of the attacked task; half as many of each other
    draws: int = 5  # of random twins


def options() -> Options:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0, help="of the order of the data, the triggers and the draws")
    parser.add_argument("--attack-task", choices=data.TASKS, default="mnist", help="the task whose model is backdoored")
    parser.add_argument("--encoder", choices=("vits", "vit7", "cnn"), default="vits")
    parser.add_argument("--quick", action="store_true", help="short training, few images: to see that it runs")
    given = parser.parse_args()
    if given.quick:
        setting = Setting(given.encoder, steps=60, pretrain_steps=300)
        return Options(given.seed, given.attack_task, setting, rows=200, draws=2)
    return Options(given.seed, given.attack_task, Setting(given.encoder))


def folder(given: Options) -> Path:
    """Where the results go: those of other options than the default ones do not overwrite those that the docs show."""
    if given == Options():
        return RESULTS
    quick = "-quick" if given.setting.pretrain_steps else ""
    return RESULTS / f"{given.attack_task}-{given.setting.encoder}-seed{given.seed}{quick}"


# --- the models and their vectors ------------------------------------------------------------------------------------


def roster(task: str, seed: int) -> dict[str, Recipe]:
    """The backdoored models, each with its own seed and clean twin; the probe is made of the other half of the data."""
    a, b, c = (Trigger(seed=10 * seed + i) for i in range(3))
    planted = partial(Recipe, task, rows="attacker", target=TARGET)
    return {
        "A, seed 0": planted(seed=10 * seed, trigger=a),
        "A, seed 1": planted(seed=10 * seed + 1, trigger=a),
        "A, seed 2": planted(seed=10 * seed + 2, trigger=a),
        "B": planted(seed=10 * seed + 3, trigger=b),
        "C": planted(seed=10 * seed + 4, trigger=c),
        "A, other class": planted(seed=10 * seed + 5, trigger=a, target=OTHER),
        "probe": Recipe(task, 10 * seed + 6, "defender", Trigger("solid", place="top-left"), PROBE),
    }


def bystanders(task: str, seed: int) -> dict[str, Recipe]:
    """The clean models of the other tasks."""
    return {other: Recipe(other, 10 * seed) for other in data.TASKS if other != task}


def helpers(task: str, seed: int) -> list[Recipe]:
    """Two clean fine-tunes of the attacked task, from the half of the data that the attacker does not have."""
    return [Recipe(task, 10 * seed + 6 + i, "defender") for i in range(2)]


def train(given: Options) -> None:
    """Make every model of the study, unless it is in the cache."""
    planted = list(roster(given.attack_task, given.seed).values())
    clean = [*bystanders(given.attack_task, given.seed).values(), *helpers(given.attack_task, given.seed)]
    zoo.prepare(given.setting, [*planted, *(recipe.twin() for recipe in planted), *clean])


def backdoor_vectors(given: Options, twin: str | None = None) -> dict[str, BackdoorVector]:
    """The backdoor vector of every model of the roster, from its own clean twin or, if named, from that one's."""
    tuned, recipes = partial(zoo.fine_tuned, given.setting), roster(given.attack_task, given.seed)
    return {
        name: BackdoorVector.between(
            clean=tuned(recipes[twin or name].twin()),
            backdoored=tuned(recipe),
            pretrained=zoo.base(given.setting),
        )
        for name, recipe in recipes.items()
    }


def attacks(given: Options, vectors: dict[str, BackdoorVector]) -> dict[str, Attack]:
    """What an attacker may hand in: single backdoor vectors, and several in one, of the same length."""
    recipes = roster(given.attack_task, given.seed)

    def attack(name: str, vector: BackdoorVector, model: str = SAME[0], trigger: str = "A, seed 0") -> Attack:
        clean = zoo.fine_tuned(given.setting, recipes[model].twin())
        upload = judge.model(vector.inject(clean))
        return Attack(name, judge.model(clean), vector, upload, zoo.patch_of(recipes[trigger].trigger), TARGET)

    same = sparse_backdoor([vectors[name] for name in SAME])
    different = sparse_backdoor([vectors[name] for name in DIFFERENT])
    singles = [attack(f"single {name}", vectors[name], name, name) for name in dict.fromkeys((*SAME, *DIFFERENT))]
    combined = [
        attack("SBV of A's 3 seeds", same),
        attack(f"SBV of A's 3 seeds x {LOUDER}", amplify(same, LOUDER)),
        *(attack(f"SBV of A, B, C; woken by {name[0]}", different, trigger=name) for name in DIFFERENT),
    ]
    return {each.name: each for each in (*singles, *combined)}


def workbench(given: Options, predict: judge.Predict) -> Bench:
    """What all measurements share."""
    base = zoo.base(given.setting)
    others = [
        TaskVector.between(base, zoo.fine_tuned(given.setting, recipe))
        for recipe in bystanders(given.attack_task, given.seed).values()
    ]
    order = (given.attack_task, *(task for task in data.TASKS if task != given.attack_task))
    tests = {task: data.test(task).take(slice(given.rows if task == order[0] else given.rows // 2)) for task in order}
    validations = {task: data.validation(task, 100) for task in order}
    return Bench(predict, judge.model(base), others, given.attack_task, tests, validations, made={})


# --- what is asked of them -------------------------------------------------------------------------------------------


def calibration(given: Options, shared: Bench, clean: Attack) -> dict[str, dict[str, float]]:
    """Test accuracy of each task: the base, the clean merge by task arithmetic, and the fine-tuned model alone."""
    others = bystanders(given.attack_task, given.seed)
    alone = {task: judge.model(zoo.fine_tuned(given.setting, recipe)) for task, recipe in others.items()}
    alone[given.attack_task] = clean.clean
    summed = judge.model(bench.combiner(shared, MERGES[1])(clean.clean))
    lines = {"base": dict.fromkeys(alone, shared.base), "merged": dict.fromkeys(alone, summed), "fine-tuned": alone}
    return {
        name: {task: bench.right(shared, models[task], task).value for task in shared.tests}
        for name, models in lines.items()
    }


def likeness(given: Options, own: dict[str, BackdoorVector]) -> dict[str, cache.Json]:
    """Norms and cosines of the backdoor vectors: of their own clean twins, and of one that all share."""
    shared = backdoor_vectors(given, twin=SAME[0])
    recipes = roster(given.attack_task, given.seed)
    return {
        "names": list(own),
        "kinds": [[recipes[name].trigger._asdict(), recipes[name].target] for name in own],
        "norms": [float(vector.norm()) for vector in own.values()],
        "own twins": cosine_matrix(own.values()).tolist(),
        "one shared twin": cosine_matrix(shared.values()).tolist(),
    }


def alone(shared: Bench, attack: Attack) -> dict[str, cache.Json]:
    """A backdoored model by itself, its clean twin, and the base, under the same trigger."""
    who = {"backdoored": attack.upload, "clean twin": attack.clean, "on base": shared.base}
    points = {name: bench.alone(shared, attack, asked.params)._asdict() for name, asked in who.items()}
    images = bench.fooled(shared, attack, attack.upload, shared.tests[shared.attacked]).n
    return {"attack": attack.name, "n": images} | points


def injection(shared: Bench, singles: list[Attack]) -> dict[str, cache.Json]:
    """Test accuracy and ASR of `clean + lambda * BV`, the attacked task's model alone, for each seed."""
    curves = {
        attack.name: sweep(
            LAMBDAS, partial(attack.vector.inject, attack.clean.params), partial(bench.alone, shared, attack)
        )
        for attack in singles
    }
    return {name: report.points_json(curve) for name, curve in curves.items()}


def undefended(shared: Bench, planted: dict[str, Attack]) -> Iterator[dict[str, cache.Json]]:
    """Every attack under every merge, at the paper's scale and at the one of most validation accuracy."""
    for attack in planted.values():
        for how in MERGES:
            scales = {"paper": how.scale}
            if how.scales:
                scales["validated"] = bench.best_scale(shared, how, attack)
            for kind, scale in scales.items():
                combine = bench.combiner(shared, how, scale)
                row = bench.cell(shared, attack, combine, bench.UNDEFENDED, 0.0)
                names = {"attack": attack.name, "merge": how.name, "scale": scale, "scale is": kind}
                yield names | {"norm": float(attack.vector.norm())} | report.measurement_json(row)


def defended(
    given: Options, shared: Bench, attack: Attack, how: Merge, probe: BackdoorVector, twins: list[list[Defence]]
) -> tuple[list[dict[str, cache.Json]], dict[str, cache.Json]]:
    """One attack under one merge: a row for each defence, and the front of each that has strengths."""
    clean = [zoo.fine_tuned(given.setting, recipe) for recipe in helpers(given.attack_task, given.seed)]
    choices = bench.defences(shared, attack, probe, clean)
    fronts = {defence.name: bench.front(shared, attack, how, defence) for defence in choices}
    strengths = {defence.name: bench.chosen(defence, fronts[defence.name]) for defence in choices}
    combine = bench.combiner(shared, how)
    rows = []

    def add(draws: list[Defence], by: float, point: Point | None) -> None:
        cells = [bench.cell(shared, attack, combine, draw, by) for draw in draws]
        names = {"attack": attack.name, "merge": how.name, "defence": draws[0].name, "given": draws[0].given}
        bound = None if point is None else bench.shrunk_to(point.accuracy, fronts["shrinking"])
        rows.append(names | {"strength": by, "shrinking as accurate": bound} | report.draws_json(cells))

    for defence in choices:
        by = strengths[defence.name]
        add([defence], by, fronts[defence.name][by])
        if defence.name == "IBVS":
            for draws in twins:
                add(draws, by, None)
    return rows, {name: report.points_json(points) for name, points in fronts.items() if len(points) > 1}


def study(given: Options, shared: Bench, step: Progress) -> dict[str, cache.Json]:
    """All figures."""
    vectors = backdoor_vectors(given)
    planted = attacks(given, vectors)
    singles = [planted[f"single {name}"] for name in SAME]
    results = {
        "calibration": calibration(given, shared, singles[0]),
        "alone": [alone(shared, attack) for name, attack in planted.items() if name.startswith("single")],
        "likeness": likeness(given, vectors),
        "injection": injection(shared, singles),
        "undefended": [],
        "defended": [],
        "fronts": {name: {} for name in DEFENDED},
    }
    for row in undefended(shared, planted):
        results["undefended"].append(row)
        step()
    probe = vectors["probe"]
    twins = bench.twins(probe, given.draws, given.seed)
    for name in DEFENDED:
        for how in MERGES:
            rows, results["fronts"][name][how.name] = defended(given, shared, planted[name], how, probe, twins)
            results["defended"] += rows
            step()
    return results


def draw(given: Options, results: dict[str, cache.Json]) -> None:
    """The pictures."""
    target = folder(given)
    recipes = roster(given.attack_task, given.seed)
    split = data.validation(given.attack_task)
    shown = data.few_shot(split.take(split.labels != TARGET), 1, seed=1).images[:8]
    stamps = {name: zoo.stamper(recipes[model].trigger)(shown) for name, model in TRIGGERS.items()}
    pictures.triggers(target / "triggers.png", {"clean": shown} | stamps)
    title = f"clean model + λ · backdoor vector ({given.attack_task}, alone)"
    control = results["alone"][0]["on base"]["asr"]
    pictures.injection(target / "injection.png", results["injection"], control, title)
    pictures.fronts(target / "defences.png", results["fronts"], bench.KEEP)


def main() -> None:
    given, start = options(), time.monotonic()
    torch.set_num_threads(1)  # fine-tunes and batches run side by side instead
    train(given)
    trained = time.monotonic()
    with cache.memory("answers", {"setting": zoo.settings(given.setting)}) as known:
        shared = workbench(given, judge.predictor(given.setting, known))
        cells = ATTACKS * sum(1 + bool(how.scales) for how in MERGES) + len(MERGES) * len(DEFENDED)
        with progress("measuring", cells) as step:
            results = study(given, shared, step)
    draw(given, results)
    seconds = {"training": trained - start, "measuring": time.monotonic() - trained}
    about = {"settings": given._asdict() | {"setting": given.setting._asdict()}, "versions": report.versions()}
    report.save_json(folder(given) / "backdoor_vectors.json", about | {"seconds": seconds} | results)
    text = tables.everything(results, given.rows)
    cache.write(folder(given) / "backdoor_vectors.txt", f"{text.strip()}\n".encode())
    print(text)
    print(f"In {folder(given)}: backdoor_vectors.json and .txt, triggers.png, injection.png, defences.png")
    print(f"{seconds['training']:.0f} s of training, {seconds['measuring']:.0f} s of measuring")


if __name__ == "__main__":
    main()
