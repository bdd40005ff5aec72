"""Every rule and every leaf against a naive loop: at most eight lines of plain Python, in float64.

A loop is given what one scope holds, as a list of rows: a leaf one vector of them, a rule a list of vectors. Its
keyword `uniforms`, where it has one, is a function of a seed: the random numbers in [0, 1) of that scope.
"""

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import pytest
import torch
from test_contract import MATRICES, ROWS, Row, label, voted_mean
from torch import Tensor

from taskvec import TaskVector, merge, merges, signs, sparsify
from taskvec._engine.pieces import take_alone
from taskvec._engine.random import key_of
from taskvec.merges._ties import ties_majority
from taskvec.rules import HERE, Place, fold
from taskvec.sparsify import topk_cuts

Rows: TypeAlias = list[list[float]]
"""A vector over a scope: rows of numbers."""
Naive: TypeAlias = Callable[..., Rows]


def flat(rows: Rows) -> list[float]:
    return [x for row in rows for x in row]


def shaped(values: Sequence[float], like: Rows) -> Rows:
    source = iter(values)
    return [[next(source) for _ in row] for row in like]


def by_entry(f: Callable[[list[float]], float], stack: Sequence[Rows]) -> Rows:
    """A function of the n values of one entry, of every entry."""
    return shaped([f(list(values)) for values in zip(*map(flat, stack), strict=True)], stack[0])


def by_scope(f: Callable[[list[float]], list[float]], rows: Rows, scope: str) -> Rows:
    return [f(row) for row in rows] if scope == "row" else shaped(f(flat(rows)), rows)


def sign(x: float) -> int:
    return (x > 0) - (x < 0)


def number(density: float, n: int, count: str) -> int:
    floor = int(density * n)
    return {"round": round(density * n), "floor": floor, "at_least_one": max(floor, 1), "reference": floor + 1}[count]


# leaves


def topk(rows: Rows, density: float, scope: str = "global", count: str = "round") -> Rows:
    def keep(values: list[float]) -> list[float]:
        largest = sorted(values, key=abs)[len(values) - number(density, len(values), count) :]
        return [x if x in largest else 0 for x in values]

    return by_scope(keep, rows, scope)


def above(rows: Rows, threshold: float) -> Rows:
    return [[x if abs(x) >= threshold else 0 for x in row] for row in rows]


def band(
    rows: Rows, density: float, outliers: float, scope: str = "row", count: str = "round", first: str = "outliers"
) -> Rows:
    def keep(values: list[float]) -> list[float]:
        n, top = len(values), number(outliers, len(values), count)
        if first == "density":
            top = min(top, n - number(density, n, count))
        next_ones = sorted(values, key=abs, reverse=True)[top : top + number(density, n, count)]
        return [x if x in next_ones else 0 for x in values]

    return by_scope(keep, rows, scope)


def rescaled(kept: Rows, rows: Rows, chances: Rows, rescale: str | None) -> Rows:
    whole = sum(map(abs, flat(rows))) / (sum(map(abs, flat(kept))) or 1)
    factors = [whole if rescale == "l1" else 1 / p if rescale == "density" else 1 for p in flat(chances)]
    return shaped([x * factor for x, factor in zip(flat(kept), factors, strict=True)], rows)


def survivors(rows: Rows, chances: Rows, random: Rows) -> Rows:
    triples = zip(flat(rows), flat(chances), flat(random), strict=True)
    return shaped([x if u < p else 0 for x, p, u in triples], rows)


def drop(rows: Rows, density: float, seed: int, uniforms: Any, rescale: str | None = "density") -> Rows:
    chances = [[density for _ in row] for row in rows]
    return rescaled(survivors(rows, chances, uniforms(seed)), rows, chances, rescale)


def rank_drop(
    rows: Rows, density: float, epsilon: float, seed: int, uniforms: Any, rescale: str | None = "density"
) -> Rows:
    def chance(x: float, row: list[float]) -> float:
        smaller = sum(abs(other) < abs(x) for other in row)
        return density - epsilon / 2 + epsilon * smaller / (len(row) - 1)

    chances = [[chance(x, row) for x in row] for row in rows]
    return rescaled(survivors(rows, chances, uniforms(seed)), rows, chances, rescale)


# rules


def vote(values: list[float], by: str) -> int:
    return sign(sum(values) if by == "sum" else sum(map(sign, values)))


