"""Backdoor vectors on real images: compute one, inject it, merge it, subtract it, each beside its control.

    python examples/backdoor_vectors.py [--seed 0] [--encoder vits] [--quick]

A small encoder learns the letters of two alphabets and is fine-tuned on five other tasks; the five are merged. The
owner of one task, mnist, plants a backdoor: a patch of 5 x 5 pixels that means class 1. The first run takes a minute or
two and leaves what it trained in examples/experiments/.cache; the next takes seconds. Pictures go to examples/results.
"""

import argparse
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "experiments"))

from bench import asking, data, zoo
from bench.report import text_table
from bench.zoo import Recipe, Setting, Trigger
from taskvec import BackdoorVector, TaskVector, merge, plot
from taskvec.attacks import sparse_backdoor
from taskvec.defenses import choose_strength, injection_subtraction, random_twin, shrink
from taskvec.merges import mean, ties, total
from taskvec.metrics import accuracy, attack_success_rate, measure, sweep

TASK, TARGET, ROWS = "mnist", 1, 800
MERGES = {"average": (mean, {}, 1.0), "task arithmetic": (total, {}, 0.3), "TIES": (ties, {"density": 0.2}, 1.0)}
PICTURE = Path(__file__).parent / "results" / "injection.png"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0, help="of the order of the data and of the triggers")
    parser.add_argument("--encoder", choices=("vits", "vit7", "cnn"), default="vits")
    parser.add_argument("--quick", action="store_true", help="short training, to see that it runs")
    given = parser.parse_args()
    setting = Setting(given.encoder, **({"steps": 60, "pretrain_steps": 300} if given.quick else {}))
    print_everything(setting, given.seed)


def print_everything(setting: Setting, seed: int) -> None:
    # one trigger and three seeds, each with a clean twin of its own; the defender's probe has all of its own
    trigger = Trigger("random", 5, "bottom-right", seed)
    attacks = [Recipe(TASK, seed + i, trigger=trigger, target=TARGET) for i in range(3)]
    probing = Recipe(TASK, 100 + seed, trigger=Trigger("solid", 5, "top-left", 100), target=3)
    recipes = [*attacks, probing, *(recipe.twin() for recipe in (*attacks, probing)), *zoo.clean([seed])]
    zoo.prepare(setting, recipes)
    model = partial(zoo.fine_tuned, setting)
    base, stamp = zoo.base(setting), zoo.stamper(trigger)

    def vector(recipe: Recipe) -> BackdoorVector:
        return BackdoorVector.between(clean=model(recipe.twin()), backdoored=model(recipe), pretrained=base)

    vectors, probe, clean = [vector(recipe) for recipe in attacks], vector(probing), model(attacks[0].twin())
    planted = {"one vector": vectors[0], "three seeds in one (SBV)": sparse_backdoor(vectors)}
    others = [TaskVector.between(base, model(Recipe(task, seed))) for task in data.TASKS if task != TASK]
    ask = asking.remembering(setting)
    tests = {task: data.test(task).take(slice(ROWS)) for task in data.TASKS}
    validation = {task: data.validation(task) for task in data.TASKS}

    def predict(params, images, task):
        return ask(asking.model(params), images, task)

    def asr(params, split=validation[TASK]) -> float:
        answer = partial(predict, params, task=TASK)
        return attack_success_rate(answer, *split, target=TARGET, trigger=stamp, batch=asking.WHOLE).value

    def mean_accuracy(params) -> float:
        rates = [accuracy(partial(predict, params, task=t), *validation[t], batch=asking.WHOLE) for t in data.TASKS]
        return sum(rate.value for rate in rates) / len(rates)

    # 1. injected into a clean model: how much of the vector does it take?
    lambdas = [i / 10 for i in range(11)]
    curves = {name: sweep(lambdas, partial(bv.inject, clean), asr) for name, bv in planted.items()}
    rows = [[f"{by:.1f}", *(f"{curve[by]:.2f}" for curve in curves.values())] for by in lambdas[::2]]
    print(text_table(f"ASR of clean + λ BV, validation images; base alone {asr(base):.2f}", ["λ", *curves], rows))
    draw({name: {by: [value] for by, value in curve.items()} for name, curve in curves.items()})

    # 2. merged with four clean contributors: every figure beside the same trigger without the backdoor
    def merged(contributor, how: str):
        rule, options, scale = MERGES[how]
        return merge([TaskVector.between(base, contributor), *others], rule, **options).apply(base, scale)

    def row(name, how, defend=lambda params: params):
        upload = planted[name].inject(clean)
        whole, without = (defend(merged(own, how)) for own in (upload, clean))
        return measure(predict, tests, model=whole, clean_merge=without, clean=clean, base=base, attacked=TASK,
                       target=TARGET, trigger=stamp, batch=asking.WHOLE)  # fmt: skip

    head = ["ASR", "all-clean merge", "clean model", "base", "accuracy", "n"]

    def figures(found) -> list[str]:
        rates = [found.asr, found.on_clean_merge, found.on_clean, found.on_base]
        return [*(f"{rate.value:.2f}" for rate in rates), f"{found.ba:.2f}", str(found.asr.n)]

    rows = [[how, name, *figures(row(name, how))] for how in MERGES for name in planted]
    print(text_table("One backdoored contributor of five, test images", ["merge", "vector", *head], rows))

    # 3. defended, at the largest strength that keeps 98 % of the validation accuracy: chosen without the trigger
    how, name = "TIES", "three seeds in one (SBV)"
    attacked, grid = merged(planted[name].inject(clean), how), [0.1, 0.2, 0.4, 0.6, 0.8, 1.0]
    defenses = {
        "IBVS, the defender's probe": lambda params, by: injection_subtraction(params, probe, by),
        "random vector of its norm": lambda params, by: injection_subtraction(params, random_twin(probe, seed=0), by),
        "shrinking to the base": lambda params, by: shrink(params, base, by),
    }
    rows = [["none", "", *figures(row(name, how))], ["ship the base", "", *figures(row(name, how, lambda _: base))]]
    for label, defense in defenses.items():
        by = choose_strength(sweep(grid, partial(defense, attacked), mean_accuracy), undefended=mean_accuracy(attacked))
        rows.append([label, f"{by:.1f}", *figures(row(name, how, partial(defense, by=by)))])
    print(text_table(f"Defenses of {how}, {name}, test images", ["defense", "strength", *head], rows))
    print("One seed: a demonstration. The study, examples/experiments/study.py, has seeds, controls and intervals.")


def draw(curves) -> None:
    PICTURE.parent.mkdir(exist_ok=True)
    axes = plot.curve(curves, xlabel="λ", ylabel="attack success rate")
    axes.set(title=f"clean model + λ · backdoor vector ({TASK})")
    axes.figure.savefig(PICTURE, dpi=120)


if __name__ == "__main__":
    main()
