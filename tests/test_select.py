"""The exact k-th magnitude: against a sort, through every branch of the search, and with ties taken fairly."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from taskvec import TaskVector, _lazy, _select, rules, testing
from taskvec._lazy import Lazy
from taskvec._select import EVERYTHING, NOTHING, cut_largest, kept, magnitude_bits, sorted_rows
from taskvec.rules import Place, over
from taskvec.sparsify import band, topk

COUNT = 3000
SIZES = [(1, 1, 3000), (7, 16, 3000), (100, 64, 150)]  # held, sampled, in a block


def made_small(monkeypatch: pytest.MonkeyPatch, held: int, sampled: int, block: int) -> None:
    """Three thousand entries are many: not all can be held, nor all blocks sampled."""
    monkeypatch.setattr(_select, "HELD", held)
    monkeypatch.setattr(_select, "SAMPLE", sampled)
    monkeypatch.setattr(_select, "BLOCKS_SAMPLED", 4)
    monkeypatch.setattr(_select, "BLOCK", block)
    for module in (rules, _lazy):
        monkeypatch.setattr(module, "block_size", lambda _: block)


def random(seed: int = 0, count: int = COUNT) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed))


def few_values() -> Tensor:
    return (random() * 2).round()


def one_value_and_others() -> Tensor:
    others = torch.tensor([0.0, 1e-30, 2.0, 1e30, 5.0, 0.1])
    return torch.cat([torch.ones(COUNT - len(others)), others])


def half_differences() -> Tensor:
    """What fine-tuning in bfloat16 leaves: few distinct magnitudes, many of them equal."""
    base = random(1).bfloat16()
    return (base.float() + 1e-3 * random(2)).bfloat16().float() - base.float()


# fmt: off
DATA: dict[str, Callable[[], Tensor]] = {
    "random": random,
    "half-precision differences": half_differences,
    "few values": few_values,
    "constant": lambda: torch.full((COUNT,), -0.25),
    "two values": lambda: torch.where(random() > 0, 1.0, 2.0),
    "zeros": lambda: torch.zeros(COUNT),
    "mostly zeros": lambda: random() * (random(3) > 2),
    "denormals": lambda: (random() * 1000).int().float() * 2.0**-149,
    "huge and tiny": lambda: random() * 10.0 ** (random(5) * 10).clamp(-37, 37),
    "sorted": lambda: random().abs().sort().values,
    "mostly equal, ends far": one_value_and_others,
    "double": lambda: random().double() + 1e-12 * random(7).double(),
    "double with ties": lambda: few_values().double(),
}
# fmt: on


def check_kept(x: Tensor, result: Tensor, keep: int) -> None:
    """Exactly `keep` are kept, unchanged, and none of them is smaller than one that is not."""
    mask = result != 0  # that an entry of 0 is kept cannot be seen
    assert torch.equal(result[mask], x[mask])
    wanted = x.abs().sort(descending=True).values[:keep]
    assert torch.equal(x[mask].abs().sort(descending=True).values, wanted[wanted > 0])


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("kind", DATA)
def test_a_cut_keeps_the_largest_and_exactly_so_many(kind, sizes, monkeypatch):
    made_small(monkeypatch, *sizes)
    x = DATA[kind]()
    for keep in (0, 1, 600, COUNT - 1, COUNT):
        check_kept(x, cut_largest(over(x, stacked=False), keep).keep(x, Place()), keep)


@pytest.mark.parametrize("spoil", [lambda x: x.clone(), lambda x: -x, lambda x: x.flip(0), lambda x: x * 0])
def test_the_check_of_a_cut_can_fail(spoil):
    x = random()
    result = topk(x, 0.2)
    check_kept(x, result, 600)
    result[:50] = spoil(x[:50])
    with pytest.raises(AssertionError):
        check_kept(x, result, 600)


def test_every_branch_of_the_search_has_run(monkeypatch):
    """The cases above would prove less if some never came up."""
    seen: set[str] = set()
    guess, count = _select._guess, _select._count

    def watched_guess(total: Any, keys: Any, low: int, high: int, fraction: float, inside: int) -> tuple[int, int]:
        found = guess(total, keys, low, high, fraction, inside)
        halves = {(low + (high - low) // 2 + 1, high): "upper half", (low, (low + high) // 2): "lower half"}
        seen.add(halves.get(found, "narrower" if found != (low, high) else "no narrower"))
        return found

    def watched_count(total: Any, keys: Any, low: int, high: int) -> Any:
        found = count(total, keys, low, high)
        seen.add("held" if found[3] is not None else "one value" if low == high else "too many")
        return found

    monkeypatch.setattr(_select, "_guess", watched_guess)
    monkeypatch.setattr(_select, "_count", watched_count)
    for sizes in SIZES:
        made_small(monkeypatch, *sizes)
        for make in DATA.values():
            x = make()
            cut_largest(over(x, stacked=False), 600)
    assert seen == {"held", "one value", "too many", "narrower", "upper half", "lower half"}


# ties


@pytest.mark.parametrize("held", [1, 1 << 21])
def test_of_equal_magnitudes_exactly_as_many_are_kept_as_are_missing(held, monkeypatch):
    made_small(monkeypatch, held, 64, 100)
    x = torch.full((1000,), -2.0)
    x[::10] = 5.0
    result = topk(x, 0.35)
    assert int((result == 5).sum()) == 100
    assert int((result == -2).sum()) == 250


def test_all_equal_magnitudes_are_kept_where_asked_for():
    x = torch.tensor([1.0, -2.0, 2.0, 2.0, 3.0, 0.5])
    cut = cut_largest(over(x, stacked=False), 2, with_equals=True)
    assert cut.keep(x, Place()).tolist() == [0, -2, 2, 2, 3, 0]


def test_equal_magnitudes_are_taken_evenly_along_a_tensor_and_among_tensors():
    names = [f"layers.{i}.weight" for i in range(6)]
    v = TaskVector({name: torch.ones(2000) for name in names}).map(topk, density=0.25)
    parts = [x.reshape(4, 500).sum(1) for x in v.values()]
    assert float(sum(part.sum() for part in parts)) == 3000
    room = 5 * (500 * 0.25 * 0.75) ** 0.5
    assert all(abs(float(entries) - 125) < room for part in parts for entries in part)


def test_the_choice_among_equals_depends_on_the_name():
    kept_of = [TaskVector({name: torch.ones(200)}).map(topk, density=0.5)[name] for name in "ab"]
    assert not torch.equal(*kept_of)


def pieces_of(tensors: dict[str, Tensor], name: str, start: int, stop: int) -> Tensor:
    return tensors[name].reshape(-1)[start:stop]


@pytest.mark.parametrize("held", [50, 1 << 21])
@pytest.mark.parametrize("size", [17, 256, 100_000])
def test_the_choice_does_not_depend_on_the_blocks(size, held, monkeypatch):
    tensors = {"b": half_differences().reshape(50, 60), "a": few_values(), "c": torch.ones(())}
    wanted = TaskVector(tensors).map(topk, density=0.4)
    made_small(monkeypatch, held, 100, size)
    streamed = Lazy({name: x.to("meta") for name, x in tensors.items()}, partial(pieces_of, tensors))
    for source in (tensors, streamed):
        found = TaskVector(source).map(topk, density=0.4)
        assert all(testing.same_bits(found[name], wanted[name]) for name in tensors)
    assert sum(int(x.count_nonzero()) for x in wanted.values()) == round(0.4 * 6001)


# counts


@pytest.mark.parametrize(
    ("density", "entries", "count", "expected"),
    [
        (0.5, 5, "round", 2),  # Python's round: to even
        (0.5, 7, "round", 4),
        (0.2, 82, "round", 16),
        (0.99, 100, "round", 99),
        (0.5, 5, "floor", 2),
        (0.7, 10, "floor", 7),
        (0.99, 10, "floor", 9),
        (0.2, 82, "reference", 17),
        (0.0, 82, "reference", 1),
        (1.0, 82, "reference", 82),
        (1.0, 3, "floor", 3),
        (0.0, 3, "round", 0),
        (0.4, 0, "round", 0),
    ],
)
def test_how_many_a_density_keeps(density, entries, count, expected):
    assert kept(density, entries, count) == expected


@given(testing.tensors(), st.floats(0, 1))
def test_topk_keeps_exactly_the_rounded_number(x, density):
    x = torch.where(x == 0, 3.0, x).to(x.dtype)
    assert int(topk(x, density).count_nonzero()) == round(density * x.numel())
    row = x[0].numel() if x.ndim > 1 else x.numel()
    assert int(topk(x, density, scope="row").count_nonzero()) == round(density * row) * (x.numel() // row)


@given(testing.tensors(), st.floats(0, 1), st.floats(0, 1))
def test_a_band_drops_and_keeps_exactly_the_rounded_numbers(x, density, outliers):
    x = torch.where(x == 0, 3.0, x).to(x.dtype)
    dropped = round(outliers * x.numel())
    left = min(round(density * x.numel()), x.numel() - dropped)
    result = band(x, density, outliers, scope="tensor")
    assert int(result.count_nonzero()) == left
    outside = topk(x, outliers)
    assert not bool((outside * result).any())


# cuts


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("threshold", [0.5, 2.0**-20, 1.0, 3.0])
def test_a_cut_keeps_a_threshold_and_drops_the_next_smaller_number(threshold, dtype):
    at = torch.tensor([threshold, -threshold], dtype=dtype)
    below = torch.nextafter(at, torch.zeros((), dtype=dtype))
    x = torch.cat([at, below, at, below])
    kept = cut_largest(over(x, stacked=False), 4).keep(x, Place())
    assert torch.equal(kept, torch.cat([at, below * 0, at, below * 0]))


@given(testing.tensors())
def test_everything_and_nothing_are_new_tensors(x):
    for cut, wanted in ((EVERYTHING, x), (NOTHING, torch.zeros_like(x))):
        found = cut.keep(x, Place())
        assert testing.same_bits(found, wanted)
        assert found.data_ptr() != x.data_ptr()


@given(testing.tensors())
def test_the_order_of_magnitude_bits_is_the_order_of_magnitudes(x):
    bits, sizes = magnitude_bits(x).flatten(), x.abs().flatten()
    assert torch.equal(bits[:, None] < bits, sizes[:, None] < sizes)


@given(testing.tensors())
def test_sorted_rows_go_from_the_largest_to_the_smallest(x):
    rows = x.reshape(len(x) if x.ndim > 1 else 1, -1)
    order = sorted_rows(x, Place())
    assert torch.equal(order.sort(1).values, torch.arange(rows.shape[1]).expand_as(order))
    assert torch.equal(rows.abs().gather(1, order), rows.abs().sort(1, descending=True).values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_entries_of_a_row_come_in_the_random_order_of_their_place(dtype):
    rows = torch.ones(2, 50, dtype=dtype)
    order = Place(5, 100).order(rows == 1).reshape(2, 50)
    assert torch.equal(sorted_rows(rows, Place(5, 100)), order.argsort(1))


# NaN and inf


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("how", [{}, {"scope": "tensor"}, {"count": "reference"}])
def test_a_number_that_is_not_finite_is_an_error_that_names_its_tensor(value, dtype, how):
    tensors = {"a": torch.ones(5, dtype=dtype), "b.bad": torch.tensor([1.0, value], dtype=dtype)}
    with pytest.raises(ValueError, match=r"'b\.bad' holds NaN or inf"):
        TaskVector(tensors).map(topk, density=0.5, **how)


def test_one_in_a_row_is_an_error_that_names_its_tensor():
    tensors = {"a": torch.ones(5), "b.bad": torch.tensor([1.0, float("nan")])}
    with pytest.raises(ValueError, match="NaN or inf") as caught:
        TaskVector(tensors).map(topk, density=0.5, scope="row")
    assert "'b.bad'" in caught.value.__notes__[0]


def test_where_everything_is_kept_it_flows_through():
    assert TaskVector({"a": torch.tensor([float("nan"), 1.0])}).map(topk, density=1)["a"].isnan().tolist() == [
        True,
        False,
    ]