def elect(stack: list[Rows], by: str = "sum", zero: str = "none") -> Rows:
    votes = by_entry(lambda values: vote(values, by), stack)
    instead = {"none": 0, "positive": 1, "majority": sign(sum(flat(votes)))}[zero]
    return [[x or instead for x in row] for row in votes]


def agreeing(values: list[float]) -> int:
    return sum(sign(x) == vote(values, "sum") != 0 for x in values)


def agreement(stack: list[Rows]) -> Rows:
    return by_entry(lambda values: agreeing(values) / len(values), stack)


def consistent(stack: list[Rows], agree: float = 1.0) -> Rows:
    return by_entry(lambda values: float(agreeing(values) >= agree * len(values)), stack)


def weighted(stack: list[Rows], weights: Sequence[float] | None = None) -> Rows:
    weights = weights or [1] * len(stack)
    return by_entry(lambda values: sum(w * x for w, x in zip(weights, values, strict=True)), stack)


def mean(stack: list[Rows], weights: Sequence[float] | None = None) -> Rows:
    return [[x / sum(weights or [1] * len(stack)) for x in row] for row in weighted(stack, weights)]


def disjoint_mean(
    stack: list[Rows], winners: Rows, reduce: str = "mean", weights: Sequence[float] | None = None
) -> Rows:
    def combine(values: list[float]) -> float:
        winner, *values = values
        agree = [(w, x) for w, x in zip(weights or [1] * len(stack), values, strict=True) if x * winner > 0]
        by = {"mean": len(agree), "weighted_mean": sum(w for w, _ in agree), "sum": 1}[reduce]
        return sum(w * x for w, x in agree) / (by or 1)

    return by_entry(combine, [winners, *stack])


def ties(
    stack: list[Rows],
    density: float,
    weights: Sequence[float] | None = None,
    weighted_vote: bool = False,
    reduce: str = "mean",
    by: str = "sum",
    zero: str = "none",
    **trim: str,
) -> Rows:
    trimmed = [topk(rows, density, **trim) for rows in stack]
    factors = weights if weights and weighted_vote else [1] * len(stack)
    voting = [[[w * x for x in row] for row in rows] for w, rows in zip(factors, trimmed, strict=True)]
    winners = elect(voting, by, zero)
    if not weighted_vote:
        return disjoint_mean(trimmed, winners, reduce, weights)

    def combine(values: list[float]) -> float:  # a negative weight turns whom it agrees with, too
        winner, *values = values
        agree = [(w, x) for w, x in zip(factors, values, strict=True) if x * winner > 0]
        shares = sum(w for w, _ in agree)
        if reduce == "weighted_mean" and shares == 0:
            return 0.0
        by = {"mean": len(agree), "weighted_mean": shares, "weighted_mean_or_sum": shares or 1, "sum": 1}[reduce]
        return sum(x for _, x in agree) / (by or 1)

    return by_entry(combine, [winners, *voting])


def dare(stack: list[Rows], seed: int, uniforms: Any, weights: Any = None, **options: Any) -> Rows:
    dropped = [drop(rows, seed=fold(seed, i), uniforms=uniforms, **options) for i, rows in enumerate(stack)]
    return weighted(dropped, weights)


def breadcrumbs(stack: list[Rows], weights: Any = None, **options: Any) -> Rows:
    return weighted([band(rows, **options) for rows in stack], weights)


def della(
    stack: list[Rows], seed: int, uniforms: Any, weights: Any = None, zero: str = "none", weighted_vote: bool = False,
    reduce: str = "mean", **options: Any,
) -> Rows:  # fmt: skip
    dropped = [rank_drop(rows, seed=fold(seed, i), uniforms=uniforms, **options) for i, rows in enumerate(stack)]
    return ties(dropped, 1.0, weights, weighted_vote, reduce, zero=zero)


def magmax(stack: list[Rows]) -> Rows:
    return by_entry(lambda values: max(reversed(values), key=abs), stack)


def consensus(stack: list[Rows], agree: float = 1.0, reduce: str = "mean") -> Rows:
    combined = {"mean": mean, "sum": weighted, "largest": magmax}[reduce](stack)
    pairs = zip(flat(consistent(stack, agree)), flat(combined), strict=True)
    return shaped([enough * x for enough, x in pairs], combined)


