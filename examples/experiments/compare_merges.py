"""Which merges are worth their cost? Every method on some tasks, at its paper's and at a validated coefficient.

    python examples/experiments/compare_merges.py [--encoder vits] [--seeds 0 1 2] [--methods TIES "Iso-C"]
    python examples/experiments/compare_merges.py --texts             # four domains of sentiment
    python examples/experiments/compare_merges.py --redraw

Clean fine-tunes of one pre-trained encoder, one for each task, are merged. A model's figure is its mean accuracy on the
tasks' test rows; "kept" is what is left of the gain of the fine-tunes over the base. The validated coefficient is the
one of the grid with the best mean accuracy on validation rows of each task; the test rows are read afterwards. Methods
that give one vector for each task are asked with that of the task. Rows are kept in results/merges.jsonl, with the
seconds that the merge took on the machine that ran it; what is missing is measured.
"""

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import product
from statistics import fmean
from typing import Any, NamedTuple

from torch import Tensor

from bench import asking, cells, data, texts, zoo
from bench.progress import progress
from bench.report import text_table
from bench.zoo import Setting
from taskvec import TaskVector, merge, merges, per_task, presets, schedules
from taskvec.merges import dare, ties, total, weighted
from taskvec.metrics import estimate
from taskvec.rules import fold
from taskvec.sparsify import drop

TABLE = "merges.jsonl"
GRID = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 4.0)

Params = Mapping[str, Tensor]
Vectors = Sequence[TaskVector]


class Method(NamedTuple):
    """A merge, and the scale that its paper or its authors' code applies the result with (second-hand, as in the docs).

    One that gives a vector for each task has no scale to choose.
    """

    merge: Callable[[Vectors], TaskVector | list[TaskVector]]
    scale: float = 1.0


def by(vectors: Vectors, *, rule: Callable[..., Tensor], **options: Any) -> TaskVector:
    """A merge by one rule."""
    return merge(vectors, rule, **options)


def dare_ties(vectors: Vectors) -> TaskVector:
    dropped = [v.map(drop, density=0.2, seed=fold(0, i)) for i, v in enumerate(vectors)]
    return merge(dropped, ties, density=0.2)


def metagpt(vectors: Vectors) -> TaskVector:
    return merge(vectors, weighted, weights=schedules.metagpt(vectors))


def lines(vectors: Vectors) -> TaskVector:
    """Task arithmetic with layers scaled from alpha to three times alpha."""
    merged = merge(vectors, total)
    alpha = schedules.lines_alpha(vectors, merged)
    scales = schedules.lines(merged, alpha, 2 * alpha)
    return TaskVector({name: x * scales[name] for name, x in merged.items()}, meta=merged.meta)


METHODS: dict[str, Method] = {
    "average": Method(partial(by, rule=merges.mean)),
    "task arithmetic": Method(partial(by, rule=total), 0.3),
    "MetaGPT": Method(metagpt),
    "LiNeS": Method(lines),
    "TIES": Method(partial(by, rule=ties, density=0.2)),
    "DARE": Method(partial(by, rule=dare, density=0.2, seed=0), 0.3),
    "DARE-TIES": Method(dare_ties),
    "Breadcrumbs": Method(partial(by, rule=merges.breadcrumbs, density=0.2, outliers=0.006), 0.3),
    "DELLA": Method(partial(by, rule=merges.della, density=0.7, epsilon=0.14, seed=0), 1.1),
    "MagMax": Method(partial(by, rule=merges.magmax), 0.5),
    "Consensus TA": Method(partial(by, rule=merges.consensus_ta), 0.3),
    "Consensus TIES": Method(partial(by, rule=merges.consensus_ties), 0.3),
    "Localize-and-Stitch": Method(partial(by, rule=merges.localize_and_stitch)),
    "PCB": Method(partial(by, rule=presets.pcb_vision), 1.2),
    "SCE": Method(partial(by, rule=merges.sce, density=0.1)),
    "Karcher": Method(partial(by, rule=merges.karcher)),
    "Model Stock": Method(partial(by, rule=merges.model_stock)),
    "TSV-M": Method(partial(by, rule=merges.tsv_m)),
    "Iso-C": Method(partial(by, rule=merges.iso_c), 1.5),
    "Iso-CTS": Method(partial(by, rule=merges.iso_cts), 1.5),
    "STAR": Method(partial(by, rule=merges.star)),
    "CART": Method(partial(by, rule=merges.cart)),
    "Subspace Boosting": Method(partial(by, rule=merges.subspace_boosting), 0.3),
    "KnOTS": Method(partial(by, rule=merges.knots), 0.6),
    "Core Space": Method(partial(by, rule=merges.core_space)),
    "DC-Merge": Method(partial(by, rule=merges.dc_merge)),
    "ACTMat": Method(partial(by, rule=merges.actmat)),
    "WUDI": Method(partial(by, rule=merges.wudi)),
    "EMR": Method(per_task.emr),
    "TALL masks": Method(per_task.tall_masks),
    "TSV-C": Method(per_task.tsv_c),
}


