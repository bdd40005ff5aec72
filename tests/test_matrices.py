"""Rules on matrices: what the authors' and peers' code answers, their laws up to rounding, and where others break."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from test_contract import MATRICES, label
from torch import Tensor

from taskvec import TaskVector, merge, merges
from taskvec.errors import NonFiniteError
from taskvec.merges import (
    actmat,
    core_space,
    iso_c,
    iso_cts,
    knots,
    mean,
    star,
    subspace_boosting,
    ties,
    total,
    tsv_m,
    wudi,
)

GOLDEN = json.loads((Path(__file__).parent / "golden" / "matrices.json").read_text())
TRIMMED = partial(ties, density=0.3, scope="tensor", count="reference")
AS_THEY = {
    "tsv_m": (tsv_m, {}),
    "tsv_m authors": (tsv_m, {}),
    "iso_c": (iso_c, {}),
    "iso_c authors": (iso_c, {}),
    "iso_cts": (iso_cts, {"common": 0.4}),
    "cart": (merges.cart, {"share": 0.5, "scale": 0.5}),
    "wudi": (wudi, {}),
    "wudi adam": (wudi, {"solver": "adam"}),
    "actmat": (actmat, {}),
    "dc_merge": (merges.dc_merge, {}),
    "star": (star, {}),
    "knots": (knots, {"inner": TRIMMED}),
    "knots adapters": (knots, {"inner": TRIMMED}),
    "core tsv": (core_space, {"inner": tsv_m}),
    "core iso": (core_space, {"inner": iso_c}),
    "core cart": (core_space, {"inner": partial(merges.cart, share=0.34)}),
}


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def low_rank(n: int, rank: int, rows: int = 20, columns: int = 30) -> Tensor:
    """Updates of adapters."""
    return torch.stack([random(rows, rank, seed=i) @ random(rank, columns, seed=99 + i) for i in range(n)])


def far(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("name", AS_THEY)
def test_ours_agrees_with_the_authors_and_with_peers(name):
    rule, options = AS_THEY[name]
    case = GOLDEN["cases"][name]
    x = torch.tensor(GOLDEN[case.get("inputs", "inputs")], dtype=torch.float64)
    expected = torch.tensor(case["output"], dtype=torch.float64)
    assert far(rule(x, **options), expected) < 1e-6
    found = merge([{"w": one} for one in x.float()], rule, **options)["w"]
    assert far(found, expected) < 1e-4


def test_every_golden_case_is_compared():
    assert set(AS_THEY) == set(GOLDEN["cases"])


# by hand, in numpy


def test_star_keeps_the_nuclear_norm():
    x = random(3, 8, 6)
    kept = []
    for one in x.numpy():
        u, s, v = np.linalg.svd(one, full_matrices=False)
        rank = next(r for r in range(1, 7) if s[:r].sum() >= 0.4 * s.sum())
        kept.append((u[:, :rank] * s[:rank] * s.sum() / s[:rank].sum()) @ v[:rank])
    assert far(star(x), torch.tensor(np.mean(kept, 0))) < 1e-12


def test_subspace_boosting_raises_what_is_below_the_share():
    x = random(3, 8, 6)
    u, s, v = np.linalg.svd(x.numpy().sum(0), full_matrices=False)
    rank = next(r for r in range(1, 7) if s[:r].sum() >= 0.3 * s.sum())
    expected = (u * np.maximum(s, s[rank - 1])) @ v
    assert far(subspace_boosting(x, 0.3), torch.tensor(expected)) < 1e-12
    trimmed = partial(ties, density=0.5, scope="tensor")
    u, s, v = np.linalg.svd(trimmed(x).numpy(), full_matrices=False)
    rank = next(r for r in range(1, 7) if s[:r].sum() >= 0.3 * s.sum())
    found = subspace_boosting(x, 0.3, inner=trimmed)
    assert far(found, torch.tensor((u * np.maximum(s, s[rank - 1])) @ v)) < 1e-12


@pytest.mark.parametrize("rule", [knots, core_space])
def test_around_a_sum_a_shared_basis_changes_nothing(rule):
    x = low_rank(3, 2)
    assert far(rule(x, inner=total), total(x)) < 1e-12


def test_knots_merges_the_parts_of_the_shared_basis():
    x = random(3, 8, 6)
    u, s, v = np.linalg.svd(np.concatenate(list(x.numpy()), 1), full_matrices=False)
    parts = torch.tensor(np.stack(np.split(s[:, None] * v, 3, 1)))
    inner = partial(ties, density=0.3, scope="tensor")
    assert far(knots(x, inner=inner), torch.tensor(u) @ inner(parts)) < 1e-9


def test_core_space_merges_small_matrices_and_loses_nothing():
    seen: list[torch.Size] = []

    def watched(stack: Tensor) -> Tensor:
        seen.append(stack.shape)
        return ties(stack, density=0.5, scope="tensor")

    x = low_rank(3, 2)
    found = core_space(x, inner=watched)
    assert seen == [(3, 6, 6)]
    columns = torch.cat([*x], 1)
    assert torch.linalg.matrix_rank(torch.cat([columns, found], 1)) == torch.linalg.matrix_rank(columns)


def test_wudi_is_the_minimum_and_adam_is_on_its_way():
    x = random(3, 8, 6)

    def objective(d: Tensor) -> float:
        return sum(float(((d - one) @ one.T).square().sum() / one.square().sum()) for one in x)

    exact, adam = wudi(x), wudi(x, solver="adam")
    nearby = [objective(exact + 1e-3 * random(8, 6, seed=seed)) for seed in range(5)]
    assert objective(exact) < min(nearby)
    assert objective(exact) < objective(adam) < objective(total(x))


# laws, up to rounding


@pytest.mark.parametrize("row", MATRICES, ids=label)
def test_the_laws_hold_up_to_rounding(row):
    x = random(3, 8, 11)
    found = row.function(x, **row.options)
    adam = 2e-4 if row.options.get("solver") == "adam" else 1e-9  # its steps have a length of their own
    assert far(row.function(-x, **row.options), -found) < 1e-9
    assert far(row.function(x[[2, 0, 1]], **row.options), found) < 1e-9
    assert far(row.function(4 * x, **row.options), 4 * found) < adam


# what is no matrix, and where other libraries break


@pytest.mark.parametrize("row", MATRICES, ids=label)
def test_what_is_no_matrix_is_averaged_summed_or_left_out(row):
    wanted = {"mean": mean, "sum": total, "zero": lambda x: torch.zeros_like(x[0])}
    for shape in [(7,), (4, 3, 2, 2), (2, 9), ()]:  # a bias, a convolution, fewer rows than vectors, a scale
        x = random(3, *shape)
        for rest, expected in wanted.items():
            assert torch.equal(row.function(x, **(row.options | {"rest": rest})), expected(x))
    x = random(3, 5, 6)
    assert torch.equal(row.function(x, **row.options, matrix=False), wanted[row.options.get("rest", "mean")](x))
    with pytest.raises(ValueError, match="rest must be"):
        row.function(x, **(row.options | {"rest": "base"}))


def test_a_matrix_can_be_taken_for_none_by_its_name():
    vectors = [TaskVector({"embed": x, "layer": x}) for x in random(3, 5, 6)]
    found = merge(vectors, iso_c, matrix={"embed*": False, "*": True})
    assert torch.allclose(found["embed"], merge(vectors, mean)["embed"])
    assert torch.equal(found["layer"], merge(vectors, iso_c)["layer"])


@pytest.mark.parametrize("row", MATRICES, ids=label)
def test_stacked_experts_are_merged_one_by_one(row):
    x = random(3, 4, 5, 6)
    found = row.function(x, **row.options)
    for k in range(4):
        assert torch.equal(found[k], row.function(x[:, k].contiguous(), **row.options))


@pytest.mark.parametrize("row", [row for row in MATRICES if row.options.get("solver") != "adam"], ids=label)
def test_rounding_of_adapters_changes_nothing_much(row):
    """Directions that are rounding must not get weight: the authors' Iso-C and TSV-M change by more than half."""
    x = low_rank(3, 4).float()
    noise = 1e-7 * x.abs().max() * random(*x.shape, seed=5, dtype=torch.float32)
    assert far(row.function(x + noise, **row.options), row.function(x, **row.options)) < 0.02


