"""BadMerging on real images: an attack made for merging, beside the control that its own evaluation lacks.

    python examples/badmerging.py --quick [--seed 0] [--attack-task mnist] [--target 1]

One contributor of five plants a backdoor: a plain patch (BadNets), an optimised universal trigger with the plain loss,
or BadMerging, the optimised trigger with the feature-interpolation loss. Five merges, and in every row what the same
trigger does to the base, to the attacker's clean twin and to the all-clean merge. Every cell is a file in
examples/.cache, so that a run that was stopped goes on where it was.

Only `--quick` is here so far: one seed, one target, on-task, the small vision transformer. Off-task attacks, the ladder
and the full table over seeds are to come.
"""

import argparse
import time
from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from suite import cache as disk
from suite import data, judge, report, zoo
from suite.encoders import features
from suite.heads import logits
from suite.progress import progress
from suite.training import train
from suite.zoo import Recipe, Setting
from taskvec import TaskVector, merge
from taskvec.adaptive import adamerging
from taskvec.attacks.badmerging import Pair, badmerging_loss, universal_trigger
from taskvec.attacks.triggers import Patch, random_patch, stamp
from taskvec.evaluate import measure
from taskvec.merges import mean, ties, total
from taskvec.statistics import linear_grams, regmean

RESULTS = Path(__file__).parent / "results"
ROWS = 800  # test images of the attacked task; half as many of others
STATISTICS = 256  # validation images a task that RegMean's Gram matrices are collected on

Params = Mapping[str, Tensor]


class Plan(NamedTuple):
    """One backdoored model. With neither of the last two it is BadNets, with both BadMerging."""

    task: str
    target: int
    seed: int
    size: int = 5
    optimised: bool = False
    interpolated: bool = False


ATTACKS = {
    "BadNets": {},
    "optimised trigger": {"optimised": True},
    "BadMerging-on": {"optimised": True, "interpolated": True},
}


# --- the models ------------------------------------------------------------------------------------------------------


def embed(setting: Setting, params: Params, images: Tensor) -> Tensor:
    return features(zoo.architecture(setting).module, params, images)


def head_of(setting: Setting, task: str) -> Callable[[Tensor], Tensor]:
    return partial(logits, head=zoo.head(setting, task))


def key(setting: Setting, plan: Plan) -> dict[str, disk.Json]:
    return {"setting": setting._asdict(), "plan": plan._asdict()}


@cache
def patch_of(setting: Setting, plan: Plan) -> Patch:
    """A random patch, or one optimised on the base model from there, on the attacker's own training images."""
    start = random_patch(plan.size, zoo.SHAPE, seed=plan.seed)
    if not plan.optimised:
        return start
    base, head = zoo.base(setting), head_of(setting, plan.task)

    def make() -> dict[str, Tensor]:
        images = data.pool(plan.task).images
        score: Callable[[Tensor], Tensor] = lambda x: head(embed(setting, base, x))  # noqa: E731
        return {"pattern": universal_trigger(score, images, start, target=plan.target, seed=plan.seed).pattern}

    pattern = disk.tensors("universal trigger", key(setting, plan._replace(interpolated=False)), make)["pattern"]
    return Patch(pattern, start.mask)


def upload(setting: Setting, plan: Plan) -> Params:
    """The backdoored fine-tune: the clean one's data in the clean one's order, and the backdoor's loss beside it."""

    def make() -> dict[str, Tensor]:
        base, head = zoo.base(setting), head_of(setting, plan.task)
        pair = Pair(partial(stamp, patch=patch_of(setting, plan)), plan.target, head)
        loss = badmerging_loss(
            partial(embed, setting),
            base,
            head,
            [pair],
            weight=5.0 if plan.optimised else 1.0,
            coefficients=(0.2, 1.0) if plan.interpolated else (1.0, 1.0),
            seed=plan.seed,
        )
        batches = data.batches(data.pool(plan.task), 64, plan.seed)
        lr = zoo.architecture(setting).lr
        return train(base, lambda p, b, _: loss(p, b.images, b.labels), batches, lr=lr, steps=setting.steps)

    return disk.tensors("badmerging", key(setting, plan), make)


# --- the merges ------------------------------------------------------------------------------------------------------


def by_regmean(setting: Setting, base: Params, models: Mapping[str, Params]) -> Params:
    """Gram matrices from each task's validation images, in the model its contributor handed in."""
    grams = []
    for task, params in models.items():
        images = data.validation(task).images[:STATISTICS]
        own = {name: p.detach() for name, p in params.items()}
        grams.append(linear_grams(partial(embed, setting, own), own, images.split(64)).matrices)
    vectors = [TaskVector.between(base, params) for params in models.values()]
    return merge(vectors, regmean, gram=grams).apply(base)


def by_adamerging(setting: Setting, base: Params, models: Mapping[str, Params], steps: int = 60) -> Params:
    """Layer-wise coefficients by the entropy on validation images."""

    def scores(params: Params, images: Tensor, task: str) -> Tensor:
        return head_of(setting, task)(embed(setting, params, images))

    def loader(task: str) -> Callable[[], list[Tensor]]:
        order = torch.randperm(data.VALIDATION, generator=torch.Generator().manual_seed(0))
        return lambda: iter(data.validation(task).images[order].split(16))

    vectors = [TaskVector.between(base, params) for params in models.values()]
    loaders = {task: loader(task) for task in models}
    return adamerging(scores, base, vectors, loaders, steps=steps, lr=1e-2)[0]


