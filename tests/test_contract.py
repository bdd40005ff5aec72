"""Every public rule: the contract, the laws it holds, and for each law it does not hold a case that shows it fail."""

import inspect
import pickle
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from small import lazy
from torch import Tensor

from taskvec import TaskVector, merge, merges, presets, signs, sparsify, testing
from taskvec._engine.totals import pair_dots
from taskvec.merges import disjoint_mean
from taskvec.rules import HERE, fold, runs
from taskvec.signs import elect

ODD, PERMUTATION, SCALE = testing.odd, testing.permutation, testing.scale
LAWS = {"leaf": {ODD, SCALE}, "rule": {ODD, PERMUTATION, SCALE}}


@runs("element")
def voted_mean(stack: Tensor, *, reduce: str = "mean") -> Tensor:
    """`disjoint_mean` takes signs of the tensor's shape; these are the stack's own."""
    return disjoint_mean(stack, elect(stack), reduce=reduce)


class Row(NamedTuple):
    """A function with options, and the laws it holds; of n vectors only, where it takes no other number."""

    function: Callable[..., Tensor]
    options: Mapping[str, Any]
    laws: set[Callable[..., None]]
    n: int | None = None
    covers: str | None = None

    @property
    def name(self) -> str:
        return self.covers or self.function.__name__

    @property
    def kind(self) -> str:
        return "leaf" if self.function.__module__ == sparsify.__name__ else "rule"