# --- what is merged --------------------------------------------------------------------------------------------------


class Suite(NamedTuple):
    """Some tasks, a base, its fine-tunes, and how models are asked.

    Attributes:
        title: of the table.
        tasks: their names.
        told: all that the fine-tunes and the answers depend on, for the keys of rows.
        code: what else a row depends on.
        base: what the fine-tunes begin with.
        tuned: `(seed, task)`.
        accuracy: `(models by task, "validation" or "test")`: the mean over tasks of each one's model.
        prepare: makes the fine-tunes of some seeds.
        left_out: names that no fine-tune changes.
        grid: of coefficients.
    """

    title: str
    tasks: Sequence[str]
    told: Mapping[str, Any]
    code: tuple[Callable[..., Any], ...]
    base: Callable[[], Params]
    tuned: Callable[[int, str], Params]
    accuracy: Callable[[Mapping[str, Params], str], float]
    prepare: Callable[[Sequence[int]], None]
    left_out: Sequence[str] | None = None
    grid: tuple[float, ...] = GRID


def images(setting: Setting) -> Suite:
    """The five image tasks."""

    def accuracy(models: Mapping[str, Params], part: str) -> float:
        ask, rows = asking.remembering(setting), getattr(data, part)
        asked = {id(params): asking.model(params) for params in models.values()}
        hits = [
            (ask(asked[id(params)], rows(task).images, task) == rows(task).labels).float().mean().item()
            for task, params in models.items()
        ]
        return fmean(hits)

    return Suite(
        f"{setting.encoder}, five tasks",
        data.TASKS,
        {"setting": zoo.settings(setting)},
        (zoo.fine_tuned, asking.remembering),
        partial(zoo.base, setting),
        lambda seed, task: zoo.fine_tuned(setting, zoo.Recipe(task, seed)),
        accuracy,
        lambda seeds: zoo.prepare(setting, zoo.clean(seeds)),
    )


RECIPE = texts.Recipe(bfloat16=False)
ROWS = {"train": 1800, "validation": 100, "test": 300}  # of each domain


def domains(recipe: texts.Recipe = RECIPE) -> Suite:
    """The four domains of sentiment: one label space, one head that all fine-tunes begin with."""

    def accuracy(models: Mapping[str, Params], part: str) -> float:
        shares: list[float] = []
        for domain, params in models.items():
            rows = getattr(texts.domains()[domain], part).part(slice(ROWS[part]))
            found = texts.answers(params, rows.texts, recipe.layers)
            shares.append(fmean(x == y for x, y in zip(found, rows.labels, strict=True)))
        return fmean(shares)

    def tuned(seed: int, domain: str) -> Params:
        rows = texts.domains()[domain].train.part(slice(ROWS["train"]))
        return texts.fine_tuned(rows, recipe, seed, {"model": f"{domain} clean {seed}"})

    def prepare(seeds: Sequence[int]) -> None:
        with progress("fine-tuning MiniLM", len(seeds) * len(texts.DOMAINS)) as step:
            for seed, domain in product(seeds, texts.DOMAINS):
                tuned(seed, domain)
                step()

    return Suite(
        f"MiniLM with {recipe.layers} layers, four domains",
        tuple(texts.DOMAINS),
        {"recipe": recipe._asdict(), "rows": ROWS},
        (texts.fine_tuned, texts.answers),
        partial(texts.base, recipe),
        tuned,
        accuracy,
        prepare,
        left_out=["*.embeddings.*"] if recipe.frozen_embeddings else None,
        grid=(0.1, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0),
    )


