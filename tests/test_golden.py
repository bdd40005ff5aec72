"""What other people's code answers, and what ours does: the same bits, or within 2e-6, or a deviation of a known size.

Every case of every file in `golden` is listed in a table below.
"""

import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from taskvec import TaskVector, merge, presets
from taskvec.merges import (
    consensus_ta,
    consensus_ties,
    della,
    disjoint_mean,
    karcher,
    magmax,
    mean,
    model_stock,
    nuslerp,
    pcb,
    sce,
    slerp,
    ties,
    weighted,
)
from taskvec.per_task import emr, tall_masks
from taskvec.rules import Place
from taskvec.signs import elect
from taskvec.sparsify import band, drop, rank_drop, topk

FOLDER = Path(__file__).parent / "golden"
CLOSE = 2e-6

Vectors = list[TaskVector]
Arguments = dict[str, Any]


class Golden(NamedTuple):
    vectors: Vectors
    arguments: Arguments
    output: dict[str, Tensor]
    extra: dict[str, Any]


def cases_of(file: str) -> dict[str, dict[str, Any]]:
    return {case["name"]: case for case in json.loads((FOLDER / f"{file}.json").read_text())["cases"]}


def golden(file: str, name: str) -> Golden:
    """A case with its inputs: a vector for each of a stack, or the only one there is."""
    data = json.loads((FOLDER / f"{file}.json").read_text())
    case = cases_of(file)[name]
    inputs = {key: torch.tensor(value) for key, value in data["inputs"][case["inputs"]].items()}
    single = case["inputs"] in ("one", "rows", "row")
    count = 1 if single else case["arguments"].get("vectors", len(next(iter(inputs.values()))))
    vectors = [TaskVector({key: x if single else x[i] for key, x in inputs.items()}) for i in range(count)]
    output = {key: torch.tensor(value) for key, value in case["output"].items()}
    return Golden(vectors, case["arguments"], output, case)


def apart(found: Any, expected: dict[str, Tensor], *, bits: bool = True) -> dict[str, str]:
    """The tensors that differ, each with its largest difference."""
    assert set(found) == set(expected)
    return {
        name: f"{float((found[name] - wanted).abs().max()):.1e}"
        for name, wanted in expected.items()
        if not (torch.equal(found[name], wanted) if bits else torch.allclose(found[name], wanted, CLOSE, CLOSE))
    }


# Rules and presets against implementations


def ties_reference(vectors: Vectors, a: Arguments) -> Any:
    preset = {"dis-mean": presets.ties_reference, "dis-sum": presets.ties_badmerging}[a["merge_func"]]
    return merge(vectors, preset, density=a["K"] / 100)


def ties_mergelm(vectors: Vectors, a: Arguments) -> Any:
    """Not a preset: it keeps one entry more than the TIES authors' code."""
    entries = sum(x.numel() for x in vectors[0].values())
    kept = int((1 - a["param_value_mask_rate"]) * entries) + 1
    return merge(vectors, presets.ties_reference, density=(kept + 0.5) / entries)


def ties_peft(vectors: Vectors, a: Arguments) -> Any:
    by = {"total": "sum", "frequency": "count"}[a["majority_sign_method"]]
    return merge(vectors, presets.ties_peft, density=a["density"], weights=a["weights"], by=by)


def ties_mergekit(vectors: Vectors, a: Arguments) -> Any:
    choice = {} if a["normalize"] else {"reduce": "sum"}
    how = {"density": a["density"], "weights": a["weight"], "by": a["consensus_method"]}
    return merge(vectors, presets.ties_mergekit, **how, **choice)


def linear_peft(vectors: Vectors, a: Arguments) -> Any:
    if "density" in a:
        vectors = [v.map(topk, density=a["density"], scope="tensor", count="floor") for v in vectors]
    return merge(vectors, weighted, weights=a["weights"])


def linear_mergekit(vectors: Vectors, a: Arguments) -> Any:
    return merge(vectors, mean if a["normalize"] else weighted, weights=a["weight"])


