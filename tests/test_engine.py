"""The engine: how a function of tensors becomes one of mappings."""

import itertools
import math
import pickle
import threading
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import pytest
import torch
from small import lazy
from torch import Tensor

from taskvec import TaskVector, merge, merges, sparsify
from taskvec._engine import pieces
from taskvec._engine.lazy import Lazy
from taskvec._engine.lift import lift
from taskvec._engine.pieces import BLOCK, CHUNK
from taskvec._engine.run import collect, entries_of, measure
from taskvec._engine.sources import Memory
from taskvec._engine.survivors import Measured, part_of
from taskvec.errors import DegenerateError, DtypeError, MismatchError, OptionError, RuleError
from taskvec.merges import dare, della, disjoint_mean, mean, model_stock, slerp, ties, weighted
from taskvec.rules import HERE, Look, Place, lockstep, over, runs
from taskvec.signs import elect
from taskvec.sparsify import band, drop, rank_drop, topk
from taskvec.testing import same_bits

SHAPES = {"encoder.weight": (40, 30), "encoder.bias": (40,), "head.weight": (3, 40), "head.scale": ()}


def tensors(seed: int, shapes: Mapping[str, tuple[int, ...]] = SHAPES, dtype: torch.dtype = torch.float32) -> Any:
    random = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=random).to(dtype) for name, shape in shapes.items()}


def vectors(n: int = 3, **how: Any) -> list[TaskVector]:
    return [TaskVector(tensors(seed, **how)) for seed in range(n)]


def streamed(given: list[TaskVector]) -> list[TaskVector]:
    return [TaskVector(lazy(v)) for v in given]


def assert_same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert list(found) == list(expected)
    assert [name for name in expected if not same_bits(found[name], expected[name])] == []


def middle(stack: Tensor) -> Tensor:
    return stack.median(0).values


# what a rule is given


class Witness:
    """A function that keeps the shapes it was called with."""

    def __init__(self, f: Callable[..., Tensor]) -> None:
        self.f, self.shapes = f, list[tuple[int, ...]]()

    def __call__(self, x: Tensor, **options: Any) -> Tensor:
        self.shapes.append(tuple(x.shape))
        return self.f(x, **options)

    def marked(self, *pieces: Any, **statistics: Any) -> Any:
        def rule(x: Tensor) -> Tensor:
            return self(x)

        return runs(*pieces, **statistics)(rule)


def test_an_unmarked_rule_is_given_each_tensor_whole_once():
    rule = Witness(middle)
    merge(vectors(), rule)
    assert rule.shapes == [(3, *shape) for shape in SHAPES.values()]


def test_an_unmarked_leaf_is_given_each_tensor_whole_once():
    leaf = Witness(torch.neg)
    vectors()[0].map(leaf)
    assert leaf.shapes == list(SHAPES.values())


def test_an_unmarked_rule_is_given_whole_tensors_whatever_its_options_are_called():
    def centred(x: Tensor, scope: str = "row") -> Tensor:
        assert scope == "row"
        return x - x.mean()

    x = torch.randn(4, BLOCK)
    assert same_bits(TaskVector({"x": x}).map(centred)["x"], centred(x))


def test_an_element_rule_is_given_flat_blocks():
    rule = Witness(lambda stack: stack[0] + stack[1])
    merge(vectors(2, shapes={"x": (3, BLOCK)}), rule.marked("element"))
    assert rule.shapes == [(2, BLOCK)] * 3