# fmt: off
LEAVES = [
    Row(sparsify.topk, {"density": 0.4}, {ODD, SCALE}),
    Row(sparsify.topk, {"density": 0.4, "scope": "tensor", "count": "floor"}, {ODD, SCALE}),
    Row(sparsify.topk, {"density": 0.4, "scope": "row"}, {ODD, SCALE}),
    Row(sparsify.topk, {"density": 0.4, "count": "reference"}, {ODD, SCALE}),
    Row(sparsify.above, {"threshold": 0.5}, {ODD}),
    Row(sparsify.band, {"density": 0.5, "outliers": 0.25}, {ODD, SCALE}),
    Row(sparsify.band, {"density": 0.5, "outliers": 0.25, "scope": "tensor"}, {ODD, SCALE}),
    Row(sparsify.band, {"density": 0.5, "outliers": 0.25, "scope": "global", "count": "floor"}, {ODD, SCALE}),
    Row(sparsify.drop, {"density": 0.4, "seed": 3}, {ODD, SCALE}),
    Row(sparsify.drop, {"density": 0.4, "seed": 3, "rescale": "l1"}, {ODD, SCALE}),
    Row(sparsify.drop, {"density": 0.4, "seed": 3, "rescale": None}, {ODD, SCALE}),
    Row(sparsify.rank_drop, {"density": 0.4, "epsilon": 0.3, "seed": 3}, {ODD, SCALE}),
    Row(sparsify.rank_drop, {"density": 0.4, "epsilon": 0.3, "seed": 3, "rescale": "l1"}, {ODD, SCALE}),
    Row(sparsify.rank_drop, {"density": 0.4, "epsilon": 0.8, "seed": 3, "rescale": None}, {ODD, SCALE}),
]
RULES = [
    Row(signs.elect, {}, {ODD, PERMUTATION}),
    Row(signs.elect, {"by": "count"}, {ODD, PERMUTATION}),
    Row(signs.elect, {"zero": "majority"}, {ODD, PERMUTATION}),
    Row(signs.agreement, {}, {PERMUTATION}),
    Row(signs.consistent, {"agree": 0.6}, {PERMUTATION}),
    Row(merges.mean, {}, {ODD, PERMUTATION, SCALE}),
    Row(merges.mean, {"weights": [2, -0.5, 1]}, {ODD, SCALE}, n=3),
    Row(merges.total, {}, {ODD, PERMUTATION, SCALE}),
    Row(merges.weighted, {"weights": [2, -0.5, 1]}, {ODD, SCALE}, n=3),
    Row(voted_mean, {}, {ODD, PERMUTATION, SCALE}, covers="disjoint_mean"),
    Row(voted_mean, {"reduce": "sum"}, {ODD, PERMUTATION, SCALE}, covers="disjoint_mean"),
    Row(merges.ties, {"density": 0.4}, {ODD, PERMUTATION, SCALE}),
    Row(merges.ties, {"density": 0.4, "scope": "row", "by": "count"}, {ODD, PERMUTATION, SCALE}),
    Row(merges.ties, {"density": 0.4, "scope": "tensor", "zero": "majority", "reduce": "sum"},
        {ODD, PERMUTATION, SCALE}),
    Row(merges.ties, {"density": 0.4, "weights": [2, 0.5, 1], "weighted_vote": True, "reduce": "weighted_mean"},
        {ODD, SCALE}, n=3),
    Row(merges.ties, {"density": 0.4, "weights": [2, 0.5, 1], "weighted_vote": True, "zero": "majority"},
        {ODD, SCALE}, n=3),
    Row(merges.ties, {"density": 0.4, "scope": "row", "count": "floor"}, {ODD, PERMUTATION, SCALE}),
    Row(merges.ties, {"density": 0.8, "weights": [2, -2, 1], "weighted_vote": True, "reduce": "weighted_mean"},
        {ODD, SCALE}, n=3),
    Row(merges.ties, {"density": 0.8, "weights": [2, -2, 1], "weighted_vote": True, "reduce": "weighted_mean_or_sum"},
        {ODD, SCALE}, n=3),
    Row(merges.dare, {"density": 0.4, "seed": 3}, {ODD, SCALE}),
    Row(merges.dare, {"density": 0.4, "seed": 3, "rescale": "l1"}, {ODD, SCALE}),
    Row(merges.breadcrumbs, {"density": 0.5, "outliers": 0.25}, {ODD, PERMUTATION, SCALE}),
    Row(merges.breadcrumbs, {"density": 0.5, "outliers": 0.25, "scope": "global"}, {ODD, PERMUTATION, SCALE}),
    Row(merges.breadcrumbs, {"density": 0.8, "outliers": 0.4, "first": "density"}, {ODD, PERMUTATION, SCALE}),
    Row(merges.breadcrumbs, {"density": 0.8, "outliers": 0.4, "scope": "tensor"}, {ODD, PERMUTATION, SCALE}),
    Row(merges.della, {"density": 0.4, "epsilon": 0.3, "seed": 3}, {ODD, SCALE}),
    Row(merges.della, {"density": 0.4, "epsilon": 0.3, "seed": 3, "rescale": "l1"}, {ODD, SCALE}),
    Row(merges.della, {"density": 0.4, "epsilon": 0.3, "seed": 3, "weights": [2, -0.5, 1]}, {ODD, SCALE}, n=3),
    Row(merges.della, {"density": 0.4, "epsilon": 0.3, "seed": 3, "weights": [2, 0.5, 1], "weighted_vote": True,
                       "zero": "positive", "reduce": "weighted_mean"}, {SCALE}, n=3),
    Row(merges.magmax, {}, {ODD, SCALE}),
    Row(merges.consensus, {}, {ODD, PERMUTATION, SCALE}),
    Row(merges.consensus, {"agree": 0.6, "reduce": "sum"}, {ODD, PERMUTATION, SCALE}),
    Row(merges.consensus, {"agree": 0.6, "reduce": "largest"}, {ODD, SCALE}),
    Row(merges.regmean, {}, {ODD, PERMUTATION, SCALE}),
    Row(merges.slerp, {"t": 0.5}, {ODD, PERMUTATION, SCALE}, n=2),
    Row(merges.slerp, {"t": 0.3}, {ODD, SCALE}, n=2),
    Row(merges.model_stock, {}, {ODD, PERMUTATION, SCALE}, n=2),
    Row(merges.model_stock, {"scope": "global"}, {ODD, PERMUTATION, SCALE}, n=4),
    Row(merges.model_stock, {"scope": "row"}, {ODD, PERMUTATION, SCALE}, n=2),
    Row(merges.model_stock, {"extrapolate": True}, {ODD, PERMUTATION, SCALE}, n=2),
    Row(merges.slerp, {"t": 0.3, "scope": "row"}, {ODD, SCALE}, n=2),
    Row(merges.nuslerp, {"weights": [1, 3]}, {ODD, SCALE}, n=2),
    Row(merges.karcher, {}, {ODD, PERMUTATION, SCALE}, n=2),
    Row(merges.karcher, {"weights": [2, 0.5, 1]}, {ODD, SCALE}, n=3),
    Row(merges.karcher, {"weights": [2, 1], "scope": "row"}, {ODD, SCALE}, n=2),
    Row(merges.consensus_ta, {}, {ODD, PERMUTATION, SCALE}),
    Row(merges.consensus_ta, {"threshold": [0.2, 0.5, 0.9], "tasks": 1}, {ODD, SCALE}, n=3),
    Row(merges.consensus_ties, {"density": 0.4}, {ODD, PERMUTATION, SCALE}),
    Row(merges.consensus_ties, {"density": 0.4, "scope": "tensor", "count": "round", "zero": "none", "tasks": 3},
        {ODD, PERMUTATION, SCALE}, n=4),
    Row(merges.localize_and_stitch, {"density": 0.4}, {ODD, PERMUTATION, SCALE}),
    Row(merges.localize_and_stitch, {"density": 0.4, "scope": "tensor"}, {ODD, PERMUTATION, SCALE}),
    Row(merges.pcb, {"density": 0.4}, {ODD, PERMUTATION}),
    Row(merges.pcb, {"density": 0.3, "clamp": 0.1, "scope": "tensor"}, {ODD, PERMUTATION}),
    Row(merges.sce, {}, {PERMUTATION, SCALE}),
    Row(merges.sce, {"density": 0.4, "scope": "global"}, {PERMUTATION, SCALE}),
]
# Rules that decompose matrices: their laws hold up to rounding, and are in test_matrices.
MATRICES = [
    Row(merges.tsv_m, {}, set(), n=3),
    Row(merges.tsv_m, {"rest": "sum"}, set(), n=3),
    Row(merges.iso_c, {}, set(), n=3),
    Row(merges.iso_cts, {}, set(), n=3),
    Row(merges.iso_cts, {"common": 0.5, "rest": "zero"}, set(), n=3),
    Row(merges.star, {}, set(), n=3),
    Row(merges.cart, {"share": 0.5}, set(), n=3),
    Row(merges.subspace_boosting, {"share": 0.4}, set(), n=3),
    Row(merges.knots, {"inner": merges.total}, set(), n=3),
    Row(merges.core_space, {"inner": merges.total}, set(), n=3),
    Row(merges.dc_merge, {}, set(), n=3),
    Row(merges.actmat, {}, set(), n=3),
    Row(merges.wudi, {}, set(), n=3),
    Row(merges.wudi, {"solver": "adam", "steps": 3}, set(), n=3),
]
PRESETS = {
    "ties_reference": {"density": 0.4},
    "ties_badmerging": {"density": 0.4},
    "ties_peft": {"density": 0.4},
    "ties_mergekit": {"density": 0.4},
    "breadcrumbs_reference": {"density": 0.5, "outliers": 0.25},
    "breadcrumbs_mergekit": {"density": 0.5, "outliers": 0.25},
    "dare_mergekit": {"density": 0.4, "seed": 3},
    "dare_paper": {"density": 0.4, "seed": 3},
    "della_mergekit": {"density": 0.4, "epsilon": 0.3, "seed": 3},
    "della_paper": {"density": 0.4, "epsilon": 0.3, "seed": 3},
    "model_stock_mergekit": {},
    "pcb_vision": {},
    "regmean_badmerging": {},
}
# fmt: on
ROWS = LEAVES + RULES
SLERP_OF_ZERO = "slerp refuses an angle to a zero vector"


