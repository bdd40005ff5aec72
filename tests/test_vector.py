"""TaskVector: algebra, measures, in and out."""

import copy
import pickle
import warnings

import numpy as np
import pytest
import torch
from small import Held, lazy
from torch import nn

from taskvec import TaskVector, load, merge, presets, rename, rounding_loss, save, select
from taskvec._engine.lazy import Lazy
from taskvec.errors import (
    AliasError,
    DegenerateError,
    DtypeError,
    MismatchError,
    MissingError,
    NonFiniteError,
    OptionError,
    RangeError,
)
from taskvec.merges import dare, mean, ties
from taskvec.sparsify import rank_drop, topk


def model(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {
        "encoder.0.weight": torch.randn(6, 4, generator=g).to(dtype),
        "encoder.0.bias": torch.randn(6, generator=g).to(dtype),
        "norm.running_mean": torch.randn(6, generator=g),
        "norm.num_batches_tracked": torch.tensor(seed),
        "head.weight": torch.randn(3, 6, generator=g).to(dtype),
        "scale": torch.randn((), generator=g).to(dtype),
        "empty": torch.empty(0, 4),
    }


def lazily(tensors: dict[str, torch.Tensor]) -> tuple[Lazy, Held]:
    counter = Held(tensors)
    return lazy(tensors, counter), counter


def vector(seed: int = 1) -> TaskVector:
    return TaskVector.between(model(0), model(seed))


def same(left, right) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


# between


def test_between_takes_learned_floating_point_entries_only():
    v = vector()
    assert list(v) == ["encoder.0.weight", "encoder.0.bias", "head.weight", "scale", "empty"]
    assert torch.equal(v["head.weight"], model(1)["head.weight"] - model(0)["head.weight"])


def test_include_and_exclude_choose_by_pattern_and_may_not_match_nothing():
    between = TaskVector.between
    assert list(between(model(0), model(1), include="encoder.*")) == ["encoder.0.weight", "encoder.0.bias"]
    assert list(between(model(0), model(1), include=["*.running_mean", "scale"])) == ["norm.running_mean", "scale"]
    assert "head.weight" not in between(model(0), model(1), exclude="head.*")
    with pytest.raises(MissingError, match=r"'heads\.\*' matches no name of either model; base has .*tuned has"):
        between(model(0), model(1), exclude="heads.*")


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_differences_of_half_precision_are_kept_in_float32(dtype, expected):
    v = TaskVector.between(model(0, dtype), model(1, dtype))
    assert v["head.weight"].dtype == expected
    applied = v.apply(model(0, dtype))
    assert applied["head.weight"].dtype == dtype
    assert torch.allclose(applied["head.weight"], model(1, dtype)["head.weight"], atol=1e-6)


def test_between_can_be_told_a_dtype():
    assert TaskVector.between(model(0), model(1), dtype=torch.float64)["scale"].dtype == torch.float64


def test_names_that_differ_are_listed_with_the_prefix_that_would_mend_them():
    prefixed = {f"module.{name}": tensor for name, tensor in model(1).items()}
    with pytest.raises(MismatchError, match=r"begin with 'module\.'"):
        TaskVector.between(model(0), prefixed)
    missing = {name: tensor for name, tensor in model(1).items() if name != "scale"}
    with pytest.raises(MismatchError, match="'scale' is only in base"):
        TaskVector.between(model(0), missing)


def test_shapes_that_differ_are_named():
    other = model(1) | {"head.weight": torch.zeros(5, 6)}
    with pytest.raises(MismatchError, match=r"'head.weight' is \(3, 6\) in base and \(5, 6\) in tuned"):
        TaskVector.between(model(0), other)


def test_models_that_share_storage_are_refused_and_load_copies():
    module = nn.Linear(2, 2)
    base = dict(module.state_dict())
    with pytest.raises(AliasError, match="'weight'"):
        TaskVector.between(base, module.state_dict())
    copied = load(module)
    with torch.no_grad():
        module.weight += 1
    assert torch.allclose(TaskVector.between(copied, module.state_dict())["weight"], torch.ones(2, 2))


def test_a_module_is_refused_with_what_to_do():
    with pytest.raises(OptionError, match=r"load\(module\)"):
        TaskVector.between(nn.Linear(1, 1), nn.Linear(1, 1))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("tensor", "hint"),
    [
        (torch.zeros(2).to(torch.float8_e4m3fn), "bfloat16 or float32"),
        (torch.zeros(2, dtype=torch.complex64), "real and imaginary"),
    ],
)
def test_dtypes_without_arithmetic_are_refused_by_name(tensor, hint):
    with pytest.raises(DtypeError, match=hint) as caught:
        TaskVector.between({"odd": tensor}, {"odd": tensor.clone()})
    assert "'odd'" in str(caught.value)