def dot(left: Rows, right: Rows) -> float:
    return sum(x * y for x, y in zip(flat(left), flat(right), strict=True))


def slerp(stack: list[Rows], t: float) -> Rows:
    a, b = stack
    angle = math.acos(dot(a, b) / math.sqrt(dot(a, a) * dot(b, b)))
    return weighted(stack, [math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)])


def model_stock(stack: list[Rows], extrapolate: bool = False) -> Rows:
    n = len(stack)
    pairs = [(a, b) for i, a in enumerate(stack) for b in stack[:i]]
    cosine = sum(dot(a, b) / math.sqrt(dot(a, a) * dot(b, b)) for a, b in pairs) / len(pairs)
    cosine = cosine if extrapolate else max(cosine, 0)
    t = n * cosine / (1 + (n - 1) * cosine)
    return [[t * x for x in row] for row in mean(stack)]


def consensus_ta(stack: list[Rows], threshold: Any = 0.4, tasks: int = 2, merged: Rows | None = None) -> Rows:
    limits = threshold if isinstance(threshold, list) else [threshold] * len(stack)

    def needed(values: list[float]) -> float:
        m, *xs = values
        return m if sum(abs(x) > by * abs(m - x) for x, by in zip(xs, limits, strict=True)) >= tasks else 0

    return by_entry(needed, [merged or weighted(stack), *stack])


def consensus_ties(
    stack: list[Rows], density: float, tasks: int = 2, zero: str = "majority", count: str = "reference", **trim: str
) -> Rows:
    return consensus_ta(stack, 0.4, tasks, ties(stack, density, reduce="sum", zero=zero, count=count, **trim))


def localize_and_stitch(stack: list[Rows], density: float, **trim: str) -> Rows:
    kept = [topk(rows, density, **trim) for rows in stack]
    return by_entry(lambda values: sum(values) / max(1, sum(x != 0 for x in values)), kept)


def between(x: float, low: float, high: float) -> float:
    return (min(max(x, low), high) - low) / (high - low) if high > low else 0


def pcb(stack: list[Rows], density: float, clamp: float = 1e-4) -> Rows:
    summed, shares, clamped = flat(weighted(stack)), [], []
    for values in map(flat, stack):
        m, n = sorted(map(abs, values)), len(values)
        low, high = m[int(n * clamp)], m[int(n * (1 - clamp) - 1)]
        own = [between(abs(x), low, high) for x in values]
        scores = [math.exp(len(stack) * s * s) * math.tanh(x * y) for s, x, y in zip(own, values, summed, strict=True)]
        shares.append([between(s, max(0.0, sorted(scores)[int(n * (1 - density))]), max(scores)) for s in scores])
        clamped.append([sign(x) * (low + s * (high - low)) for x, s in zip(values, own, strict=True)])
    places = zip(zip(*shares, strict=True), zip(*clamped, strict=True), strict=True)
    merged = [sum(b * x for b, x in zip(bs, xs, strict=True)) / max(sum(bs), 1e-12) for bs, xs in places]
    return shaped(merged, stack[0])


def variance(values: list[float]) -> float:
    middle = sum(values) / len(values)
    return sum((x - middle) ** 2 for x in values) / len(values)


def sce(stack: list[Rows], density: float = 1.0) -> Rows:
    spread = by_entry(variance, stack)
    varying = sum(x > 0 for x in flat(spread))
    kept = topk(spread, (int(density * varying) + 0.5) / len(flat(spread)), count="floor")
    chosen = [by_entry(lambda pair: pair[0] if pair[1] or density == 1 else 0, [rows, kept]) for rows in stack]
    energies = [dot(rows, rows) for rows in chosen]
    return disjoint_mean(chosen, elect(chosen, zero="positive"), "weighted_mean", energies)


def nuslerp(stack: list[Rows], weights: Sequence[float]) -> Rows:
    return slerp(stack, weights[1] / sum(weights))