def label(row: Row) -> str:
    """The name of a test, the same in every process."""
    options = {key: getattr(value, "__name__", value) for key, value in row.options.items()}
    return f"{row.name}({', '.join(f'{key}={value}' for key, value in options.items())})"


def inputs(row: Row, **how: Any) -> Any:
    return testing.tensors(**how) if row.kind == "leaf" else testing.stacks(n=row.n, **how)


def usable(row: Row, x: Tensor) -> bool:
    """Not what is refused: zero vectors beside others in slerp, directions that cancel in karcher, over any scope."""
    if row.function not in (merges.slerp, merges.nuslerp, merges.karcher):
        return True
    wide = x.double()
    rows = wide.flatten(2) if x.ndim > 2 and row.options.get("scope") == "row" else wide.reshape(len(x), 1, -1)
    if row.function is not merges.karcher:
        return len({tuple(vector.any(-1).tolist()) for vector in rows}) == 1
    units = torch.nan_to_num(rows / rows.norm(dim=-1, keepdim=True), posinf=0.0, neginf=0.0)
    weights = torch.tensor(row.options.get("weights", [1.0] * len(x)), dtype=torch.float64)
    sums = (units * weights[:, None, None]).sum(0).norm(dim=-1)
    return bool(((sums > 1e-3) | ~rows.any(0).any(-1)).all())