def test_quantised_and_distributed_tensors_are_refused_by_name():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch announces their end, once
        quantised = torch.quantize_per_tensor(torch.zeros(2), 0.1, 0, torch.qint8)
    with pytest.raises(DtypeError, match="'q' is quantised"):
        TaskVector.between({"q": quantised}, {"q": quantised.clone()})

    class DTensor(torch.Tensor):
        pass

    distributed = torch.zeros(2).as_subclass(DTensor)
    with pytest.raises(DtypeError, match="DTensor"):
        TaskVector.between({"d": distributed}, {"d": torch.ones(2)})


def test_gradients_are_detached():
    base = {"w": torch.zeros(2, requires_grad=True)}
    assert not TaskVector.between(base, {"w": torch.ones(2, requires_grad=True)})["w"].requires_grad


def test_tied_weights_count_once_and_come_back_under_both_names():
    def tied(value: float) -> dict[str, torch.Tensor]:
        shared = torch.full((2, 2), value)
        return {"embed.weight": shared, "lm_head.weight": shared, "bias": torch.zeros(2)}

    v = TaskVector.between(tied(0.0), tied(1.0))
    assert list(v) == ["embed.weight", "bias"]
    applied = v.apply(tied(0.0), 0.5)
    assert applied["embed.weight"].eq(0.5).all()
    assert applied["lm_head.weight"].eq(0.5).all()
    renamed = v.rename(lambda name: f"m.{name}")
    assert renamed.meta["tied"] == '{"lm_head.weight": "m.embed.weight"}' or "m.embed.weight" in renamed.meta["tied"]


def test_weights_tied_in_one_model_only_both_count():
    shared = torch.zeros(2)
    v = TaskVector.between({"a": shared, "b": shared}, {"a": torch.ones(2), "b": torch.ones(2) * 2})
    assert list(v) == ["a", "b"]


# algebra


def test_algebra_is_that_of_vectors():
    a, b = vector(1), vector(2)
    assert (a + b).allclose(b + a)
    assert (a - b).allclose(a + -b)
    assert (2 * a).allclose(a + a)
    assert (a * 2 / 2).allclose(a)
    assert sum([a, b]).allclose(a + b)
    assert (a * np.float32(0.5)).allclose(a / 2)
    assert (np.float64(0.5) * a).allclose(a / 2)
    assert (a * torch.tensor(0.5)).allclose(a / 2)


def test_sum_of_one_is_not_the_one_itself():
    a = vector()
    total = sum([a])
    assert total is not a
    assert total["scale"].data_ptr() != a["scale"].data_ptr()


@pytest.mark.parametrize(
    "wrong", [lambda v: 3 + v, lambda v: v + 1, lambda v: v * v, lambda v: v * "2", lambda v: v / v]
)
def test_other_algebra_is_a_type_error(wrong):
    with pytest.raises(TypeError):
        wrong(vector())


def test_division_by_zero_is_refused():
    with pytest.raises(ZeroDivisionError):
        vector() / 0