def breadcrumbs_mergekit(vectors: Vectors, a: Arguments) -> Any:
    how = {"density": a["density"], "outliers": a["gamma"]}
    if a["method"] == "breadcrumbs":
        return merge(vectors, presets.breadcrumbs_mergekit, **how, weights=a["weight"])
    vectors = [v.map(band, **how, scope="tensor", count="floor") for v in vectors]
    return merge(vectors, ties, weights=a["weight"], weighted_vote=True, zero="positive", reduce="sum")


def breadcrumbs_reference(vectors: Vectors, a: Arguments) -> Any:
    """Rows are along the last dimension there and along the first here: the convolution is made a matrix of them."""
    rows = [TaskVector({name: x.flatten(0, -2) if x.ndim > 1 else x for name, x in v.items()}) for v in vectors]
    keep, remove = a["top_k_keep"], a["top_k_remove"]
    how: dict[str, Any] = {"density": keep, "outliers": remove}
    if not a["remove_first"]:  # keeps the top, then drops the outliers of that: fewer are left
        lengths = {name: x.shape[-1] for name, x in rows[0].items()}
        how["density"] = {n: (int(keep * m) - int(remove * m) + 0.5) / m for n, m in lengths.items()}
    merged = merge(rows, presets.breadcrumbs_reference, **how)
    return {name: merged[name].reshape(x.shape) for name, x in vectors[0].items()}


def magmax_reference(vectors: Vectors, a: Arguments) -> Any:
    assert a == {}
    return merge(vectors, magmax)


def slerp_mergekit(vectors: Vectors, a: Arguments) -> Any:
    return merge([vectors[0], second_of(vectors, a)], slerp, t=a["t"])


def second_of(vectors: Vectors, a: Arguments) -> TaskVector:
    second = a["pair"][1]
    return vectors[second] if isinstance(second, int) else vectors[0] * float(second.split("*")[0])


def stock(vectors: Vectors, a: Arguments, rule: Callable[..., Tensor] = presets.model_stock_mergekit) -> Any:
    """Filters are along the last dimension there and along the first here: the convolution is made a matrix of them."""
    if not a["filter_wise"]:
        return merge(vectors, rule)
    rows = [TaskVector({name: x.flatten(0, -2) if x.ndim > 1 else x for name, x in v.items()}) for v in vectors]
    merged = merge(rows, rule, scope="row")
    return {name: merged[name].reshape(x.shape) for name, x in vectors[0].items()}


def rows_of(x: Tensor) -> list[tuple[int, Tensor]]:
    """mergekit's filters are along the last dimension."""
    return list(enumerate(x.flatten(0, -2) if x.ndim > 1 else x[None]))


ELEMENTWISE: dict[str, Callable[[Vectors, Arguments], Any]] = {
    "pcb": lambda vectors, a: merge(vectors, pcb, density=a["pcb_ratio"]),
    "consensus_ta": lambda vectors, a: merge(vectors, consensus_ta, **masks_of(a)),
    "consensus_ties": lambda vectors, a: merge(vectors, consensus_ties, density=a["K"] / 100, **masks_of(a)),
    "sce": lambda vectors, a: merge(vectors, sce, density=a["select_topk"]),
    "karcher": lambda vectors, _: merge(vectors, karcher),
    "ties": lambda vectors, a: ties_mergekit(vectors, a | {"consensus_method": "sum", "normalize": True}),
    "nuslerp": lambda vectors, a: (
        merge(vectors, nuslerp, weights=a["weight"])
        if a["nuslerp_flatten"]
        else {name: nuslerp_by_row(vectors, name, a) for name in vectors[0]}
    ),
}


def masks_of(a: Arguments) -> Arguments:
    return {"threshold": a["tall_mask_lambda"], "tasks": a["prun_thre_k"]}


def elementwise(vectors: Vectors, a: Arguments) -> Any:
    """Everything in elementwise.json that is one merge."""
    return ELEMENTWISE[a["method"]](vectors, a)


def nuslerp_by_row(vectors: Vectors, name: str, a: Arguments) -> Tensor:
    """Their rows are along the last dimension, or with `nuslerp_row_wise` along the first."""
    first = bool(a.get("nuslerp_row_wise"))
    turned = [v[name].transpose(0, -1) if first else v[name] for v in vectors]
    rows = torch.stack([x.flatten(0, -2) if x.ndim > 1 else x for x in turned])
    found = nuslerp(rows, a["weight"], scope="row").reshape(turned[0].shape)
    return found.transpose(0, -1) if first else found