def of_table(rows: list[Row]) -> Any:
    return pytest.mark.parametrize("row", rows, ids=label)


@pytest.mark.parametrize("module", [sparsify, signs, merges], ids=lambda module: module.__name__)
def test_every_public_rule_has_a_row(module):
    here = {row.name for row in ROWS + MATRICES}
    assert [name for name in module.__all__ if name not in here] == []


def test_every_preset_has_a_row():
    assert set(presets.__all__) == set(PRESETS)


def check(row: Row, x: Tensor) -> None:
    if usable(row, x):
        (testing.check_leaf if row.kind == "leaf" else testing.check_rule)(row.function, x, **row.options)


@of_table(ROWS + MATRICES)
def test_the_contract_holds(row):
    @given(inputs(row))
    def holds(x):
        check(row, x)

    holds()


@of_table(ROWS + MATRICES)
@pytest.mark.parametrize("cancelling", [False, True])
def test_the_contract_holds_where_sums_round(row, cancelling):
    """Five vectors and more: torch's own sums over them change bits, and signs, with the length of a piece."""
    random = torch.Generator().manual_seed(1)
    x = torch.randn((5, 13) if row.kind == "leaf" else (row.n or 8, 5, 13), generator=random)
    if cancelling:
        x[-1] = -x[:-1].sum(0)
    check(row, x)


@pytest.mark.parametrize(
    ("row", "law"),
    [(row, law) for row in ROWS for law in (ODD, PERMUTATION, SCALE) if law in row.laws],
    ids=lambda value: label(value) if isinstance(value, Row) else value.__name__,
)
def test_the_law_holds(row, law):
    @given(inputs(row, exact=True, dtype=torch.float32) | inputs(row, exact=True, dtype=torch.float64))
    def holds(x):
        if usable(row, x):
            law(row.function, x, **row.options)

    holds()


# What is exempt from a law, with the case that shows why.
PAIR = [[4.0, -1.0, 2.0, 3.0], [1.0, -2.0, -2.0, 5.0]]
OPPOSITE = [[1.0, 2.0], [-1.0, -3.0]]
OPPOSITE_HALF = [[1.0, 2.0], [-1.0, -1.0]]
TRIPLE = [*PAIR, [0.5, 3.0, 1.0, -1.0]]
EXEMPT: list[tuple[Row, Callable[..., None], list[Any]]] = [
    (Row(sparsify.above, {"threshold": 0.5}, set()), SCALE, [0.25, 1.0]),
    (Row(signs.elect, {}, set()), SCALE, PAIR),
    (Row(signs.elect, {"zero": "positive"}, set()), ODD, OPPOSITE),
    (Row(signs.agreement, {}, set()), ODD, PAIR),
    (Row(signs.agreement, {}, set()), SCALE, PAIR),
    (Row(signs.consistent, {}, set()), ODD, PAIR),
    (Row(signs.consistent, {}, set()), SCALE, PAIR),
    (Row(merges.mean, {"weights": [2, -0.5, 1]}, set()), PERMUTATION, TRIPLE),
    (Row(merges.weighted, {"weights": [2, -0.5, 1]}, set()), PERMUTATION, TRIPLE),
    (Row(merges.ties, {"weights": [2, 0.5, 1]}, set()), PERMUTATION, TRIPLE),
    (Row(merges.dare, {"density": 0.5, "seed": 1}, set()), PERMUTATION, PAIR),
    (Row(merges.della, {"density": 0.5, "epsilon": 0.2, "seed": 0}, set()), PERMUTATION, PAIR),
    (Row(merges.della, {"density": 1.0, "epsilon": 0.0, "seed": 0, "zero": "positive"}, set()), ODD, OPPOSITE_HALF),
    (Row(merges.magmax, {}, set()), PERMUTATION, OPPOSITE),
    (Row(merges.consensus, {"agree": 0.5, "reduce": "largest"}, set()), PERMUTATION, [[1.0], [-1.0], [0.5]]),
    (Row(merges.slerp, {"t": 0.3}, set()), PERMUTATION, PAIR),
    (Row(merges.nuslerp, {"weights": [1, 3]}, set()), PERMUTATION, PAIR),
    (Row(merges.karcher, {"weights": [1, 3]}, set()), PERMUTATION, PAIR),
    (Row(merges.consensus_ta, {"threshold": [0.1, 2.0]}, set()), PERMUTATION, PAIR),
    (Row(merges.pcb, {"density": 0.5}, set()), SCALE, PAIR),
    (Row(merges.sce, {}, set()), ODD, OPPOSITE),
]