def test_equality_is_identity_and_vectors_hash():
    a, b = vector(), vector()
    assert a != b
    assert a == a  # noqa: PLR0124 - identity is the claim
    assert len({a, b}) == 2


def test_vectors_of_different_bases_do_not_mix():
    a, b = TaskVector.between(model(0), model(1)), TaskVector.between(model(5), model(1))
    for mix in (lambda: a + b, lambda: a - b, lambda: a.dot(b), lambda: merge([a, b], mean)):
        with pytest.raises(MismatchError, match="different bases"):
            mix()
    assert (a + TaskVector(dict(b))).meta == {}


def test_gradients_flow_through_eager_algebra():
    w = torch.ones(2, requires_grad=True)
    (TaskVector({"w": w}) * 3)["w"].sum().backward()
    assert w.grad is not None
    assert w.grad.eq(3).all()


def test_select_rename_and_join():
    v = vector()
    encoder, rest = v.select("encoder.*"), v.select("head.*", "scale", "empty")
    assert same(encoder | rest, v)
    assert same(v.rename(str.upper).rename(str.lower), v)
    with pytest.raises(MismatchError, match="'scale' in both"):
        rest | v.select("scale")
    with pytest.raises(MissingError, match="matches no name"):
        v.select("decoder.*")
    with pytest.raises(MismatchError, match="two names become one"):
        v.rename(lambda _: "same")
    with pytest.raises(MissingError, match="no tensor 'nothing'"):
        v["nothing"]


# measures


def test_norm_dot_and_cosine_are_zero_d_float64_and_right():
    a, b = vector(1), vector(2)
    flat = [torch.cat([t.double().flatten() for t in v.values()]) for v in (a, b)]
    for value, expected in (
        (a.norm(), flat[0].norm()),
        (a.dot(b), flat[0] @ flat[1]),
        (a.cosine(b), torch.nn.functional.cosine_similarity(*flat, dim=0)),
    ):
        assert value.dtype == torch.float64
        assert value.ndim == 0
        assert torch.isclose(value, expected)


def test_cosine_with_a_zero_vector_is_an_error():
    with pytest.raises(DegenerateError, match="right vector is zero"):
        vector().cosine(vector() * 0)


def test_a_vector_of_nothing_has_norm_zero():
    assert TaskVector({"e": torch.empty(0)}).norm() == 0


def test_check_names_what_is_not_finite_and_statistics_refuse_it():
    broken = TaskVector({"fine": torch.ones(2), "bad": torch.tensor([1.0, float("nan"), float("inf")])})
    with pytest.raises(NonFiniteError, match="'bad': 1 NaN, 1 inf"):
        broken.check()
    with pytest.raises(NonFiniteError, match="'bad'"):
        broken.norm()
    with pytest.raises(NonFiniteError, match="'bad'"):
        broken.map(topk, density=0.5)
    assert broken.map(topk, density=1.0)["bad"].isnan().sum() == 1  # no statistic: it flows
    assert (broken + broken)["bad"].isnan().sum() == 1
    assert "not finite" in repr(broken)
    assert vector().check() is not None


def test_allclose_compares_and_refuses_other_names():
    a = vector()
    assert a.allclose(a * 1.0000001)
    assert not a.allclose(a * 1.1)
    with pytest.raises(MismatchError):
        a.allclose(a.select("scale"))


# apply


def test_apply_copies_what_the_vector_does_not_have():
    base = model(0)
    applied = vector().apply(base)
    assert list(applied) == list(base)
    assert torch.equal(applied["norm.running_mean"], base["norm.running_mean"])
    assert applied["norm.running_mean"].data_ptr() != base["norm.running_mean"].data_ptr()
    assert same(model(0), base)