def test_a_row_rule_is_given_as_many_whole_rows_as_fit_in_a_block():
    rule = Witness(lambda stack: stack[0] + stack[1])
    shapes = {"matrix": (10, BLOCK // 4), "long": (2, 2 * BLOCK), "conv": (5, 2, 3), "vector": (9,), "scalar": ()}
    merge(vectors(2, shapes=shapes), rule.marked("row"))
    width = BLOCK // 4
    rows = [(2, 4, width), (2, 4, width), (2, 2, width), *[(2, 1, 2 * BLOCK)] * 2, (2, 5, 2, 3), (2, 9), (2,)]
    assert rule.shapes == rows


def test_a_tensor_rule_is_given_whole_tensors():
    rule = Witness(middle)
    merge(vectors(3, shapes={"x": (3, BLOCK)}), rule.marked("tensor"))
    assert rule.shapes == [(3, 3, BLOCK)]


def test_the_scope_row_gives_an_element_rule_whole_rows():
    seen = Witness(lambda x: x.clone())

    @runs("element")
    def leaf(x: Tensor, *, scope: str = "tensor") -> Tensor:
        assert scope in ("tensor", "row")
        return seen(x)

    v = TaskVector({"x": torch.randn(3, 4)})
    v.map(leaf)
    v.map(leaf, scope="row")
    assert seen.shapes == [(12,), (3, 4)]


def test_a_place_tells_the_name_and_the_flat_index():
    places: list[Place] = []

    @runs("element")
    def leaf(x: Tensor, *, at: Place = HERE) -> Tensor:
        places.append(at)
        return x.clone()

    TaskVector({"a": torch.zeros(2, BLOCK), "b": torch.zeros(3)}).map(leaf)
    assert [at.start for at in places] == [0, BLOCK, 0]
    assert places[0].key == places[1].key != places[2].key


def test_marks_other_than_the_known_are_refused():
    with pytest.raises(ValueError, match="'block'"):
        runs("block")  # type: ignore[arg-type]


def test_a_rule_that_is_no_function_or_has_no_signature_is_called_as_it_is():
    given = vectors()
    assert_same(
        merge(given, torch.mean, dim=0), {name: torch.stack([v[name] for v in given]).mean(0) for name in SHAPES}
    )
    assert_same(given[0].map(torch.neg), {name: -x for name, x in given[0].items()})
    assert_same(merge(given, Witness(middle)), merge(given, middle))


def test_partials_are_looked_through():
    given = vectors()
    nested = partial(partial(ties, density=0.3), scope="tensor")
    assert_same(merge(given, nested), merge(given, ties, density=0.3, scope="tensor"))
    assert_same(merge(given, nested, scope="global"), merge(given, ties, density=0.3))
    with pytest.raises(OptionError, match="'densty'"):
        merge(given, nested, densty=0.1)


def test_inputs_may_be_an_iterator_and_options_may_be_called_anything():
    assert_same(merge(iter(vectors()), mean), merge(vectors(), mean))
    assert_same(
        merge(vectors(), lambda stack, rule, inputs: stack[rule] * inputs, rule=1, inputs=2.0), 2 * vectors()[1]
    )


# statistics


def block_peak(stack: Tensor, at: Place) -> float:
    return float(stack.abs().max())


def block_loud(stack: Tensor, at: Place, level: float) -> int:
    return int((stack.abs() >= level).sum())


def peak(n: int, entries: int) -> Any:
    return max((yield Look(block_peak)))


def loud(n: int, entries: int, peak: float, least: float = 0.5) -> Any:
    return (yield from over(block_loud, least * peak))


@runs("element", peak, loud)
def loudness(x: Tensor, *, least: float = 0.5, scope: str = "tensor", at: Place = HERE) -> Tensor:
    """A rule whose second statistic takes the first, and an option."""
    found = at.take(peak, x[None])
    return torch.full_like(x, found) * at.take(loud, x[None], found, least)


def test_a_statistic_is_taken_over_its_scope_and_the_next_may_ask_for_it():
    v = TaskVector({"a": torch.tensor([1.0, -4.0, 3.0]), "b": torch.tensor([[8.0, 7.0], [2.0, 4.0]])})
    assert [float(x.flatten()[0]) for x in v.map(loudness).values()] == [4 * 2, 8 * 3]
    assert [float(x.flatten()[0]) for x in v.map(loudness, scope="global").values()] == [8 * 4] * 2
    assert [float(x.flatten()[0]) for x in v.map(loudness, scope="global", least=0.9).values()] == [8 * 1] * 2


def test_a_plain_tensor_is_its_own_scope():
    assert float(loudness(torch.tensor([1.0, -4.0, 3.0]))[0]) == 4 * 2
    assert float(loudness(torch.tensor([1.0, -4.0, 3.0]), least=0.2)[0]) == 4 * 3


def test_after_select_global_means_the_selected_names():
    v = vectors()[0]
    part = v.select("encoder.*").map(topk, density=0.3)
    assert sum(int(x.count_nonzero()) for x in part.values()) == round(0.3 * 1240)
    assert not all(same_bits(part[name], v.map(topk, density=0.3)[name]) for name in part)


@pytest.mark.parametrize("scope", ["global", "tensor", "row"])
def test_topk_keeps_the_density_of_its_scope(scope):
    kept = {name: int(x.count_nonzero()) for name, x in vectors()[0].map(topk, density=0.3, scope=scope).items()}
    entries = {name: math.prod(shape) for name, shape in SHAPES.items()}
    if scope == "global":
        assert sum(kept.values()) == round(0.3 * sum(entries.values()))
        assert kept != {name: round(0.3 * n) for name, n in entries.items()}
    else:
        rows = {"encoder.weight": 40, "head.weight": 3} if scope == "row" else {}
        assert kept == {name: rows.get(name, 1) * round(0.3 * n / rows.get(name, 1)) for name, n in entries.items()}


def test_a_statistic_over_everything_is_taken_once_and_one_of_a_tensor_once_each():
    calls: list[int] = []

    def counted(n: int, entries: int) -> Any:
        calls.append(entries)
        yield Look(block_peak)
        return 0

    @runs("element", counted)
    def leaf(x: Tensor, *, scope: str = "tensor", at: Place = HERE) -> Tensor:
        assert (scope in ("global", "tensor"), at.take(counted, x[None])) == (True, 0)
        return x.clone()

    for source in (tensors(0), lazy(tensors(0))):
        for scope, expected in (("global", [1361]), ("tensor", [1200, 40, 120, 1])):
            calls.clear()
            result = TaskVector(source).map(leaf, scope=scope)
            for name, _ in itertools.product(SHAPES, range(2)):
                result[name]
            assert calls == expected


def test_a_statistic_that_a_mark_does_not_list_is_an_error_and_not_taken_from_the_piece():
    @runs("element")
    def leaf(x: Tensor, *, at: Place = HERE) -> Tensor:
        return x * at.take(peak, x[None])

    with pytest.raises(KeyError):
        vectors()[0].map(leaf)


def test_a_plain_call_of_a_rule_gives_what_merge_gives():
    stack = torch.randn(2, 4, 5)
    through = merge([{"x": x} for x in stack], slerp, t=0.3)["x"]
    assert same_bits(slerp(stack, 0.3), through)


def block_sums(stack: Tensor, at: Place) -> Tensor:
    return stack.double().sum(1)


def sums(n: int, entries: int) -> Any:
    return (yield from over(block_sums))


def test_a_statistic_adds_up_over_names_for_every_vector():
    sources = [tensors(0), tensors(1)]
    expected = torch.stack([sum(x.double().sum() for x in source.values()) for source in sources])
    torch.testing.assert_close(measure([Memory(source) for source in sources], list(SHAPES), sums), expected)


def test_a_statistic_has_the_same_bits_for_any_order_of_the_names():
    source = {f"{i}": 10.0 ** (i % 7) * torch.randn(100, generator=torch.Generator().manual_seed(i)) for i in range(60)}
    orders = [list(source), list(source)[::-1]]
    assert same_bits(*[measure([Memory(source)], names, sums) for names in orders])
    assert not same_bits(*[sum(source[name].double().sum() for name in names) for names in orders])  # as it might be


def test_over_nothing_there_is_no_statistic():
    with pytest.raises(ValueError, match="every tensor is empty"):
        HERE.take(sums, torch.empty(2, 0))


def test_statistics_in_lockstep_share_their_passes():
    passes: list[int] = []

    def counted(stack: Tensor, at: Place) -> float:
        passes.append(1)
        return block_peak(stack, at)

    def one() -> Any:
        first = yield Look(counted)
        second = yield Look(block_loud, (0.5,))
        return max(first), sum(second)

    def other() -> Any:
        return max((yield Look(counted)))

    def both(n: int, entries: int) -> Any:
        return (yield from lockstep(one(), other(), one()))

    looks: list[Look] = []

    def watched(n: int, entries: int) -> Any:
        drive, found = both(n, entries), None
        while True:
            try:
                looks.append(drive.send(found))
            except StopIteration as end:
                return end.value
            found = yield looks[-1]

    assert HERE.take(watched, torch.tensor([[1.0, -4.0, 0.1, 0.6]])) == ((4.0, 3), 4.0, (4.0, 3))
    assert len(looks) == 2
    assert len(passes) == 3


def test_a_sample_is_spread_over_all_names_and_only_it_is_read():
    runs_read: list[tuple[str, int, int]] = []
    held = {"a": torch.randn(3 * CHUNK), "b": torch.randn(CHUNK)}

    def reader(name: str, start: int, stop: int) -> Tensor:
        runs_read.append((name, start, stop))
        return held[name][start:stop]

    def sizes(n: int, entries: int) -> Any:
        return sum((yield Look(block_size, sample=1 << 16)))

    found = measure([lazy(held, reader).source], ["a", "b"], sizes)
    assert found == sum(stop - start for _, start, stop in runs_read)
    assert 0.5 * (1 << 16) < found < 2 * (1 << 16)
    share = sum(stop - start for name, start, stop in runs_read if name == "a") / found
    assert abs(share - 0.75) < 0.1


def block_size(stack: Tensor, at: Place) -> int:
    return stack.shape[1]


# options


def chosen(x: Tensor, value: Any = 0.0) -> Tensor:
    return torch.full_like(x, value)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (2.0, [2, 2, 2, 2]),
        ({"encoder.bias": 1.0}, [0, 1, 0, 0]),  # the rest: the default
        ({"encoder.*": 1.0, "*": 2.0}, [1, 1, 2, 2]),  # the first pattern that matches
        ({"*": 2.0, "encoder.*": 1.0}, [2, 2, 2, 2]),
        ({"*": 2.0, "encoder.bias": 1.0}, [2, 1, 2, 2]),  # the exact name before all patterns
        ({"*.bias": 3.0, "head.?eight": 4.0}, [0, 3, 4, 0]),
    ],
)
def test_options_are_looked_up_by_name_then_pattern_then_default(value, expected):
    for v in (vectors()[0], *streamed(vectors()[:1])):
        found = v.map(chosen, value=value)
        assert [float(x.flatten()[0]) for x in found.values()] == expected