@pytest.mark.parametrize(
    ("row", "law", "values"),
    EXEMPT,
    ids=[f"{label(row)}-{law.__name__}" for row, law, _ in EXEMPT],
)
def test_the_law_fails_where_a_row_does_not_name_it(row, law, values):
    with pytest.raises(AssertionError, match=r"not (odd|invariant|equivariant)"):
        law(row.function, torch.tensor(values), **row.options)


def test_each_exemption_has_a_case():
    shown = {(row.name, law) for row, law, _ in EXEMPT}
    missing = {
        (row.name, law.__name__) for row in ROWS for law in LAWS[row.kind] - row.laws if (row.name, law) not in shown
    }
    assert missing == set()


def test_elect_agreement_and_consistent_do_not_change_with_scale():
    stack = torch.tensor(TRIPLE)
    for function in (signs.elect, signs.agreement, signs.consistent):
        assert torch.equal(function(stack * 4), function(stack))


# densities 0 and 1

IDENTITY, ZEROS = "identity", "zeros"
# fmt: off
ENDS = [
    (sparsify.topk, {"density": 0.0}, ZEROS),
    (sparsify.topk, {"density": 1.0}, IDENTITY),
    (sparsify.topk, {"density": 0.0, "scope": "row"}, ZEROS),
    (sparsify.topk, {"density": 1.0, "scope": "row"}, IDENTITY),
    (sparsify.topk, {"density": 1.0, "count": "floor"}, IDENTITY),
    (sparsify.topk, {"density": 1.0, "count": "reference"}, IDENTITY),
    (sparsify.above, {"threshold": 0.0}, IDENTITY),
    (sparsify.above, {"threshold": float("inf")}, ZEROS),
    (sparsify.band, {"density": 0.0, "outliers": 0.5}, ZEROS),
    (sparsify.band, {"density": 1.0, "outliers": 0.0}, IDENTITY),
    (sparsify.band, {"density": 1.0, "outliers": 1.0}, ZEROS),
    (sparsify.band, {"density": 1.0, "outliers": 0.0, "scope": "tensor"}, IDENTITY),
    (sparsify.band, {"density": 1.0, "outliers": 1.0, "scope": "global"}, ZEROS),
    (sparsify.drop, {"density": 0.0, "seed": 1}, ZEROS),
    (sparsify.drop, {"density": 1.0, "seed": 1}, IDENTITY),
    (sparsify.drop, {"density": 0.0, "seed": 1, "rescale": "l1"}, ZEROS),
    (sparsify.drop, {"density": 1.0, "seed": 1, "rescale": "l1"}, IDENTITY),
    (sparsify.rank_drop, {"density": 0.0, "epsilon": 0.0, "seed": 1}, ZEROS),
    (sparsify.rank_drop, {"density": 1.0, "epsilon": 0.0, "seed": 1}, IDENTITY),
    (sparsify.rank_drop, {"density": 1.0, "epsilon": 0.0, "seed": 1, "rescale": "l1"}, IDENTITY),
]
# fmt: on


@pytest.mark.parametrize(("leaf", "options", "expected"), ENDS)
def test_at_the_ends_of_its_range_a_leaf_keeps_all_or_nothing(leaf, options, expected):
    x = torch.tensor([[3.0, -1.0, 0.5], [0.0, -2.0, 3.0]])
    wanted = x if expected == IDENTITY else torch.zeros_like(x)
    assert torch.equal(leaf(x, **options), wanted)
    assert torch.equal(TaskVector({"x": x}).map(leaf, **options)["x"], wanted)


@pytest.mark.parametrize(
    ("rule", "options", "expected"),
    [
        (merges.ties, {"density": 0.0}, None),
        (merges.ties, {"density": 1.0}, voted_mean),
        (merges.dare, {"density": 0.0, "seed": 1}, None),
        (merges.dare, {"density": 1.0, "seed": 1}, merges.total),
        (merges.breadcrumbs, {"density": 0.0, "outliers": 0.0}, None),
        (merges.breadcrumbs, {"density": 1.0, "outliers": 0.0}, merges.total),
        (merges.della, {"density": 0.0, "epsilon": 0.0, "seed": 1}, None),
        (merges.della, {"density": 1.0, "epsilon": 0.0, "seed": 1}, voted_mean),
    ],
)
def test_at_density_0_a_merge_gives_zeros_and_at_1_it_trims_nothing(rule, options, expected):
    stack = torch.tensor([TRIPLE, TRIPLE[::-1]]).transpose(0, 1)
    wanted = torch.zeros_like(stack[0]) if expected is None else expected(stack)
    assert torch.equal(rule(stack, **options), wanted)
    assert torch.equal(merge([{"x": vector} for vector in stack], rule, **options)["x"], wanted)


