"""Merge methods on four fine-tunes: with taskvec, as mergekit is told to do the same, and in float64.

    python examples/benchmarks/methods.py METHOD FOLDER OUTPUT [--workers 2]

merges a set made by `synthetic` with taskvec, from disk to disk: the process that `streaming` times.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from taskvec import TaskVector, load, merge, presets, save
from taskvec.merges import della, mean, model_stock, slerp, ties, weighted
from taskvec.rules import fold
from taskvec.sparsify import drop

SCALE = 0.3
EACH = [SCALE] * 4
SHARDS = 300_000_000  # bytes per shard of the output, for both programs

Params = Mapping[str, Tensor]


class Method(NamedTuple):
    """One way to merge.

    Args:
        label: its name in the tables.
        ours: `(base, fine-tunes) -> merged`, lazy.
        theirs: folders, base first -> what mergekit's file of settings holds; None where it has no such method.
        exact: `(base, fine-tunes) -> merged` of one tensor in float64, where that takes a line.
    """

    label: str
    ours: Callable[[Params, list[Params]], Params]
    theirs: Callable[[Sequence[Path]], dict[str, Any]] | None = None
    exact: Callable[[Tensor, list[Tensor]], Tensor] | None = None


# --- with taskvec ----------------------------------------------------------------------------------------------------


def vectors_of(base: Params, tuned: list[Params]) -> list[TaskVector]:
    return [TaskVector.between(base, t) for t in tuned]


def sum_of_vectors(base: Params, tuned: list[Params]) -> Params:
    return sum(vectors_of(base, tuned)).apply(base, scale=SCALE)


def weighted_vectors(base: Params, tuned: list[Params]) -> Params:
    return merge(vectors_of(base, tuned), weighted, weights=EACH).apply(base)


def mean_of_models(base: Params, tuned: list[Params]) -> Params:
    return merge([base, *tuned], mean)


def slerp_of_two(base: Params, tuned: list[Params]) -> Params:
    del base
    return merge(tuned[:2], slerp, t=0.5)


def model_stock_of(base: Params, tuned: list[Params]) -> Params:
    return merge(vectors_of(base, tuned), model_stock).apply(base)


def dare_ties(base: Params, tuned: list[Params]) -> Params:
    dropped = [v.map(drop, density=0.2, seed=fold(0, i), rescale="l1") for i, v in enumerate(vectors_of(base, tuned))]
    return merge(dropped, ties, weights=EACH, weighted_vote=True, zero="positive", reduce="sum").apply(base)


def dare_ties_of_the_paper(base: Params, tuned: list[Params]) -> Params:
    dropped = [v.map(drop, density=0.2, seed=fold(0, i)) for i, v in enumerate(vectors_of(base, tuned))]
    return merge(dropped, ties, weights=EACH, weighted_vote=True, zero="positive", reduce="sum").apply(base)


def ties_by_tensor(base: Params, tuned: list[Params]) -> Params:
    return merge(vectors_of(base, tuned), presets.ties_mergekit, density=0.2, weights=[1.0] * 4).apply(base)


def ties_global(base: Params, tuned: list[Params]) -> Params:
    return merge(vectors_of(base, tuned), ties, density=0.2).apply(base)


def breadcrumbs(base: Params, tuned: list[Params]) -> Params:
    rule = presets.breadcrumbs_mergekit
    return merge(vectors_of(base, tuned), rule, density=0.9, outliers=0.01, weights=EACH).apply(base)


def della_of(base: Params, tuned: list[Params]) -> Params:
    # mergekit's epsilon is half the width of the window
    return merge(vectors_of(base, tuned), della, density=0.4, epsilon=0.4, seed=0, rescale="l1").apply(base)


# --- with mergekit ---------------------------------------------------------------------------------------------------


def of_vectors(method: str, weight: float = 1.0, **options: float) -> Callable[[Sequence[Path]], dict[str, Any]]:
    """Settings of a method on task vectors; options that are not given are mergekit's defaults."""

    def settings(paths: Sequence[Path]) -> dict[str, Any]:
        base, *tuned = map(str, paths)
        models = [{"model": path, "parameters": {"weight": weight, **options}} for path in tuned]
        return {"merge_method": method, "base_model": base, "models": models}

    return settings


def linear(paths: Sequence[Path]) -> dict[str, Any]:
    models = [{"model": str(path), "parameters": {"weight": 1.0}} for path in paths]
    return {"merge_method": "linear", "models": models}


def slerp_settings(paths: Sequence[Path]) -> dict[str, Any]:
    first, second = map(str, paths[1:3])
    models = [{"model": first}, {"model": second}]
    return {"merge_method": "slerp", "base_model": first, "models": models, "parameters": {"t": 0.5}}


def model_stock_settings(paths: Sequence[Path]) -> dict[str, Any]:
    base, *tuned = map(str, paths)
    return {"merge_method": "model_stock", "base_model": base, "models": [{"model": path} for path in tuned]}


# --- in float64 ------------------------------------------------------------------------------------------------------


def exact_sum(base: Tensor, tuned: list[Tensor]) -> Tensor:
    return base + SCALE * sum(t - base for t in tuned)


def exact_mean(base: Tensor, tuned: list[Tensor]) -> Tensor:
    return sum(tuned, base) / (1 + len(tuned))


def exact_slerp(base: Tensor, tuned: list[Tensor]) -> Tensor:
    del base
    first, second = tuned[:2]
    angle = torch.acos((first * second).sum() / first.norm() / second.norm())
    return torch.sin(angle / 2) / torch.sin(angle) * (first + second)


METHODS = {
    "task_arithmetic": Method("task arithmetic", sum_of_vectors, of_vectors("task_arithmetic", SCALE), exact_sum),
    "task_arithmetic_rule": Method(
        "task arithmetic, by merge", weighted_vectors, of_vectors("task_arithmetic", SCALE), exact_sum
    ),
    "linear": Method("linear", mean_of_models, linear, exact_mean),
    "slerp": Method("slerp", slerp_of_two, slerp_settings, exact_slerp),
    "model_stock": Method("model stock", model_stock_of, model_stock_settings),
    "dare_ties": Method("DARE-TIES", dare_ties, of_vectors("dare_ties", SCALE, density=0.2)),
    "dare_ties_paper": Method("DARE-TIES, 1 / density", dare_ties_of_the_paper),
    "ties": Method("TIES", ties_by_tensor, of_vectors("ties", density=0.2)),
    "ties_global": Method("TIES, global scope", ties_global),
    "breadcrumbs": Method("breadcrumbs", breadcrumbs, of_vectors("breadcrumbs", SCALE, density=0.9, gamma=0.01)),
    "della": Method("DELLA", della_of, of_vectors("della", density=0.4, epsilon=0.2)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("method", choices=METHODS)
    parser.add_argument("folder", type=Path, help="of a base and its fine-tunes")
    parser.add_argument("output", type=Path)
    parser.add_argument("--workers", type=int, default=2)
    given = parser.parse_args()
    base, *tuned = map(load, [given.folder / "base", *sorted(given.folder.glob("tuned-*"))])
    merged = METHODS[given.method].ours(base, tuned)
    save(merged, given.output, max_shard_size=SHARDS, workers=given.workers)


if __name__ == "__main__":
    main()