def test_apply_takes_scales_by_pattern_and_wants_one_for_every_name():
    base, v = model(0), vector()
    applied = v.apply(base, {"head.weight": 0.0, "encoder.*": 1.0, "*": 0.5})
    assert torch.equal(applied["head.weight"], base["head.weight"])
    assert torch.allclose(applied["scale"], base["scale"] + 0.5 * v["scale"])
    with pytest.raises(MissingError, match="no scale for 'head.weight'"):
        v.apply(base, {"encoder.*": 1.0})
    with pytest.raises(RangeError, match="scale must be a number"):
        v.apply(base, "large")  # type: ignore[arg-type]


def test_gradients_flow_to_a_tensor_scale():
    scale = torch.tensor(0.3, requires_grad=True)
    applied = vector().apply(model(0), scale)
    sum(t.sum() for t in applied.values() if t.requires_grad).backward()
    expected = sum(t.sum() for t in vector().values())
    assert scale.grad is not None
    assert torch.isclose(scale.grad, expected)


def test_apply_refuses_names_the_base_does_not_have_and_other_shapes():
    with pytest.raises(MissingError, match="the base has no 'extra'"):
        TaskVector({"extra": torch.ones(1)}).apply(model(0))
    with pytest.raises(MismatchError, match="'scale'"):
        TaskVector({"scale": torch.ones(3)}).apply(model(0))


def test_rounding_loss_counts_what_a_coarse_dtype_loses():
    base = {"w": torch.ones(4, dtype=torch.bfloat16)}
    v = TaskVector({"w": torch.tensor([1e-4, 1e-4, 0.5, 0.0])})
    assert rounding_loss(v, base) == pytest.approx(2 / 3)
    assert rounding_loss(v, {"w": torch.ones(4)}) == 0
    assert rounding_loss(v * 0, base) == 0


def test_to_moves_and_rounds_and_copies():
    v = vector()
    half = v.to(dtype=torch.bfloat16)
    assert half["scale"].dtype == torch.bfloat16
    assert v.to("cpu")["scale"].data_ptr() != v["scale"].data_ptr()
    assert v.to("meta")["scale"].device.type == "meta"


# lazy


def test_lazy_inputs_give_the_same_bits_and_nothing_is_read_before_it_is_asked_for():
    (base, base_reads), (tuned, tuned_reads) = lazily(model(0)), lazily(model(1))
    v = TaskVector.between(base, tuned)
    after_opening = base_reads.reads
    result = ((v + v) * 0.5 - v / 4).select("*.weight").rename(str.upper).rename(str.lower)
    joined = result | v.select("scale")
    applied = joined.apply(base, 0.3)
    shown = [repr(joined), joined._repr_html_(), repr(applied), len(joined), "scale" in joined]
    assert "lazy" in shown[0]
    assert base_reads.reads == after_opening  # the base's fingerprint reads a few elements; nothing else does
    assert tuned_reads.reads == 0
    w = vector()
    eager = ((w + w) * 0.5 - w / 4).select("*.weight") | w.select("scale")
    assert same(dict(joined), dict(eager))
    assert same(dict(applied), eager.apply(model(0), 0.3))
    assert v.norm() == w.norm()
    assert v.dot(v) == w.dot(w)


def test_a_foreign_mapping_is_lazy_and_gives_the_same():
    class Foreign(dict[str, torch.Tensor]):
        pass

    from collections import UserDict

    base, tuned = UserDict(model(0)), UserDict(model(1))
    v = TaskVector.between(base, tuned)
    assert v.is_lazy
    assert same(dict(v), dict(vector()))
    assert not TaskVector.between(Foreign(model(0)), Foreign(model(1))).is_lazy


def test_vectors_pickle_and_copy():
    v = vector()
    for twin in (pickle.loads(pickle.dumps(v)), copy.deepcopy(v)):
        assert same(dict(twin), dict(v))
        assert twin.meta == v.meta
    base, tuned = (lazy(m) for m in (model(0), model(1)))
    merged = merge([TaskVector.between(base, tuned)], mean)
    assert same(dict(pickle.loads(pickle.dumps(merged))), dict(v))