@pytest.mark.parametrize(
    ("function", "options"),
    [
        *[(f, {"density": d}) for f in (sparsify.topk, merges.ties) for d in (-0.1, 1.1, 20, float("nan"))],
        *[(f, {"density": 2, "seed": 0}) for f in (sparsify.drop, merges.dare)],
        *[(f, {"density": 0.9, "epsilon": 0.3, "seed": 0}) for f in (sparsify.rank_drop, merges.della)],
        *[(f, {"density": 0.5, "epsilon": -0.1, "seed": 0}) for f in (sparsify.rank_drop, merges.della)],
        *[(f, {"density": 0.5, "outliers": -1}) for f in (sparsify.band, merges.breadcrumbs)],
        *[(f, {"density": 0.5, "outliers": 0, "count": "reference"}) for f in (sparsify.band, merges.breadcrumbs)],
        *[(f, {"density": 0.5, "count": "ceil"}) for f in (sparsify.topk, merges.ties)],
        (sparsify.above, {"threshold": -1}),
        (sparsify.above, {"threshold": float("nan")}),
        *[(sparsify.drop, {"density": d, "seed": 0, "rescale": "l2"}) for d in (0, 0.5)],
        (sparsify.rank_drop, {"density": 0.5, "epsilon": 0.1, "seed": 0, "rescale": "l2"}),
        (signs.elect, {"by": "mass"}),
        (signs.elect, {"zero": "negative"}),
        (signs.consistent, {"agree": 0}),
        (signs.consistent, {"agree": 1.5}),
        (merges.della, {"density": 0.5, "epsilon": 0.1, "seed": 0, "zero": "majority"}),
        *[(f, {"weights": [1, 2, 3]}) for f in (merges.mean, merges.weighted, merges.ties)],
        (merges.ties, {"reduce": "median"}),
        *[(f, {"scope": "column"}) for f in (merges.nuslerp, merges.model_stock, merges.karcher)],
        *[(f, {"scope": "row"}) for f in (merges.localize_and_stitch, merges.pcb, merges.sce)],
        (merges.karcher, {"weights": [1, -1]}),
        (merges.karcher, {"weights": [0, 0]}),
        (merges.nuslerp, {"weights": [1, -1]}),
        (merges.consensus_ta, {"threshold": -0.1}),
        (merges.consensus_ta, {"threshold": [0.1, 0.2, 0.3]}),
        (merges.consensus_ta, {"tasks": -1}),
        (merges.pcb, {"clamp": 0.5}),
        *[(f, {"density": 2.0}) for f in (merges.localize_and_stitch, merges.pcb, merges.sce)],
    ],
)
def test_an_option_outside_its_range_is_refused(function, options):
    x = torch.tensor(PAIR)
    with pytest.raises(ValueError, match=r"."):
        function(x, **options)


def test_a_majority_over_rows_is_refused():
    """It would be one over whatever rows come in one piece."""
    for rule in (signs.elect, merges.ties):
        with pytest.raises(ValueError, match="zero='majority'"):
            rule(torch.tensor(PAIR), scope="row", zero="majority")


def test_weights_that_sum_to_zero_have_no_mean():
    with pytest.raises(ValueError, match="whose sum is zero|sum to zero"):
        merges.mean(torch.tensor(PAIR), weights=[1, -1])


def test_slerp_refuses_other_than_two_and_a_zero_vector():
    with pytest.raises(ValueError, match="got 3"):
        merges.slerp(torch.tensor(TRIPLE), 0.5)
    with pytest.raises(ValueError, match="zero vector"):
        merges.slerp(torch.tensor([[1.0, 2.0], [0.0, 0.0]]), 0.5)


def test_model_stock_refuses_one_vector():
    with pytest.raises(ValueError, match="at least two"):
        merges.model_stock(torch.tensor(PAIR[:1]))


# names, empty tensors, dtypes