BITS, NEAR = True, False
# file, how it is called here, whether bit for bit, the cases that deviate and have a test of their own
AGREE: list[tuple[str, Callable[[Vectors, Arguments], Any], bool, set[str]]] = [
    ("ties_reference", ties_reference, BITS, {"majority_none"}),
    ("ties_mergelm", ties_mergelm, BITS, set()),
    ("ties_peft", ties_peft, BITS, set()),
    ("ties_mergekit", ties_mergekit, BITS, set()),
    ("linear_peft", linear_peft, BITS, set()),
    ("linear_mergekit", linear_mergekit, BITS, set()),
    ("breadcrumbs_mergekit", breadcrumbs_mergekit, BITS, set()),
    ("breadcrumbs_reference", breadcrumbs_reference, BITS, set()),
    ("magmax_reference", magmax_reference, BITS, set()),
    ("slerp_mergekit", slerp_mergekit, NEAR, {"zero"}),
    (
        "model_stock",
        stock,
        NEAR,
        {"agreeing-fusion_bench", "distinct-fusion_bench"},
    ),
    (
        "elementwise",
        elementwise,
        NEAR,
        {name for name in cases_of("elementwise") if name.startswith(("tall", "emr")) or name.endswith("tiny")},
    ),
]
MASKED = ("dare", "della")  # run with their own masks, below


def test_every_file_is_used():
    here = {path.stem for path in FOLDER.glob("*.json")}
    assert here == {file for file, *_ in AGREE} | set(MASKED) | {
        "whose_ties",
        "coming_from",
        "matrices",
        "rebase",
    }  # in their own tests