def test_repr_tells_size_norm_dtype_and_device():
    assert (
        repr(TaskVector({"w": torch.tensor([3.0, 4.0])})) == "TaskVector(1 tensor, 2 entries, norm 5, float32 on cpu)"
    )
    assert repr(TaskVector({})) == "TaskVector(0 tensors, 0 entries, norm 0, no dtype on nowhere)"
    page = vector()._repr_html_()
    assert "encoder.0" in page
    assert "%" in page


def test_a_vector_of_integers_is_refused():
    with pytest.raises(DtypeError, match="'i' is torch.int64"):
        TaskVector({"i": torch.tensor([1])})


def test_merging_weights_keeps_what_is_not_weights_and_refuses_mixtures():
    models = [model(0, torch.bfloat16) | {"norm.num_batches_tracked": torch.tensor(7)} for _ in range(2)]
    models[1]["scale"] += 1
    merged = merge(models, mean)
    assert merged["norm.num_batches_tracked"] == 7
    assert merged["scale"].dtype == torch.bfloat16
    with pytest.raises(MismatchError, match="'norm.num_batches_tracked' is torch.int64"):
        merge([model(0), model(1)], mean)
    with pytest.raises(OptionError, match="task vectors with plain weights"):
        merge([vector(), model(0)], mean)  # type: ignore[list-item]
    with pytest.raises(DegenerateError, match="nothing to merge"):
        merge([], mean)
    with pytest.raises(MismatchError, match="only in vector 0"):
        merge([vector(), vector().select("scale")], mean)


# tied weights: a module has both names, a saved folder one


def module_like(value: float) -> dict[str, torch.Tensor]:
    shared = torch.full((2, 2), value)
    return {"embed.weight": shared, "lm_head.weight": shared, "bias": torch.zeros(2)}


def folder_like(value: float) -> dict[str, torch.Tensor]:
    return {"embed.weight": torch.full((2, 2), value), "bias": torch.zeros(2)}


SIDES = {"module": module_like, "folder": folder_like}


@pytest.mark.parametrize("kind", [dict, lazy])
@pytest.mark.parametrize("base", SIDES)
@pytest.mark.parametrize("tuned", SIDES)
@pytest.mark.parametrize("onto", SIDES)
def test_a_name_that_is_tied_in_one_side_and_absent_in_the_other_counts_as_tied(base, tuned, onto, kind):
    from taskvec._vectors.model import tied_names

    def made(side: str, value: float):
        model = SIDES[side](value)
        found = kind(model)
        if kind is lazy:
            found.tied = tied_names(model)
        return found

    v = TaskVector.between(made(base, 0.0), made(tuned, 1.0))
    assert list(v) == ["embed.weight", "bias"]
    applied = v.apply(made(onto, 5.0), 0.5)
    assert list(applied) == list(SIDES[onto](0.0))
    assert all(bool(applied[name].eq(5.5).all()) for name in applied if name != "bias")
    if kind is dict:
        assert applied.get("lm_head.weight", applied["embed.weight"]).eq(5.5).all()


def test_a_fingerprint_does_not_see_tied_duplicates():
    metas = [TaskVector.between(side(0.0), side(1.0)).meta for side in SIDES.values()]
    assert metas[0]["base.layout"] == metas[1]["base.layout"]
    assert metas[0]["base.values"] == metas[1]["base.values"]
    assert (
        (
            TaskVector.between(module_like(0.0), module_like(1.0))
            + TaskVector.between(folder_like(0.0), folder_like(2.0))
        )["embed.weight"]
        .eq(3)
        .all()
    )