def karcher(stack: list[Rows], weights: Sequence[float] | None = None) -> Rows:
    """Steps along the mean of the arcs, as vectors."""
    shares = [w / sum(weights or [1] * len(stack)) for w in weights or [1] * len(stack)]
    units = [weighted([rows], [1 / math.sqrt(dot(rows, rows))]) for rows in stack]
    u = weighted(units, shares)
    for _ in range(200):
        u = weighted([u], [1 / math.sqrt(dot(u, u))])
        angles = [math.acos(max(-1.0, min(1.0, dot(u, unit)))) for unit in units]
        pulls = [w * (a / math.sin(a) if a > 1e-9 else 1) for w, a in zip(shares, angles, strict=True)]
        arcs = weighted([*units, u], [*pulls, -sum(p * math.cos(a) for p, a in zip(pulls, angles, strict=True))])
        u = weighted([u, arcs], [1, 1])
    return weighted([u], [sum(w * math.sqrt(dot(rows, rows)) for w, rows in zip(shares, stack, strict=True))])


def row_by_row(naive: Naive) -> Naive:
    """The same of each row by itself."""
    return lambda stack, **options: [naive([[row] for row in rows], **options)[0] for rows in zip(*stack, strict=True)]


LOOPS: dict[str, Naive] = {
    f.__name__: f
    for f in [
        *(topk, above, band, drop, rank_drop, elect, agreement, consistent, mean, weighted, disjoint_mean),
        *(ties, dare, breadcrumbs, della, magmax, consensus, slerp, model_stock),
        *(consensus_ta, consensus_ties, localize_and_stitch, pcb, sce, nuslerp, karcher),
    ]
} | {
    "total": weighted,
    "regmean": mean,  # without Gram matrices; with them, below
    "disjoint_mean": lambda stack, **options: disjoint_mean(stack, elect(stack), **options),
}


# what they are given


def vectors(n: int, seed: int = 0) -> list[dict[str, Tensor]]:
    """Multiples of 1/32, so that sums are exact: no two of a vector are equal, and some of two vectors cancel.

    More positive than negative, so that a majority exists. The names differ in size: a scope is seen in the result.
    """
    random = torch.Generator().manual_seed(seed)
    size = torch.tensor([0.0] * 12 + [100.0] * 5 + [40.0] * 12, dtype=torch.float64)
    found = []
    for i in range(n):
        x = (torch.randperm(29, generator=random) + 1 + {1: 0.5, 3: 0.25}.get(i, 0) + size) / 8
        x *= torch.where(torch.rand(29, generator=random) < 0.3, -1, 1)
        if i in (1, 3):  # where all four cancel, no sign is elected
            x[::4] = -found[i - 1][::4]
        found.append(x)
    return [{"a": x[:12].reshape(3, 4), "b": x[12:17], "c": x[17:].reshape(2, 3, 2)} for x in found]


def rows_of(x: Tensor) -> Rows:
    return (x.reshape(len(x), -1) if x.ndim > 1 else x[None]).tolist()


def loop(row: Row, stack: list[dict[str, Tensor]], names: Sequence[str], places: Any = None) -> dict[str, Rows]:
    """The naive loop over the given names as one scope."""
    places = places or [Place(key_of(name)) for name in names]

    def uniforms(seed: int) -> Rows:
        drawn = [at.bits(seed, stack[0][name]).double() for at, name in zip(places, names, strict=True)]
        return [line for bits in drawn for line in rows_of((bits + 2**31) / 2**32)]

    naive = LOOPS[row.name]
    if row.name in ("slerp", "nuslerp", "karcher", "model_stock") and row.options.get("scope") == "row":
        naive = row_by_row(naive)
    options = dict(row.options) | ({"uniforms": uniforms} if "seed" in row.options else {})
    if not {"count", "reduce"} & set(inspect.signature(row.function).parameters) or row.name in ("elect", "consensus"):
        options.pop("scope", None)
    together = [[line for name in names for line in rows_of(x[name])] for x in stack]
    found = iter(naive(together[0] if row.kind == "leaf" else together, **options))
    return {name: [next(found) for _ in rows_of(stack[0][name])] for name in names}


def scopes(row: Row, names: Sequence[str]) -> list[list[str]]:
    """The names that are one scope: all of them, or each by itself."""
    default = inspect.signature(row.function).parameters.get("scope")
    scope = row.options.get("scope", default.default if default else "tensor")
    return [list(names)] if scope == "global" else [[name] for name in names]