def test_density_may_vary_by_name_where_its_scope_is_a_tensor():
    v = vectors()[0].map(topk, density={"encoder.*": 0.5, "*": 0.1}, scope="tensor")
    assert [int(x.count_nonzero()) for x in v.values()] == [600, 20, 12, 0]


@pytest.mark.parametrize("source", [dict, lazy])
def test_density_that_varies_by_name_is_an_error_where_its_scope_is_global(source):
    v = TaskVector(source(tensors(0)))
    with pytest.raises(OptionError, match=r"density varies by name.*scope='tensor'.*select"):
        v.map(topk, density={"encoder.*": 0.5, "*": 0.1})["encoder.bias"]


def test_a_pattern_that_matches_nothing_is_an_error_naming_it():
    with pytest.raises(OptionError, match=r"density: 'decoder\.\*' matches no tensor; there are 'encoder\.weight'"):
        merge(vectors(), ties, scope="tensor", density={"decoder.*": 0.5})


@pytest.mark.parametrize("scope", [{"*": "row"}, "rows", "layer"])
def test_a_scope_is_one_of_three_for_all_names(scope):
    with pytest.raises(OptionError, match=r"^scope "):
        merge(vectors(), ties, scope=scope)


@pytest.mark.parametrize("given", [1, 3])
def test_a_misspelt_option_is_an_error_naming_the_close_one_and_all(given):
    with pytest.raises(
        OptionError, match=r"ties has no option 'densty' \(did you mean 'density'\?\); it takes density, "
    ):
        merge(vectors(given), ties, densty=0.2)