# --- measuring -------------------------------------------------------------------------------------------------------


def measured(suite: Suite, seed: int, name: str) -> dict[str, float]:
    """Accuracy at the paper's coefficient and at the validated one, which that was, and seconds."""
    base = suite.base()
    tuned = [suite.tuned(seed, task) for task in suite.tasks]
    if name in ("the base", "each fine-tune"):
        models = dict(zip(suite.tasks, tuned if name == "each fine-tune" else [base] * len(tuned), strict=True))
        found = suite.accuracy(models, "test")
        return {"paper": found, "validated": found, "scale": 1.0, "seconds": 0.0}
    method, vectors = METHODS[name], [TaskVector.between(base, params, exclude=suite.left_out) for params in tuned]
    start = time.perf_counter()
    merged = method.merge(vectors)
    seconds = time.perf_counter() - start

    def at(scale: float, part: str) -> float:
        each = merged if isinstance(merged, list) else [merged]
        models = [vector.apply(base, scale) for vector in each]
        return suite.accuracy(dict(zip(suite.tasks, models * (len(suite.tasks) // len(each)), strict=True)), part)

    scale = 1.0 if isinstance(merged, list) else max(suite.grid, key=lambda s: at(s, "validation"))
    return {
        "paper": at(method.scale, "test"),
        "validated": at(scale, "test"),
        "scale": scale,
        "seconds": seconds,
    }


def key_of(suite: Suite, seed: int, name: str) -> str:
    """The key of a row: the models, the method with its options and scale, the grid, and the code of the bench."""
    asked = {**suite.told, "seed": seed, "method": name, "grid": list(suite.grid)}
    method = METHODS.get(name)
    of_method = [] if method is None else [cells.code_of(method.merge), method.scale]
    code = [cells.code_of(f) for f in suite.code]
    return cells.key({**asked, "of": of_method, "code": code})


def table(suite: Suite, seeds: Sequence[int], names: Sequence[str], kept: Mapping[str, Any]) -> str:
    """Means over seeds with intervals."""
    found = {name: [kept.get(key_of(suite, seed, name)) for seed in seeds] for name in names}
    whole = {name: rows for name, rows in found.items() if None not in rows}
    low, high = (fmean(row["validated"] for row in whole[name]) for name in ("the base", "each fine-tune"))
    rows: list[list[object]] = []
    for name, of_seeds in whole.items():
        best = estimate(100 * row["validated"] for row in of_seeds)
        share = (fmean(row["validated"] for row in of_seeds) - low) / (high - low)
        scales = sorted({row["scale"] for row in of_seeds})
        single = METHODS[name].scale if name in METHODS else 1.0
        rows.append(
            [
                name,
                estimate(100 * row["paper"] for row in of_seeds),
                f"{single:g}",
                best,
                " ".join(f"{s:g}" for s in scales),
                f"{100 * share:.0f}",
                f"{fmean(row['seconds'] for row in of_seeds):.2f}",
            ]
        )
    rows.sort(key=lambda row: -float(row[5]))
    header = ["method", "at the paper's", "scale", "validated", "scales", "kept %", "seconds"]
    title = f"{suite.title}, {len(seeds)} seeds: mean test accuracy, per cent, 95 % t intervals over seeds"
    return text_table(title, header, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--encoder", default="vits")
    parser.add_argument("--texts", action="store_true", help="four domains of sentiment with MiniLM")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="NAME")
    parser.add_argument("--redraw", action="store_true", help="print the table of what is kept; nothing is run")
    given = parser.parse_args()
    suite = domains() if given.texts else images(Setting(given.encoder))
    names = ["the base", "each fine-tune", *given.methods]
    path = cells.FOLDER / TABLE
    kept = cells.read(path)
    todo = [(seed, name) for seed in given.seeds for name in names if key_of(suite, seed, name) not in kept]
    if todo and not given.redraw:
        suite.prepare(given.seeds)
        with progress("merges", len(todo)) as step:
            for seed, name in todo:
                cells.append(path, key_of(suite, seed, name), [name, seed, suite.title], measured(suite, seed, name))
                step()
    print(table(suite, given.seeds, names, cells.read(path)))


if __name__ == "__main__":
    main()