@pytest.mark.parametrize("row", ROWS, ids=label)
@pytest.mark.parametrize("seed", range(3))
def test_a_rule_is_its_naive_loop(row, seed):
    stack = vectors(1 if row.kind == "leaf" else row.n or 4, seed)
    given = [TaskVector(tensors) for tensors in stack]
    run = given[0].map if row.kind == "leaf" else lambda rule, **options: merge(given, rule, **options)
    found = run(row.function, **row.options)
    for names in scopes(row, list(stack[0])):
        for name, expected in loop(row, stack, names).items():
            assert flat(rows_of(found[name])) == pytest.approx(flat(expected), rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("row", ROWS, ids=label)
def test_of_a_plain_tensor_too_a_rule_is_its_naive_loop(row):
    """It is its own scope."""
    stack = [{"": tensors["a"]} for tensors in vectors(1 if row.kind == "leaf" else row.n or 4)]
    plain = torch.stack([tensors[""] for tensors in stack])
    found = row.function(plain[0] if row.kind == "leaf" else plain, **row.options)
    expected = loop(row, stack, [""], [HERE])[""]
    assert flat(rows_of(found)) == pytest.approx(flat(expected), rel=1e-12, abs=1e-12)


def test_every_rule_has_a_loop_and_every_loop_a_rule():
    public = {name for module in (sparsify, signs, merges) for name in module.__all__}
    assert set(LOOPS) == public - {row.name for row in MATRICES}  # those are in test_matrices


def test_a_rule_that_is_not_the_loop_is_noticed():
    def lowest(x: Tensor, density: float) -> Tensor:
        return x - sparsify.topk(x, 1 - density)

    stack = vectors(1)
    found = TaskVector(stack[0]).map(lowest, density=0.4)
    expected = loop(Row(sparsify.topk, {"density": 0.4}, set()), stack, ["a"])
    assert flat(rows_of(found["a"])) != pytest.approx(flat(expected["a"]))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("off_diagonal", [0.9, 0.0])
def test_regmean_is_its_naive_loop(transposed, off_diagonal):
    """It solves sum_i W_i (G_i + r) = W sum_i (G_i + r), with r the ridge times the mean diagonal."""
    random = torch.Generator().manual_seed(3)
    stack = torch.randn(3, 5, 4, generator=random, dtype=torch.float64)
    inputs = torch.randn(3, 20, 4, generator=random, dtype=torch.float64)
    grams = [x.T @ x for x in inputs]
    ridge = 0.25 * sum(float(g[j, j]) for g in grams for j in range(4)) / 12
    seen = [[[float(g[i, j]) * (off_diagonal if i != j else 1) for j in range(4)] for i in range(4)] for g in grams]
    for g in seen:
        for j in range(4):
            g[j][j] += ridge
    given = stack.transpose(1, 2) if transposed else stack
    found = merges.regmean(given, grams, off_diagonal=off_diagonal, ridge=0.25, transposed=transposed)
    found = (found.T if transposed else found).tolist()
    for row in range(5):
        for j in range(4):
            left = sum(found[row][i] * g[i][j] for g in seen for i in range(4))
            right = sum(float(stack[k, row, i]) * g[i][j] for k, g in enumerate(seen) for i in range(4))
            assert left == pytest.approx(right, rel=1e-9)


def test_the_majority_of_weighted_votes_is_that_of_the_weighted_vectors():
    """Two vectors for plus, one of ten times their weight for minus: the weights turn the majority."""
    stack = torch.tensor([[1.0, 1.0, 1.0, 0.0], [1.0, 1.0, 1.0, 0.0], [-1.0, -1.0, -1.0, 0.0]])
    how = {"zero": "majority", "reduce": "sum"}
    given = [TaskVector({"a": x, "b": torch.zeros(2)}) for x in stack]
    for weights, winner in (([1, 1, 1], 1), ([1, 1, 10], -1)):
        cuts = (1.0, weights, "sum", "majority", True)
        found = take_alone(ties_majority, stack, HERE, (take_alone(topk_cuts, stack, HERE, cuts[:1]), *cuts[1:]))
        assert found == winner
    assert merge(given, merges.ties, weights=[1, 1, 10], weighted_vote=True, **how)["a"][0] == -10


def test_the_stack_of_the_loops_has_what_they_must_tell_apart():
    stack = vectors(4)
    sums = torch.stack([x["a"] for x in stack[:2]]).sum(0)
    assert (sums == 0).any()
    assert (sums != 0).any()
    assert flat(elect([rows_of(x["c"]) for x in stack[:2]], zero="majority")) != flat(
        elect([rows_of(x["c"]) for x in stack[:2]])
    )
    assert voted_mean(torch.stack([x["c"] for x in stack])).any()