@pytest.mark.parametrize("option", ["at", "topk_cuts"])
def test_what_the_engine_hands_in_is_no_option(option):
    with pytest.raises(OptionError, match=f"topk has no option '{option}'"):
        vectors()[0].map(topk, density=0.5, **{option: None})


def test_an_option_that_is_needed_is_asked_for():
    with pytest.raises(OptionError, match="dare needs the option 'seed'; give it as seed="):
        merge(vectors(), dare, density=0.5)


@pytest.mark.parametrize(
    ("rule", "options"),
    [(dare, {"density": {"encoder.*": 0.5}, "seed": 1}), (weighted, {"weights": {"encoder.*": [1, 2, 3]}})],
)
def test_an_option_that_is_needed_is_asked_for_where_no_pattern_covers_a_name(rule, options):
    with pytest.raises(OptionError, match=r"(density|weights).*'head\.weight'"):
        merge(vectors(), rule, **options)


def test_a_rule_that_takes_anything_is_given_anything():
    seen: dict[str, Any] = {}
    vectors()[0].map(lambda x, **options: seen.update(options) or x.clone(), one=1, two={"*": 2})
    assert seen == {"one": 1, "two": 2}


def test_side_inputs_are_looked_up_by_name_in_a_list_of_mappings():
    def scaled(stack: Tensor, gram: list[Tensor]) -> Tensor:
        return sum(x * g for x, g in zip(stack, gram, strict=True))

    given = vectors(2)
    gram = [{name: torch.tensor(float(i + len(name))) for name in [*SHAPES, "more"]} for i in range(2)]
    found = merge(given, scaled, gram=gram)
    for name in SHAPES:
        torch.testing.assert_close(found[name], given[0][name] * len(name) + given[1][name] * (len(name) + 1))


def test_weights_may_vary_by_name():
    given = vectors()
    found = merge(given, weighted, weights={"head.*": [1, 0, 0], "*": [0, 0, 1]})
    assert_same(found, {name: given[0 if name.startswith("head") else 2][name] for name in SHAPES})


def test_a_vector_of_signs_is_a_side_input():
    given = vectors()
    signs = merge(given, elect)
    assert_same(merge(given, disjoint_mean, signs=signs), merge(given, ties))


# errors


def broken(x: Tensor) -> Tensor:
    return x / (1 // 0)


def test_an_error_inside_a_rule_tells_the_tensor_its_shape_dtype_and_device():
    with pytest.raises(ZeroDivisionError, match="zero") as caught:
        merge(vectors(), broken)
    assert caught.value.__notes__ == ["while merging 'encoder.weight', stack (3, 40, 30) float32 on cpu"]
    with pytest.raises(ZeroDivisionError, match="zero") as caught:
        TaskVector({"bias": torch.ones(3, dtype=torch.float64)}).map(broken)
    assert caught.value.__notes__ == ["while mapping 'bias', tensor (3,) float64 on cpu"]


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (lambda stack: stack.sum(), r"the shape \(40, 30\) here; this one returned \(\)"),
        (lambda stack: stack, r"the shape \(40, 30\) here; this one returned \(3, 40, 30\)"),
        (lambda stack: stack.median(0), "returned median"),
        (lambda _: None, "returned NoneType"),
        (lambda stack: [stack[0]], "returned list"),
        (lambda stack: stack[0] * 1j, "real numbers"),
    ],
)
def test_a_result_that_is_not_one_real_tensor_of_the_right_shape_is_an_error(result, message):
    with pytest.raises(RuleError, match=message) as caught:
        merge(vectors(), result)
    assert "while merging 'encoder.weight'" in caught.value.__notes__[0]


def test_nothing_to_merge_is_an_error():
    with pytest.raises(DegenerateError, match="nothing to merge"):
        merge([], mean)


def test_inputs_that_do_not_match_are_an_error_before_any_rule_is_called():
    with pytest.raises(MismatchError, match=r"'x' is \(2,\) in vector 0 and \(3,\) in vector 1"):
        merge([TaskVector({"x": torch.ones(n)}) for n in (2, 3)], broken)
    with pytest.raises(MismatchError, match="only in vector 1"):
        merge([TaskVector({"x": torch.ones(2)}), TaskVector({"x": torch.ones(2), "y": torch.ones(2)})], broken)


def test_vectors_and_plain_weights_do_not_mix():
    with pytest.raises(OptionError, match=r"TaskVector\.between"):
        merge([TaskVector(tensors(0)), tensors(1)], mean)