def test_a_tied_model_that_is_saved_applied_and_loaded_into_its_module_keeps_its_head(tmp_path):
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.lm_head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
            self.lm_head.weight = self.embed.weight

    module = Tied()
    base = load(module)
    for i, model in enumerate((base, {name: w + 1 for name, w in base.items()})):
        save({name: w for name, w in model.items() if name != "lm_head.weight"}, tmp_path / f"{i}")
    v = TaskVector.between(load(tmp_path / "0"), load(tmp_path / "1"))
    module.load_state_dict(v.apply(base))
    assert torch.equal(module.lm_head.weight, base["embed.weight"] + 1)


# what is refused, and how it is said

VECTOR = TaskVector({"w": torch.ones(2, 2)})
MODEL = {"w": torch.zeros(2, 2)}


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: TaskVector.between("a", "b"),
            OptionError,
            r"base must be a mapping of tensors; got the text 'a'; use load\(",
        ),
        (lambda: VECTOR.apply("x.safetensors"), OptionError, r"the base must be .* use load\('x.safetensors'\)"),
        (
            lambda: TaskVector.between(MODEL, VECTOR),
            OptionError,
            r"tuned must be a model's weights; got a TaskVector; use vector.apply\(base\)",
        ),
        (
            lambda: TaskVector.between(VECTOR, MODEL),
            OptionError,
            "base must be a model's weights; got a TaskVector; use ",
        ),
        (lambda: VECTOR.apply(VECTOR), OptionError, "the base must be a model's weights; got a TaskVector; use "),
        (lambda: merge(VECTOR, ties), OptionError, r"inputs must be a list .* got one TaskVector; use \[vector\]"),
        (lambda: merge({"a": VECTOR}, ties), OptionError, r"got one dict; use list\(inputs.values\(\)\)"),
        (lambda: merge([VECTOR], "ties"), OptionError, r"merge\(\) must be given a function; got 'ties'; import it"),
        (lambda: merge([VECTOR], topk, density=0.5), OptionError, r"got topk; use it in vector.map"),
        (
            lambda: VECTOR.map(ties),
            OptionError,
            r"map\(\) must be given a function of one tensor; got ties; use it in merge",
        ),
        (lambda: VECTOR.map(presets.ties_peft), OptionError, "one tensor"),
        (lambda: VECTOR.cosine({"w": torch.ones(2, 2)}), OptionError, "other must be a TaskVector; got a dict"),
        (lambda: VECTOR.dot(MODEL), OptionError, "other must be a TaskVector"),
        (lambda: VECTOR.allclose(MODEL), OptionError, "other must be a TaskVector"),
        (
            lambda: TaskVector(nn.Linear(1, 1)),
            OptionError,
            r"tensors must be .* got a module \(Linear\); use load\(module\)",
        ),
        (lambda: TaskVector({"w": 3}), OptionError, "got int under 'w'"),
        (lambda: merge([MODEL, "b"], mean), OptionError, "input 1 must be a mapping of tensors; got the text 'b'"),
        (
            lambda: VECTOR.apply(MODEL, {"v*": 2.0, "*": 1.0}),
            MissingError,
            r"scale: 'v\*' matches no name of the vector",
        ),
        (lambda: merge([VECTOR], dare, density=0.5, seed=None), OptionError, "seed must be an integer; got None"),
        (lambda: merge([VECTOR], dare, density=0.5, seed=1.5), OptionError, "seed must be an integer; got 1.5"),
        (lambda: VECTOR.map(rank_drop, density=0.5, epsilon=0.1, seed=True), OptionError, "seed must be an integer"),
        (lambda: VECTOR.map(topk, density=torch.tensor(0.5)), RangeError, r"density must be a number.* use float\("),
        (lambda: merge([VECTOR], dare, density="0.5", seed=0), RangeError, "density must be a number"),
    ],
)
def test_a_call_that_cannot_be_meant_says_what_to_do(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_between_takes_keywords():
    found = TaskVector.between(base=MODEL, tuned={"w": torch.ones(2, 2)})
    assert found["w"].eq(1).all()


@pytest.mark.parametrize(
    "name",
    ["layer.0.q.lora_A.weight", "q.lora_B.default.weight", "e.lora_embedding_A", "x.hada_w1_a", "m.ia3_l.default"],
)
def test_factors_of_adapters_are_refused_by_name(name):
    factors = {name: torch.ones(2, 2)}
    calls = [
        lambda: TaskVector(factors),
        lambda: TaskVector.between(factors, {name: torch.zeros(2, 2)}),
        lambda: merge([factors, {name: torch.zeros(2, 2)}], mean),
    ]
    for call in calls:
        with pytest.raises(DtypeError, match=r"is a factor of an adapter.*load\(\) the adapter's folder"):
            call()
    assert list(TaskVector.between({**factors, **MODEL}, {**factors, "w": torch.ones(2, 2)}, exclude="*.*")) == ["w"]


def test_what_an_error_advises_to_exclude_can_be_excluded():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch announces their end, once
        quantised = torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)
    odd = {"q": quantised, "c": torch.ones(2, dtype=torch.complex64), "f": torch.ones(2).to(torch.float8_e4m3fn)}
    base, tuned = {**MODEL, **odd}, {"w": torch.ones(2, 2), **odd}
    for kind in (dict, lazy):
        v = TaskVector.between(kind(base), kind(tuned), exclude=["q", "c", "f"])
        applied = v.apply(base)
        assert list(v) == ["w"]
        assert applied["w"].eq(1).all()
        assert list(applied) == list(base)