def refuse(x: Tensor) -> Tensor:
    raise AssertionError(f"called on {tuple(x.shape)}")


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 4), (2, 0, 3)])
def test_an_empty_tensor_is_returned_and_the_rule_not_called(shape):
    empty = torch.empty(shape)
    assert merge([{"x": empty}, {"x": empty}], refuse)["x"].shape == shape
    assert TaskVector({"x": empty}).map(refuse)["x"].shape == shape


@of_table(ROWS)
def test_an_empty_tensor_among_others_changes_nothing(row):
    full = torch.tensor([TRIPLE[i % 3] for i in range(row.n or 3)]) if row.kind == "rule" else torch.tensor(PAIR[0])
    if row.kind == "leaf":
        alone = TaskVector({"x": full}).map(row.function, **row.options)
        found = TaskVector({"a": torch.empty(0, 3), "x": full}).map(row.function, **row.options)
    else:
        alone = merge([{"x": vector} for vector in full], row.function, **row.options)
        found = merge([{"a": torch.empty(0, 3), "x": vector} for vector in full], row.function, **row.options)
    assert found["a"].shape == (0, 3)
    assert testing.same_bits(found["x"], alone["x"])


# devices: what a rule makes, it makes where its input is


@of_table(ROWS + MATRICES)
def test_a_rule_makes_nothing_on_the_default_device(row):
    torch.manual_seed(0)
    x = torch.randn(4, 5) if row.kind == "leaf" else torch.randn(row.n or 8, 4, 5)
    everyday = row.function(x, **row.options)
    with torch.device("meta"):
        found = row.function(x, **row.options)
        through = (
            [TaskVector(kind({"x": x})).map(row.function, **row.options)["x"] for kind in (dict, lazy)]
            if row.kind == "leaf"
            else [merge([kind({"x": v}) for v in x], row.function, **row.options)["x"] for kind in (dict, lazy)]
        )
    assert testing.same_bits(found, everyday)
    assert [result.device.type for result in through] == ["cpu", "cpu"]
    assert testing.same_bits(*through)


def test_that_device_check_can_fail():
    x = torch.ones(2)
    with torch.device("meta"), pytest.raises(RuntimeError):
        torch.where(x > 0, x, torch.zeros(2))


# compositions that are promised to be equal


@given(testing.stacks())
def test_disjoint_mean_takes_any_signs_and_cuts_them_as_the_stack(stack):
    signs_of_last = stack[-1].sign()
    testing.check_rule(disjoint_mean, stack, signs=signs_of_last)


@given(testing.stacks(dtype=torch.float32))
def test_ties_is_its_parts_bit_for_bit(stack):
    trimmed = torch.stack([sparsify.topk(x, 0.4) for x in stack])
    assert testing.same_bits(merges.ties(stack, 0.4), disjoint_mean(trimmed, elect(trimmed)))


@given(testing.stacks(dtype=torch.float32))
def test_dare_is_the_sum_of_vectors_dropped_by_their_own_seeds(stack):
    vectors = [TaskVector({"x": x}).map(sparsify.drop, density=0.4, seed=fold(3, i)) for i, x in enumerate(stack)]
    merged = merge([TaskVector({"x": x}) for x in stack], merges.dare, density=0.4, seed=3)
    assert testing.same_bits(merge(vectors, merges.total)["x"], merged["x"])


@given(testing.stacks(dtype=torch.float32))
def test_della_is_its_parts(stack):
    seeds = [fold(3, i) for i in range(len(stack))]
    dropped = torch.stack([sparsify.rank_drop(x, 0.4, 0.2, seed=s) for x, s in zip(stack, seeds, strict=True)])
    assert testing.same_bits(merges.della(stack, 0.4, 0.2, seed=3), disjoint_mean(dropped, elect(dropped)))


@given(testing.stacks(dtype=torch.float32))
def test_breadcrumbs_is_the_sum_of_bands(stack):
    banded = torch.stack([sparsify.band(x, 0.5, 0.25) for x in stack])
    assert testing.same_bits(merges.breadcrumbs(stack, 0.5, 0.25), merges.total(banded))