def test_inputs_on_several_devices_are_an_error_naming_them():
    here, there = vectors(2)
    with pytest.raises(MismatchError, match=r"'encoder.weight' lies on cpu, meta; say where to compute with device="):
        merge([here, there.to("meta")], mean)


def test_the_device_asked_for_is_where_the_result_is():
    found = merge(vectors(2), mean, device="meta")
    assert {x.device.type for x in found.values()} == {"meta"}
    assert {name: tuple(x.shape) for name, x in found.items()} == SHAPES


# dtypes


def test_half_precision_weights_are_merged_in_float32_and_rounded_once():
    models = [tensors(seed, dtype=torch.bfloat16) for seed in range(3)]
    dtypes = Witness(middle)

    def rule(stack: Tensor) -> Tensor:
        assert stack.dtype == torch.float32
        return dtypes(stack) / 3

    wide = merge([{name: x.float() for name, x in model.items()} for model in models], rule)
    assert_same(merge(models, rule), {name: x.bfloat16() for name, x in wide.items()})
    assert_same(
        merge(models, mean), {n: torch.stack([m[n].float() for m in models]).mean(0).bfloat16() for n in SHAPES}
    )


def test_float64_stays_and_widens_what_it_meets():
    double = [tensors(seed, dtype=torch.float64) for seed in range(2)]
    assert {x.dtype for x in merge(double, mean).values()} == {torch.float64}
    assert {x.dtype for x in merge([double[0], tensors(1)], mean).values()} == {torch.float64}
    assert {x.dtype for x in merge([double[0], tensors(1)], middle).values()} == {torch.float64}


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        ((torch.bfloat16, torch.float16), torch.float32),
        ((torch.bfloat16, torch.float32), torch.float32),
        ((torch.float16, torch.float16), torch.float16),
    ],
)
def test_different_dtypes_give_the_one_that_holds_both(dtypes, expected):
    found = merge([tensors(seed, dtype=dtype) for seed, dtype in enumerate(dtypes)], mean)
    assert {x.dtype for x in found.values()} == {expected}


def test_one_statistic_over_two_widths_is_an_error():
    v = TaskVector({"a": torch.ones(3), "b": torch.ones(3, dtype=torch.float64)})
    with pytest.raises(DtypeError, match=r"'b' is float64 and others are not.*scope='tensor'"):
        v.map(topk, density=0.5)
    assert [int(x.count_nonzero()) for x in v.map(topk, density=0.5, scope="tensor").values()] == [2, 2]


def test_a_result_of_another_dtype_is_cast():
    assert vectors()[0].map(lambda x: x > 0)["head.weight"].dtype == torch.float32


# results are new tensors, inputs stay as they are


@pytest.mark.parametrize("leaf", [lambda x: x, lambda x: x.view_as(x), lambda x: x.detach()])
def test_a_leaf_that_returns_its_input_gives_a_new_tensor(leaf):
    v = vectors()[0]
    assert all(v.map(leaf)[name].data_ptr() != v[name].data_ptr() for name in SHAPES)


def test_a_rule_that_returns_one_of_the_stack_does_not_keep_the_stack():
    found = merge(vectors(), lambda stack: stack[0])
    assert {n: x.untyped_storage().nbytes() for n, x in found.items()} == {
        n: 4 * math.prod(s) for n, s in SHAPES.items()
    }


def test_a_leaf_that_works_in_place_does_not_change_the_vector():
    v = vectors()[0]
    assert_same(v.map(lambda x: x.mul_(2)), 2 * vectors()[0])
    assert_same(v, vectors()[0])


def test_no_gradient_is_kept():
    w = torch.ones(3, requires_grad=True)
    v = TaskVector({"w": w})
    for found in (v.map(lambda x: x * 2), v.map(topk, density=0.5), merge([v, v], mean), merge([v, v], middle)):
        assert not found["w"].requires_grad


# a measured drop draws once