@pytest.mark.parametrize("row", MATRICES, ids=label)
def test_zero_and_equal_vectors_have_a_finite_merge(row):
    x = random(3, 5, 6)
    for stack in (x * torch.tensor([1.0, 0, 1]).reshape(3, 1, 1), x[:1].expand(3, 5, 6), x * 0):
        assert row.function(stack, **row.options).isfinite().all()


@pytest.mark.parametrize("row", MATRICES, ids=label)
def test_nan_is_an_error_that_names_the_tensor(row):
    x = random(2, 5, 6)
    x[1, 2, 3] = float("nan")
    with pytest.raises(NonFiniteError, match="no matrix can be decomposed") as caught:
        merge([{"layer": one} for one in x], row.function, **row.options)
    assert "while merging 'layer'" in caught.value.__notes__[0]


@pytest.mark.parametrize(
    ("rule", "options"),
    [
        (iso_cts, {"common": 1.2}),
        (star, {"share": 0}),
        (merges.cart, {"share": 2}),
        (subspace_boosting, {"share": -1}),
        (actmat, {"weights": [1, -1]}),
        (wudi, {"solver": "sgd"}),
        (wudi, {"solver": "adam", "steps": 0}),
    ],
)
def test_an_option_outside_its_range_is_refused(rule, options):
    with pytest.raises(ValueError, match=next(iter(options)) if "steps" not in options else "steps"):
        rule(random(2, 5, 6), **options)


def test_actmat_has_weights():
    x = random(2, 5, 6)
    doubled = actmat(torch.stack([x[0], x[0], x[1]]))
    assert far(actmat(x, weights=[2, 1]), doubled) < 1e-9