@pytest.mark.parametrize(
    ("file", "name", "ours", "bits"),
    [(file, name, f, bits) for file, f, bits, apart in AGREE for name in cases_of(file) if name not in apart],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_ours_agrees(file, name, ours, bits):
    case = golden(file, name)
    assert apart(ours(case.vectors, case.arguments), case.output, bits=bits) == {}


def test_a_difference_would_be_seen():
    case = golden("ties_peft", "distinct-weights_1_1_1-total")
    found = merge(case.vectors, ties, density=0.4, scope="tensor")
    assert set(apart(found, case.output)) == {"matrix", "bias", "conv"}
    assert set(apart(found, case.output, bits=False)) == {"matrix", "bias", "conv"}


@pytest.mark.parametrize(
    ("file", "density"), [("ties_reference", lambda a: a["K"] / 100), ("ties_mergelm", lambda _: 17.5 / 82)]
)
def test_the_reference_count_keeps_as_many_as_the_authors_code(file, density):
    for name in cases_of(file):
        case = golden(file, name)
        trimmed = [v.map(topk, density=density(case.arguments), count="reference") for v in case.vectors]
        assert [sum(int(x.count_nonzero()) for x in v.values()) for v in trimmed] == case.extra["kept"]


# The page docs/whose_ties.md

SD_MECHA = {"scope": "tensor", "count": "reference"}
WHOSE: dict[str, tuple[Callable[..., Tensor], Arguments]] = {
    "authors": (presets.ties_reference, {}),
    "fusion_bench": (presets.ties_badmerging, {}),
    "peft": (presets.ties_peft, {}),
    "peft-frequency": (presets.ties_peft, {"by": "count"}),
    "mergekit": (presets.ties_mergekit, {"weights": [1, 1, 1]}),
    "sd_mecha": (ties, {**SD_MECHA, "by": "count"}),
    "sd_mecha-vote_sgn": (ties, SD_MECHA),
    "peft-weights": (presets.ties_peft, {"weights": [0.2, 1, 1]}),
    "mergekit-weights": (presets.ties_mergekit, {"weights": [0.2, 1, 1]}),
}


@pytest.mark.parametrize("name", WHOSE)
def test_whose_ties_is_ours(name):
    data = json.loads((FOLDER / "whose_ties.json").read_text())
    inputs = {key: torch.tensor(value) for key, value in data["inputs"].items()}
    vectors = [TaskVector({key: x[i] for key, x in inputs.items()}) for i in range(3)]
    answers = {case["name"]: case["output"] for case in data["cases"]}
    assert set(answers) == set(WHOSE)
    assert len({str(output) for output in answers.values()}) == len(answers)  # as the page says
    rule, options = WHOSE[name]
    expected = {key: torch.tensor(value) for key, value in answers[name].items()}
    assert apart(merge(vectors, rule, density=0.5, **options), expected, bits=False) == {}


def test_the_page_shows_what_they_answered():
    page = (FOLDER.parents[1] / "docs" / "whose_ties.md").read_text("utf-8")
    table = page.split("| implementation |")[1].split("\n\n")[0].splitlines()[2:]
    data = json.loads((FOLDER / "whose_ties.json").read_text())
    answers = {case["name"]: case["output"] for case in data["cases"]}
    shown = [[[float(x) for x in cell.split(",")] for cell in line.split("|")[2:5]] for line in table]
    assert shown == [[[float(f"{x:.3g}") for x in answers[name][key]] for key in ("a", "b", "one")] for name in WHOSE]


# Deviations, each of which the docstrings tell


def test_ties_where_even_the_majority_is_tied_keeps_nobody():
    """Theirs keeps the negatives there; everywhere else the two agree."""
    case = golden("ties_reference", "majority_none")
    ours, theirs = ties_reference(case.vectors, case.arguments)["bias"], case.output["bias"]
    tied = torch.stack([v["bias"] for v in case.vectors]).sum(0) == 0
    assert tied.tolist() == [False, False, True, False, False]
    assert torch.equal(ours[~tied], theirs[~tied])
    assert float(ours[tied]) == 0
    assert float(theirs[tied]) == -0.25


def test_ties_where_the_agreeing_weights_sum_to_zero_gives_zero_unless_asked():
    """mergekit leaves such a sum undivided; everywhere else a weighted mean is the same."""
    case = golden("ties_mergekit", "distinct-weights_1_-0.5_0.5-normalize")
    weights, density = case.arguments["weight"], case.arguments["density"]
    ours = merge(case.vectors, presets.ties_mergekit, density=density, weights=weights, reduce="weighted_mean")
    differ = {name: ours[name] != theirs for name, theirs in case.output.items()}
    assert {name: int(where.sum()) for name, where in differ.items()} == {"matrix": 7, "bias": 0, "conv": 2}
    assert not any(ours[name][where].any() for name, where in differ.items())


def test_breadcrumbs_of_more_than_everything_keeps_fewer_unless_asked():
    """Where the fractions exceed the tensor, mergekit drops fewer outliers: 45 + 4 > 48, so 3."""
    case = golden("breadcrumbs_mergekit", "distinct-crowded")
    ours = merge(case.vectors, presets.breadcrumbs_mergekit, density=0.95, outliers=0.1, first="outliers")
    assert set(apart(ours, case.output)) == {"matrix"}


def test_breadcrumbs_reference_on_a_convolution_depends_on_what_a_row_is():
    case = golden("breadcrumbs_reference", "keep0.5-remove0.25")
    ours = merge(case.vectors, presets.breadcrumbs_reference, density=0.5, outliers=0.25)
    assert set(apart(ours, case.output)) == {"conv"}


def test_slerp_with_a_zero_vector_is_refused():
    """mergekit takes the angle to be a right one."""
    case = golden("slerp_mergekit", "zero")
    with pytest.raises(ValueError, match="zero vector"):
        slerp_mergekit(case.vectors, case.arguments)
    factor = math.sin((1 - case.arguments["t"]) * math.pi / 2)
    assert apart(case.vectors[0] * factor, case.output, bits=False) == {}


def test_model_stock_of_vectors_that_disagree_is_zero():
    """The formula extrapolates backwards, and mergekit and its preset follow it; everywhere else the two agree."""
    case = golden("model_stock", "distinct-mergekit")
    assert case.extra["factor"]["matrix"] < 0
    expected = case.output | {"matrix": torch.zeros(6, 8)}
    assert apart(merge(case.vectors, model_stock), expected, bits=False) == {}


def test_model_stock_filter_by_filter_is_zero_only_where_a_filter_disagrees():
    case = golden("model_stock", "agreeing-mergekit-filter_wise")
    found = stock(case.vectors, case.arguments, model_stock)
    assert apart(found, case.output, bits=False) != {}
    for name, theirs in case.output.items():
        rows = [[row for _, row in rows_of(v[name])] for v in case.vectors]
        for i, row in rows_of(theirs):
            pairs = [(rows[a][i], rows[b][i]) for a, b in ((0, 1), (0, 2), (1, 2))]
            agree = sum(float(torch.cosine_similarity(x, y, dim=0)) for x, y in pairs) > 0
            wanted = row if agree else torch.zeros_like(row)
            torch.testing.assert_close(dict(rows_of(found[name]))[i], wanted, rtol=1e-5, atol=1e-5)


def test_della_of_mergekit_is_its_ties_where_nothing_is_dropped():
    """Its masks and its rescaling are compared below."""
    case = golden("ties_mergekit", "distinct-weights_0.8_0.2_0.5-normalize")
    weights = case.arguments["weight"]
    found = merge(case.vectors, presets.della_mergekit, density=1.0, epsilon=0.0, seed=0, weights=weights)
    expected = merge(case.vectors, presets.ties_mergekit, density=1.0, weights=weights)
    assert apart(found, dict(expected)) == {}
    assert apart(merge(case.vectors, della, density=1.0, epsilon=0.0, seed=0, weights=weights), dict(expected)) != {}


@pytest.mark.parametrize("name", ["agreeing-fusion_bench", "distinct-fusion_bench"])
def test_fusion_bench_averages_angles_in_place_of_cosines(name):
    case = golden("model_stock", name)
    ours = merge(case.vectors, model_stock)
    for tensor, theirs in case.output.items():
        angles = [math.degrees(math.acos(v)) for v in cosines(case.vectors, tensor)]
        stored = sorted(degrees[tensor] for degrees in case.extra["angles_in_degrees"])
        assert sorted(angles) == pytest.approx(stored, abs=1e-3)
        factor = stock_factor(math.cos(math.radians(sum(angles) / 3)))
        assert factor == pytest.approx(case.extra["factor"][tensor], rel=1e-5)
        average = sum(v[tensor] for v in case.vectors) / 3
        torch.testing.assert_close(theirs, average * factor, rtol=1e-5, atol=1e-5)
        own = max(0.0, stock_factor(sum(cosines(case.vectors, tensor)) / 3))
        torch.testing.assert_close(ours[tensor], average * own, rtol=1e-5, atol=1e-5)
        assert abs(own - factor) > 4e-4


def cosines(vectors: Vectors, tensor: str) -> list[float]:
    parts = [v.select(tensor) for v in vectors]
    return [float(parts[i].cosine(parts[j])) for i, j in ((0, 1), (0, 2), (1, 2))]


def stock_factor(cosine: float) -> float:
    return 3 * cosine / (1 + 2 * cosine)


@pytest.mark.parametrize("name", [name for name in cases_of("elementwise") if name.startswith("tall")])
def test_tall_masks_are_the_authors_own(name):
    case = golden("elementwise", name)
    found = tall_masks(case.vectors, case.arguments["tall_mask_lambda"])
    for vector, masks in zip(found, case.extra["masks"], strict=True):
        wanted = {name: x * torch.tensor(masks[name]).reshape(x.shape) for name, x in case.output.items()}
        assert apart(vector, wanted, bits=False) == {}


@pytest.mark.parametrize("name", [name for name in cases_of("elementwise") if name.startswith("emr")])
def test_emr_has_the_factors_of_one_of_the_authors_files(name):
    """In the others a tensor counts as much as any, however small it is."""
    case = golden("elementwise", name)
    factors = list(zip(case.extra["rescales_flat"], case.extra["rescales"], strict=True))
    for vector, masks, (factor, other) in zip(emr(case.vectors), case.extra["masks"], factors, strict=True):
        kept = {name: x * torch.tensor(masks[name]).reshape(x.shape) for name, x in case.output.items()}
        assert apart(vector, {name: x * factor for name, x in kept.items()}, bits=False) == {}
        assert abs(factor - other) > 0.02


@pytest.mark.parametrize("name", [name for name in cases_of("elementwise") if name.endswith("tiny")])
def test_sce_of_small_vectors_has_equal_weights_in_mergekit(name):
    """Where mean squares add up to less than 1e-6, as those of most fine-tunes do."""
    case = golden("elementwise", name)
    vectors = [v * case.arguments["factor"] for v in case.vectors]
    signs = merge(vectors, elect, zero="positive")
    assert apart(merge(vectors, sce), case.output, bits=False) != {}
    equal = {key: disjoint_mean(torch.stack([v[key] for v in vectors]), signs[key]) for key in signs}
    assert apart({k: x * 1e4 for k, x in equal.items()}, {k: x * 1e4 for k, x in case.output.items()}, bits=False) == {}


# Random drops: their draws were replaced by the stored masks, and so are ours


def with_mask(monkeypatch: pytest.MonkeyPatch, mask: Tensor) -> None:
    """Random bits that keep what the mask keeps, whatever the probability (in (0, 1))."""
    lowest, highest = -(1 << 31), (1 << 31) - 1
    bits = torch.where(mask.bool(), lowest, highest).to(torch.int32)
    monkeypatch.setattr(Place, "bits", lambda at, _, like: bits.flatten()[at.start :][: like.numel()].view_as(like))


DARE = {
    "mergekit-l1": lambda a: partial(drop, density=a["density"], rescale=a["rescale_norm"]),
    "peft": lambda a: partial(drop, density=a["density"], rescale="density"),
    "mergelm": lambda a: partial(drop, density=1 - a["mask_rate"], rescale="density"),
}
DELLA = {
    "della": lambda a: partial(rank_drop, density=a["density"], epsilon=a["window_size"]),
    "mergekit": lambda a: partial(rank_drop, density=a["density"], epsilon=2 * a["epsilon"], rescale=a["rescale_norm"]),
}


def test_every_dare_case_is_listed():
    assert set(cases_of("dare")) == set(DARE)


@pytest.mark.parametrize("name", DARE)
def test_dare_given_the_mask_agrees(name, monkeypatch):
    case = golden("dare", name)
    leaf = DARE[name](case.arguments)
    for tensor, theirs in case.output.items():
        mask = torch.tensor(case.extra["mask"][tensor])
        with_mask(monkeypatch, mask)
        x = case.vectors[0][tensor]
        for ours in (leaf(x, seed=0), TaskVector({"x": x}).map(leaf, seed=0)["x"]):
            assert torch.equal(ours != 0, mask.bool() & (x != 0))
            torch.testing.assert_close(ours, theirs, rtol=CLOSE, atol=CLOSE)


@pytest.mark.parametrize("name", cases_of("della"))
def test_della_given_the_mask_agrees(name, monkeypatch):
    case = golden("della", name)
    leaf = DELLA[case.arguments["code"]](case.arguments)
    for tensor, theirs in case.output.items():
        mask = torch.tensor(case.extra["mask"][tensor])
        with_mask(monkeypatch, mask)
        ours = leaf(case.vectors[0][tensor], seed=0)
        assert torch.equal(ours != 0, mask.bool())
        torch.testing.assert_close(ours, theirs, rtol=CLOSE, atol=CLOSE)


@pytest.mark.parametrize("name", cases_of("della"))
def test_della_keeps_each_entry_with_their_probability(name):
    """A survivor is divided by its probability, so that it can be read off; a few seeds keep everything once."""
    case = golden("della", name)
    leaf = partial(DELLA[case.arguments["code"]](case.arguments), rescale="density")
    for tensor, values in case.extra["probabilities"].items():
        theirs, x = torch.tensor(values), case.vectors[0][tensor]
        found = torch.zeros_like(x)
        for seed in range(30):
            kept = leaf(x, seed=seed)
            found = torch.where(kept != 0, x / kept, found)
        torch.testing.assert_close(found, theirs, rtol=CLOSE, atol=CLOSE)


def test_a_drop_without_the_stored_mask_would_differ():
    case = golden("dare", "peft")
    assert set(apart(case.vectors[0].map(drop, density=0.3, seed=0), case.output)) == {"matrix", "bias", "conv"}


def test_weights_and_divisors_differ_between_implementations():
    """The rows above would not tell PEFT from mergekit if these were the same."""
    case = golden("ties_mergekit", "distinct-weights_0.8_0.2_0.5-normalize")
    how = {"density": case.arguments["density"], "weights": case.arguments["weight"]}
    assert apart(merge(case.vectors, presets.ties_peft, **how), case.output) != {}
