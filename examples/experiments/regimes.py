"""What has a merge to lose? Its gain of a task over the base, by encoder, by pre-training and by the number of tasks.

    python examples/experiments/regimes.py --quick      vits, one seed
    python examples/experiments/regimes.py              six settings, three seeds
    python examples/experiments/regimes.py --tables     what is there

A defense is only as interesting as what shipping the base would lose. Clean models, on validation images: this is what
a regime for a comparison is chosen by, so no test image may be read.
"""

import argparse
import os
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench import asking, cells, data, report, zoo
from bench.merges import RULES
from bench.zoo import Recipe, Setting, workforce
from taskvec import TaskVector
from taskvec.metrics import accuracy, estimate

ROWS = cells.FOLDER / "regimes.jsonl"
SETTINGS = (
    Setting("vits", pretrain_steps=300),
    Setting("vits"),
    Setting("vits", pretrain_steps=3000),
    Setting("vit7"),
    Setting("vit7", pretrain_steps=4500),
    Setting("cnn"),
)
ATTACKED, SEEDS = ("fashion", "animal"), (0, 1, 2)
COUNTS = (2, 3, 5)  # tasks in a merge: the attacked one and the first of the others
MERGES = ("task arithmetic", "TIES")


class Case(NamedTuple):
    """The fine-tunes of one seed."""

    setting: Setting
    seed: int


def members(task: str, count: int) -> list[str]:
    """The tasks of a merge."""
    return [task, *(other for other in data.TASKS if other != task)][:count]


def measured(case: Case) -> dict[str, dict[str, float]]:
    """For each task the accuracy of the base, of its fine-tune, and of merges by rule and number of tasks, per cent."""
    setting = case.setting
    base = zoo.base(setting)
    models = {task: zoo.fine_tuned(setting, Recipe(task, case.seed)) for task in data.TASKS}
    vectors = {task: TaskVector.between(base, model) for task, model in models.items()}

    def right(params: Mapping[str, Tensor], task: str) -> float:
        asked = partial(asking.remembering(setting), asking.model(params), task=task)
        return 100 * accuracy(asked, *data.validation(task), batch=asking.WHOLE).value

    found = {task: {"base": right(base, task), "alone": right(models[task], task)} for task in ATTACKED}
    for task in ATTACKED:
        for name in MERGES:
            for count in COUNTS:
                merged = RULES[name].merge([vectors[own] for own in members(task, count)])
                found[task][f"{name}, {count}"] = right(merged.apply(base, RULES[name].scale), task)
    return found


def key_of(case: Case) -> str:
    told = {
        "setting": zoo.settings(case.setting),
        "seed": case.seed,
        "members": [members(task, count) for task in ATTACKED for count in COUNTS],
        "merges": list(MERGES),
        "code": [cells.code_of(f) for f in (zoo.fine_tuned, measured)],
    }
    return cells.key(told)


def fill(case: Case) -> None:
    cells.append(ROWS, key_of(case), [label(case.setting), case.seed], measured(case))


def label(setting: Setting) -> str:
    return f"{setting.encoder}, {zoo.architecture(setting).pretrain_steps} steps"


def every_case(settings: Sequence[Setting] = SETTINGS, seeds: Sequence[int] = SEEDS) -> list[Case]:
    return [Case(setting, seed) for setting in settings for seed in seeds]


def kept_rows(wanted: Sequence[Case]) -> dict[Case, Any]:
    kept = cells.read(ROWS)
    return {case: kept[key] for case in wanted if (key := key_of(case)) in kept}


def table(rows: Mapping[Case, Any]) -> str:
    """One line for each setting and task: the base, and the gains over it."""
    if not rows:
        return "there are no rows yet"
    gains = ["alone", *(f"{name}, {count}" for name in MERGES for count in COUNTS)]
    body: list[list[object]] = []
    for setting in dict.fromkeys(case.setting for case in rows):
        for task in ATTACKED:
            own = [row[task] for case, row in rows.items() if case.setting == setting]
            gained = [estimate(row[name] - row["base"] for row in own) for name in gains]
            body.append([label(setting), task, f"{own[0]['base']:.1f}", *gained])
    title = (
        f"Accuracy of the base, and gains over it: of a fine-tune alone, and of merges of 2, 3 and 5 tasks; points,\n"
        f"{len(data.validation(ATTACKED[0]).labels)} validation images, 95 % t intervals over seeds of fine-tuning"
    )
    return report.text_table(title, ["encoder, pre-training", "task", "base", *gains], body)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="vits, one seed")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--tables", action="store_true", help="print what is there, measure nothing")
    given = parser.parse_args()
    start = time.monotonic()
    torch.set_num_threads(1)
    wanted = every_case(SETTINGS[1:2], SEEDS[:1]) if given.quick else every_case()
    kept = kept_rows(wanted)
    if not given.tables:
        todo = [case for case in wanted if case not in kept]
        for setting in dict.fromkeys(case.setting for case in todo):
            zoo.prepare(setting, zoo.clean(case.seed for case in todo if case.setting == setting))
        with workforce(given.workers) as pool:
            zoo.at_once(pool, "merges", fill, todo)
    print(table(kept_rows(wanted)))
    print(f"{time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