def elementwise(rule: Callable[..., Tensor], scale: float, **options: float) -> Callable[..., Params]:
    def combine(_setting: Setting, base: Params, models: Mapping[str, Params]) -> Params:
        vectors = [TaskVector.between(base, params) for params in models.values()]
        return merge(vectors, rule, **options).apply(base, scale)

    return combine


MERGES: dict[str, Callable[[Setting, Params, Mapping[str, Params]], Params]] = {
    "average": elementwise(mean, 1.0),
    "task arithmetic .3": elementwise(total, 0.3),
    "TIES 20 %, 1": elementwise(ties, 1.0, density=0.2),
    "RegMean": by_regmean,
    "AdaMerging": by_adamerging,
}


# --- the table -------------------------------------------------------------------------------------------------------


def cell(setting: Setting, plan: Plan, how: str) -> dict[str, disk.Json]:
    """One row with everything: attacked merge, all-clean merge, clean twin alone and base, under the same trigger."""

    def make() -> dict[str, disk.Json]:
        base = zoo.base(setting)
        twin = zoo.fine_tuned(setting, Recipe(plan.task, plan.seed))
        clean = {task: zoo.fine_tuned(setting, Recipe(task, plan.seed)) for task in data.TASKS} | {plan.task: twin}
        attacked = clean | {plan.task: upload(setting, plan)}
        predict = judge.predictor(setting, {})
        tests = {t: data.test(t).take(slice(ROWS if t == plan.task else ROWS // 2)) for t in data.TASKS}
        row = partial(
            measure,
            predict,
            clean=judge.model(twin),
            base=judge.model(base),
            attacked=plan.task,
            target=plan.target,
            trigger=partial(stamp, patch=patch_of(setting, plan)),
            batch=judge.WHOLE,
        )
        merged, control = (judge.model(MERGES[how](setting, base, models)) for models in (attacked, clean))
        together = row(tests, model=merged, clean_merge=control)
        alone = row(
            {plan.task: tests[plan.task]}, model=judge.model(attacked[plan.task]), clean_merge=judge.model(twin)
        )
        return report.measurement_json(together) | {"alone": report.rate_json(alone.asr)}

    return disk.values("badmerging cell", key(setting, plan) | {"merge": how, "rows": ROWS}, make)


def table(cells: Mapping[tuple[str, str], Mapping[str, disk.Json]]) -> str:
    header = ["attack", "merge", "alone", "ASR", "all-clean", "gain", "clean twin", "base", "n", "BA", "CA"]
    body = []
    for (attack, how), row in cells.items():
        rates = [row["alone"]["value"], row["asr"]["value"], row["controls"]["clean merge"]["value"]]
        rest = [row["controls"]["clean model"]["value"], row["controls"]["base"]["value"]]
        shown = [*map(report.percent, rates), f"{100 * row['gain']:+.1f}", *map(report.percent, rest)]
        body.append([attack, how, *shown, row["asr"]["n"], report.percent(row["ba"]), report.percent(row["ca"])])
    return report.text_table("BadMerging, on-task: ASR and accuracy, %; one seed, one target", header, body)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one seed, one target, on-task: all there is so far")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--attack-task", choices=data.TASKS, default="mnist")
    parser.add_argument("--target", type=int, default=1, help="the target class")
    given = parser.parse_args()
    if not given.quick:
        parser.error("the full table is not written yet: give --quick")
    start = time.monotonic()
    torch.set_num_threads(1)
    setting = Setting()
    classes = len(data.CLASSES[given.attack_task])
    if not 0 <= given.target < classes:
        parser.error(f"--target is one of 0 to {classes - 1}")
    if not zoo.pretrained(setting):
        with progress("pre-training", zoo.architecture(setting).pretrain_steps) as step:
            zoo.base(setting, step)
    missing = zoo.missing(setting, [Recipe(task, given.seed) for task in data.TASKS])
    with progress("clean fine-tunes", max(1, len(missing))) as step:
        zoo.fine_tune_all(setting, missing, step)
    cells = {}
    with progress("cells", len(ATTACKS) * len(MERGES)) as step:
        for attack, how in ATTACKS.items():
            plan = Plan(given.attack_task, given.target, given.seed, **how)
            for name in MERGES:
                cells[attack, name] = cell(setting, plan, name)
                step()
    text = table(cells)
    print(text)
    print(f"{time.monotonic() - start:.0f} s")
    name = f"badmerging-{given.attack_task}-target{given.target}-seed{given.seed}-quick"
    about = {"settings": vars(given) | {"setting": setting._asdict()}, "versions": report.versions()}
    rows = [{"attack": attack, "merge": how} | row for (attack, how), row in cells.items()]
    report.save_json(RESULTS / f"{name}.json", about | {"cells": rows})
    disk.write(RESULTS / f"{name}.txt", f"{text.strip()}\n".encode())


if __name__ == "__main__":
    main()