def test_a_pattern_that_matches_in_one_model_counts_and_the_prefix_is_hinted_at():
    more = {**model(1), "extra.bias": torch.ones(1)}
    assert "scale" in TaskVector.between(model(0), more, exclude="extra.*")
    assert "scale" in TaskVector.between(more, model(0), exclude="extra.*")
    mostly = {f"module.{name}": tensor for name, tensor in model(1).items() if name != "scale"}
    with pytest.raises(MismatchError, match=r"begin with 'module\.': rename\(\)"):
        TaskVector.between(model(0), mostly)


def test_select_and_rename_are_functions_of_any_mapping(tmp_path):
    save(model(0), tmp_path / "m.safetensors")
    for mapping in (model(0), load(tmp_path / "m.safetensors"), vector()):
        part = rename(select(mapping, "encoder.*"), str.upper)
        assert list(part) == sorted(part, key=list(part).index)
        assert set(part) == {"ENCODER.0.WEIGHT", "ENCODER.0.BIAS"}
        assert torch.equal(part["ENCODER.0.BIAS"], mapping["encoder.0.bias"])
        assert isinstance(part, TaskVector) == isinstance(mapping, TaskVector)
        with pytest.raises(MissingError, match="matches no name"):
            select(mapping, "decoder.*")


def test_a_factor_takes_the_dtype_of_the_tensor(tmp_path):
    v = TaskVector({"logit_scale": torch.tensor(3.0), "w": torch.ones(2, dtype=torch.bfloat16)})
    for kind in (dict, lazy):
        w = TaskVector(kind(v)) / v.norm()
        assert {name: x.dtype for name, x in w.items()} == {"logit_scale": torch.float32, "w": torch.bfloat16}
        save(w, tmp_path / "w", overwrite=True)
        back = load(tmp_path / "w")
        assert float(back["logit_scale"]) == pytest.approx(3 / 11**0.5)
        assert same(dict(back), dict(w))


def test_a_lazy_vector_that_is_moved_says_so_and_merges_there():
    v = TaskVector(lazy(dict(vector()))).to("meta")
    assert v["scale"].device.type == "meta"
    merged = merge([v, v], mean)
    assert {merged.source.device(name).type for name in merged} == {"meta"}
    assert merged["scale"].device.type == "meta"


def test_keys_complete_and_vectors_share_their_names():
    assert vector()._ipython_key_completions_() == list(vector())
    assert lazy(model(0))._ipython_key_completions_() == list(model(0))