@pytest.mark.parametrize("n", [1, 2, 3, 7, 20, 49])
def test_consistent_wants_the_fraction_of_the_vectors_that_it_is_given(n):
    for votes in range(n // 2 + 1, n + 1):
        stack = torch.tensor([2.0] * votes + [-1.0] * (n - votes), dtype=torch.float64)[:, None]
        assert float(signs.agreement(stack)) == pytest.approx(votes / n)
        assert float(signs.consistent(stack, votes / n)) == 1
        assert float(signs.consistent(stack, round(votes / n, 12))) == 1
        assert float(signs.consistent(stack, min(1.0, (votes + 0.5) / n))) == (votes == n)


def test_dot_products_are_taken_in_float64():
    stack = 1 + 1e-3 * torch.randn(3, 1000, generator=torch.Generator().manual_seed(0))
    expected = stack.double() @ stack.double().T
    torch.testing.assert_close(
        torch.tensor(pair_dots(stack, HERE), dtype=torch.float64).reshape(3, 3), expected, rtol=1e-13, atol=0
    )


NAN = float("nan")


@pytest.mark.parametrize(
    ("rule", "options"),
    [
        (signs.elect, {}),
        (signs.elect, {"by": "count"}),
        (signs.elect, {"zero": "positive"}),
        (signs.agreement, {}),
        (signs.consistent, {}),
        (signs.consistent, {"agree": 0.6}),
        (merges.mean, {}),
        (merges.ties, {}),
        (merges.magmax, {}),
        *[(merges.consensus, {"reduce": reduce}) for reduce in ("mean", "sum", "largest")],
        (merges.dare, {"density": 1.0, "seed": 0}),
    ],
)
def test_nan_flows_through_elementwise_rules(rule, options):
    stack = torch.tensor([[1.0, NAN, 2.0], [1.0, 5.0, -2.0], [1.0, -7.0, 3.0]])
    found = rule(stack, **options)
    assert found.isnan().tolist() == [False, True, False]
    assert merge([{"x": x} for x in stack], rule, **options)["x"].isnan().tolist() == [False, True, False]


def test_nan_flows_through_elementwise_leaves():
    x = torch.tensor([1.0, NAN, -3.0])
    assert sparsify.above(x, 2.0).isnan().tolist() == [False, True, False]
    assert sparsify.topk(x, 1.0).isnan().tolist() == [False, True, False]
    assert sparsify.drop(x, 1.0, seed=0).isnan().tolist() == [False, True, False]


def test_signs_of_the_smallest_and_the_largest_numbers_are_right():
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        info = torch.finfo(dtype)
        values = [info.max, info.tiny, info.smallest_normal * info.eps, 0.0, float("inf")]
        x = torch.tensor(values, dtype=dtype)
        assert signs.elect(torch.stack([x, x * 0])[:1]).tolist() == [1, 1, 1, 0, 1]
        assert signs.elect(-x[None], by="count").tolist() == [-1, -1, -1, 0, -1]


def test_a_nan_shows_in_magmax_wherever_it_stands():
    nan = float("nan")
    assert bool(merges.magmax(torch.tensor([[nan, 1.0, 2.0], [1.0, nan, 3.0], [5.0, 7.0, 1.0]]))[:2].isnan().all())


@pytest.mark.parametrize("kept", [-1.0, 1.0])
def test_a_single_vector_merged_by_ties_is_its_own_trim(kept):
    x = torch.tensor([3.0, -1.0, 0.5, 2.0]) * kept
    assert torch.equal(merges.ties(x[None], 0.5), sparsify.topk(x, 0.5))


# presets


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_keeps_the_contract(name):
    @given(testing.stacks(n=2 if name.startswith("model_stock") else None))  # of one vector it is refused
    def holds(stack):
        testing.check_rule(getattr(presets, name), stack, **PRESETS[name])

    holds()


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_pickles_and_shows_its_arguments(name):
    preset = getattr(presets, name)
    stack = torch.tensor(TRIPLE)
    again = pickle.loads(pickle.dumps(preset))
    assert torch.equal(again(stack, **PRESETS[name]), preset(stack, **PRESETS[name]))
    assert all(f"{key}={value!r}" in repr(preset) for key, value in preset.keywords.items())


# option names mean the same everywhere


NAMES = {"agree", "by", "clamp", "count", "density", "epsilon", "extrapolate", "first", "gram", "off_diagonal",
         "outliers", "reduce", "rescale", "ridge", "scope", "seed", "steps", "t", "tasks", "threshold", "transposed",
         "weighted_vote", "weights", "zero"}  # fmt: skip


@of_table(ROWS)
def test_a_rule_takes_its_options_by_name_and_none_in_a_bag(row):
    parameters = inspect.signature(row.function).parameters.values()
    assert not any(p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL) for p in parameters)
    assert {p.name for p in parameters} - {"at", "x", "stack"} <= NAMES