@pytest.mark.parametrize(("rule", "options"), [(dare, {}), (della, {"epsilon": 0.2})])
def test_what_survived_a_measured_drop_is_told_to_the_second_pass(rule, options, monkeypatch):
    given = vectors(2, shapes={"b": (3, BLOCK // 2 + 5), "a": (7,)})
    drawn, bits = [], Place.bits
    monkeypatch.setattr(
        Place, "bits", lambda at, seed, like: drawn.append((seed, at.key, at.start)) or bits(at, seed, like)
    )
    once = merge(given, rule, density=0.4, seed=1, rescale=None, **options)
    pieces, drawn = len(drawn), []
    measured = merge(given, rule, density=0.4, seed=1, rescale="l1", **options)
    assert len(drawn) == len(set(drawn)) == pieces > 4
    assert once["a"].count_nonzero() == measured["a"].count_nonzero()


def test_an_empty_tensor_has_nothing_to_restore():
    assert drop(torch.empty(0), 0.5, seed=0, rescale="l1").shape == (0,)
    assert merge([TaskVector({"w": torch.empty(0, 3)})] * 2, dare, density=0.5, seed=0, rescale="l1")["w"].shape == (
        0,
        3,
    )


def test_survivors_are_told_once_for_their_own_piece_and_to_no_other_process():
    x = torch.tensor([1.0, -2.0, 3.0])
    mask = torch.tensor([True, False, True])
    part = part_of(x, mask, Place(1, 3))
    assert (part.before, part.after) == (6, 4)
    known = Measured(1.5, dict(part.bits))
    assert known.mask(x, Place(1, 0)) is None
    assert torch.equal(known.mask(x, Place(1, 3)), mask)
    assert known.mask(x, Place(1, 3)) is None
    assert Measured(1.5, dict(part.bits)).mask(x[:2], Place(1, 3)) is None
    sent = pickle.loads(pickle.dumps(Measured(1.5, dict(part.bits))))
    assert (sent.factor, sent.mask(x, Place(1, 3))) == (1.5, None)
    assert pickle.loads(pickle.dumps(part)).bits == {}


@pytest.mark.parametrize(("density", "waits"), [(1.0, False), (0.5, True)])
def test_what_survives_is_held_for_all_tensors_only_where_a_rule_reads_all_of_them_first(density, waits, monkeypatch):
    taken, made = list[str](), sparsify.part_of
    monkeypatch.setattr(sparsify, "part_of", lambda *args: taken.append("drop") or made(*args))
    dropped = [v.map(drop, density=0.5, seed=i, rescale="l1") for i, v in enumerate(streamed(vectors()))]
    merged = merge(dropped, ties, density=density)
    first = next(iter(merged))
    assert merged[first].shape == SHAPES[first]
    assert len(taken) == 3 * (len(SHAPES) if waits else 1)


# lazy in, lazy out


STREAMABLE: list[tuple[Callable[..., Tensor], dict[str, Any]]] = [
    (ties, {"density": 0.3}),
    (ties, {"density": 0.3, "scope": "row", "zero": "positive"}),
    (ties, {"density": 0.3, "zero": "majority", "weights": [1, 2, 3], "weighted_vote": True}),
    (dare, {"density": 0.3, "seed": 1, "rescale": "l1"}),
    (della, {"density": 0.4, "epsilon": 0.2, "seed": 1}),
    (della, {"density": 0.4, "epsilon": 0.2, "seed": 1, "rescale": "l1"}),
    (merges.breadcrumbs, {"density": 0.3, "outliers": 0.1}),
    (model_stock, {"scope": "global"}),
    (model_stock, {}),
    (model_stock, {"scope": "row"}),
    (merges.karcher, {}),
    (merges.pcb, {"density": 0.3}),
    (merges.pcb, {"density": 0.3, "scope": "tensor"}),
    (merges.sce, {"density": 0.3}),
    (merges.consensus_ties, {"density": 0.3}),
    (merges.localize_and_stitch, {"density": 0.3}),
    (middle, {}),
]


@pytest.mark.parametrize(("rule", "options"), STREAMABLE)
def test_a_lazy_result_has_the_same_bits_whole_and_in_any_runs(rule, options):
    shapes = {"b": (3, BLOCK // 2 + 5), "a": (7,), "c": (), "none": (0, 4)}
    given = vectors(3, shapes=shapes)
    expected = merge(given, rule, **options)
    result = merge(streamed(given), rule, **options)
    assert isinstance(result, TaskVector)
    assert result.is_lazy
    assert_same(result, expected)
    flat = expected["b"].flatten()
    assert isinstance(result.tensors, Lazy)
    ends = [0, 1, 1000, BLOCK - 1, BLOCK, BLOCK + 3, len(flat)]
    for start, stop in [*itertools.pairwise(ends), (5, 5), (0, BLOCK), (BLOCK // 2, len(flat) - 1)]:
        assert same_bits(entries_of(result.source, "b", start, stop), flat[start:stop])


@pytest.mark.parametrize("scope", ["global", "tensor"])
def test_measures_of_a_lazy_merge_take_its_own_statistics_first(scope):
    """A statistic of a rule inside a statistic, over one name, over two, and for a single element."""
    given = vectors()
    eager = merge(given, ties, density=0.3, scope=scope)
    merged = merge(streamed(given), ties, density=0.3, scope=scope)
    assert merged.is_lazy
    assert float(merged.norm()) == float(eager.norm())
    again, expected = (merge([v, v], ties, density=0.5, scope=scope) for v in (merged, eager))
    assert entries_of(again.source, "head.weight", 1, 2) == expected["head.weight"].reshape(-1)[1]
    assert_same(dict(again), dict(expected))


def test_one_lazy_input_makes_the_result_lazy():
    given = vectors(2)
    mixed = merge([given[0], *streamed(given[1:])], mean)
    assert mixed.is_lazy
    assert_same(mixed, merge(given, mean))


def test_nothing_is_read_before_it_is_asked_for():
    def forbidden(name: str, *_: int) -> Tensor:
        raise AssertionError(f"read {name}")

    source = TaskVector(lazy({name: torch.empty(shape, device="meta") for name, shape in SHAPES.items()}, forbidden))
    result = merge([source, source], ties, density=0.3).map(middle_of_one)
    assert {name: tuple(x.shape) for name, x in result.source.specs.items()} == SHAPES
    with pytest.raises(AssertionError, match="read encoder"):
        result["encoder.weight"]


def middle_of_one(x: Tensor) -> Tensor:
    return x - x.median()


@pytest.mark.parametrize(
    ("leaf", "options"),
    [(topk, {"density": 0.3}), (band, {"density": 0.3, "outliers": 0.1}), (drop, {"density": 0.5, "seed": 1}),
     (rank_drop, {"density": 0.5, "epsilon": 0.2, "seed": 1}), (middle_of_one, {})],
)  # fmt: skip
def test_rules_on_rules_give_the_same_bits_lazily(leaf, options):
    given = vectors(2, shapes={"a": (3, BLOCK // 2 + 5), "b": (4,)})
    chains = [[v.map(leaf, **options).map(middle_of_one) * 2 for v in start] for start in (given, streamed(given))]
    expected, found = (merge(chain, ties, density=0.5) for chain in chains)
    assert_same(found, expected)


def test_a_whole_read_computes_an_unmarked_rule_once():
    leaf = Witness(torch.neg)
    result = TaskVector(lazy({"x": torch.randn(5, BLOCK)})).map(leaf)
    assert result.source.grain("x") == 5 * BLOCK
    result["x"]
    assert len(leaf.shapes) == 1


def test_a_rule_on_an_unmarked_rule_reads_it_once_where_it_is_read_in_its_grain(monkeypatch):
    monkeypatch.setattr(pieces, "CHUNK", BLOCK)
    leaf = Witness(torch.neg)
    result = TaskVector(lazy({"x": torch.randn(5, BLOCK)})).map(leaf).map(sparsify.above, threshold=1.0)
    assert result.source.grain("x") == 5 * BLOCK
    result["x"]
    assert len(leaf.shapes) == 1


def test_marked_rules_have_the_grain_of_a_block_or_of_whole_rows():
    v = TaskVector(lazy({"x": torch.randn(100, 1000)}))
    grains = [v.map(topk, density=0.3, **how).source.grain("x") for how in ({}, {"scope": "row"})]
    assert grains == [BLOCK, BLOCK // 1000 * 1000]


def test_large_tensors_are_read_in_parts():
    longest = 0

    def reader(_: str, start: int, stop: int) -> Tensor:
        nonlocal longest
        longest = max(longest, stop - start)
        return torch.ones(stop - start)

    entries = 5 * CHUNK // 2 + 5
    source = TaskVector(lazy({"x": torch.empty(entries, device="meta")}, reader))
    found = merge([source, source], ties, density=0.5)
    assert int(found["x"].count_nonzero()) == round(0.5 * entries)
    assert longest == BLOCK


def test_what_several_vectors_share_is_computed_once_for_a_block():
    reads: list[str] = []

    def reader(name: str, start: int, stop: int) -> Tensor:
        reads.append(name)
        return torch.ones(stop - start)

    base = lazy({"x": torch.empty(5, device="meta")}, reader)
    tuned = [lazy({"x": torch.full((5,), float(i))}) for i in range(4)]
    given = [TaskVector.between(base, t) for t in tuned]
    result = sum(given).apply(base)
    reads.clear()
    assert result["x"].tolist() == [1 + sum(i - 1 for i in range(4))] * 5
    assert reads == ["x"]


@pytest.mark.parametrize("size", [7, 64, 10_000])
def test_the_bits_of_our_rules_do_not_depend_on_the_size_of_a_block(size, monkeypatch):
    given = vectors(8, shapes={"a": (5, 30), "b": (13,)})
    options = [{key: value for key, value in how.items() if key != "weights"} for _, how in STREAMABLE]
    cases = [(rule, how) for (rule, _), how in zip(STREAMABLE, options, strict=True)]
    expected = [merge(given, rule, **how) for rule, how in cases]
    monkeypatch.setattr(pieces, "BLOCK", size)
    for (rule, how), wanted in zip(cases, expected, strict=True):
        found = merge(given, rule, **how)
        if how.get("rescale") == "l1" or rule is model_stock:  # float64 sums are cut at blocks, which never change
            assert found.allclose(wanted, rtol=1e-6)
        else:
            assert_same(found, wanted)


# other processes and threads


LOG: list[str] = []


def counting(n: int, entries: int) -> Any:
    LOG.append("taken")
    return float((yield from over(block_sums))[0])


@runs("element", counting)
def centred(x: Tensor, *, scope: str = "global", at: Place = HERE) -> Tensor:
    assert scope == "global"
    return x - at.take(counting, x[None])


def test_a_lazy_result_pickles_with_its_global_statistic_taken_once_before():
    LOG.clear()
    result = TaskVector(lazy(tensors(0))).map(centred)
    assert LOG == []
    sent = [pickle.loads(pickle.dumps(result)) for _ in range(2)]
    assert LOG == ["taken"]
    expected = TaskVector(tensors(0)).map(centred)
    LOG.clear()
    for again in sent:
        assert_same(again, expected)
    assert LOG == []


def test_a_lazy_result_of_empty_tensors_pickles():
    result = TaskVector(lazy({"x": torch.empty(0, 3)})).map(topk, density=0.5)
    assert pickle.loads(pickle.dumps(result))["x"].shape == (0, 3)


@pytest.mark.parametrize(("rule", "options"), STREAMABLE)
def test_pickled_work_gives_the_same_bits(rule, options):
    again = pickle.loads(pickle.dumps(merge(streamed(vectors()), rule, **options)))
    assert_same(again, merge(vectors(), rule, **options))


@pytest.mark.parametrize(("rule", "options"), STREAMABLE)
def test_threads_of_torch_do_not_change_the_bits(rule, options):
    shapes = {"b": (3, BLOCK // 2 + 5), "a": (7,), "c": (300, 200)}
    given = vectors(3, shapes=shapes)
    expected = merge(given, rule, **options)
    torch.set_num_threads(2)
    try:
        assert_same(merge(given, rule, **options), expected)
        assert_same(merge(streamed(given), rule, **options), expected)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


def test_a_thread_begun_after_a_merge_has_as_many_threads_of_torch_as_before():
    """Sums set one thread in the worker that takes them, which torch would give to threads begun later."""
    found: list[int] = []
    torch.set_num_threads(2)
    try:
        merge(streamed(vectors(3, shapes={"a": (BLOCK,)})), dare, density=0.5, seed=0, rescale="l1")["a"]
        later = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
        later.start()
        later.join()
    finally:
        torch.set_num_threads(1)
    assert found == [2]


def test_an_error_in_a_thread_comes_back_with_its_note():
    @runs("element")
    def breaks(stack: Tensor) -> Tensor:
        return stack[0] / (1 // 0)

    torch.set_num_threads(2)
    try:
        with pytest.raises(ZeroDivisionError) as caught:
            merge(vectors(shapes={"x": (3, BLOCK)}), breaks)
        assert "while merging 'x'" in caught.value.__notes__[0]
    finally:
        torch.set_num_threads(1)


def test_functions_without_a_mark_are_called_in_the_callers_thread_one_by_one():
    seen: set[int] = set()

    def noted(stack: Tensor) -> Tensor:
        seen.add(threading.get_ident())
        return stack[0].clone()

    torch.set_num_threads(2)
    try:
        merge(vectors(shapes={"x": (3, BLOCK), "y": (BLOCK,)}), noted)
    finally:
        torch.set_num_threads(1)
    assert seen == {threading.get_ident()}


def test_threads_that_read_one_lazy_result_get_the_same_bits():
    given = vectors(shapes=dict.fromkeys("abcdef", (50, 40)))
    result, found = merge(streamed(given), ties, density=0.3), dict[str, Tensor]()

    def pull(names: str) -> None:
        found.update({name: result[name] for name in names})

    workers = [threading.Thread(target=pull, args=(names,)) for names in ("abc", "fed")]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert_same({name: found[name] for name in "abcdef"}, merge(given, ties, density=0.3))


# mappings that are read


def test_a_lazy_mapping_knows_its_names_and_shapes_without_reading():
    source = lazy(tensors(0))
    assert list(source) == list(SHAPES)
    assert len(source) == 4
    assert "head.scale" in source
    assert "tail" not in source
    assert repr(source) == "Lazy(4 tensors, 1,361 entries)"
    with pytest.raises(KeyError, match=r"no tensor 'tail' here; there are 'encoder.weight'"):
        source["tail"]


def test_a_mapping_of_no_tensors_gives_one():
    for source in (Memory({}), lazy({}).source):
        assert collect(lift([source], torch.neg, {}, stacked=False), []) == {}


def test_sources_that_are_wide_in_different_names_are_merged_in_the_wider_dtype():
    g = torch.Generator().manual_seed(0)
    pair = [{n: torch.randn(500, generator=g).double() for n in "xy"} for _ in range(2)]
    mixed = [{"x": pair[0]["x"], "y": pair[0]["y"].float()}, {"x": pair[1]["x"].float(), "y": pair[1]["y"]}]
    wide = [{n: x.double() for n, x in model.items()} for model in mixed]
    found, expected = (merge([TaskVector(m) for m in models], ties, density=0.5) for models in (mixed, wide))
    assert_same(found, expected)
    assert sum(int(x.count_nonzero()) for x in found.values()) < 900


@pytest.mark.parametrize("shape", [(400, 700), (3, 50, 60), (1, 5, 7000)])
def test_of_tensors_with_gaps_no_more_is_copied_than_is_read(shape):
    x = torch.randn(*shape[::-1]).permute(*range(len(shape))[::-1])
    assert not x.is_contiguous()
    source = Memory({"x": x})
    flat = x.flatten()
    for start, stop in ((0, 1), (17, 9000), (len(flat) - 5, len(flat)), (0, len(flat))):
        assert same_bits(entries_of(source, "x", start, min(stop, len(flat))), flat[start:stop])


def test_a_transposed_tensor_is_not_copied_whole_for_every_block(monkeypatch):
    copied: list[int] = []
    reshape = torch.Tensor.reshape

    def watched(x: Tensor, *shape: Any) -> Tensor:
        if not x.is_contiguous():
            copied.append(x.numel())
        return reshape(x, *shape)

    x = torch.randn(8 * BLOCK // 1000, 1000).T.contiguous().T
    v = TaskVector({"x": x})
    monkeypatch.setattr(torch.Tensor, "reshape", watched)
    v.map(sparsify.above, threshold=0.5)
    assert sum(copied) < 2 * x.numel()
