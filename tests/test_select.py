"""The exact k-th magnitude: against a sort, through every branch of the search, and with ties taken fairly."""

import sys
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small import lazy
from torch import Tensor

from taskvec import TaskVector, testing
from taskvec._engine import pieces, select
from taskvec._engine.ranks import ranked_places
from taskvec._engine.select import EVERYTHING, LOW, NOTHING, Cuts, kept, largest, magnitudes, turns_of
from taskvec.rules import HERE, Place
from taskvec.sparsify import band, topk

COUNT = 3000
SIZES = [(1, 4, 3000), (7, 16, 3000), (100, 64, 150), (1 << 16, 64, 3000)]  # collected at once, in a run, in a block


def made_small(monkeypatch: pytest.MonkeyPatch, small: int, run: int, block: int) -> None:
    """Three thousand entries are many: they must be sampled, in short runs."""
    monkeypatch.setattr(select, "SMALL", small)
    monkeypatch.setattr(pieces, "RUN", run)
    monkeypatch.setattr(pieces, "BLOCK", block)


def cuts(n: int, entries: int, keep: int, with_equals: bool = False):
    return (yield from largest(n, entries, keep, with_equals=with_equals))


def trimmed(x: Tensor, keep: int, *, with_equals: bool = False) -> Tensor:
    return HERE.take(cuts, x[None], keep, with_equals).keep(x[None], HERE)[0]


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
    "double, all equal": lambda: torch.full((COUNT,), -0.25, dtype=torch.float64),
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
        check_kept(x, trimmed(x, keep), keep)
        check_kept(x, TaskVector({"x": x}).map(topk, density=keep / COUNT)["x"], keep)


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
    ranked = select._ranked

    def watched(parts, rank, bracket, known):
        found = ranked(parts, rank, bracket, known)
        low, high, _, _ = bracket
        seen.add("everything" if (low, high) == (0, select.TOP) else "one key" if low == high else "bracket")
        seen.add("double" if parts[0].wide else "single")
        return found

    monkeypatch.setattr(select, "_ranked", watched)
    for sizes in SIZES:
        made_small(monkeypatch, *sizes)
        for make in DATA.values():
            TaskVector({"x": make()}).map(topk, density=0.2)
    assert seen == {"everything", "one key", "bracket", "double", "single"}


@pytest.mark.parametrize("lie", [lambda keys: keys // 3, lambda keys: keys + keys // 8], ids=["low", "high"])
@pytest.mark.parametrize("kind", ["random", "few values", "double", "double with ties"])
def test_a_sample_that_lies_costs_passes_and_nothing_else(kind, lie, monkeypatch):
    made_small(monkeypatch, 1, 16, 3000)
    sample, ranked, missed = select._sample, select._ranked, []

    def watched(parts, rank, bracket, known):
        found = ranked(parts, rank, bracket, known)
        missed.append(isinstance(found, select.Range) and not bracket.low <= found.low <= bracket.high)
        return found

    monkeypatch.setattr(select, "_sample", lambda *args: [lie(keys) for keys in sample(*args)])
    monkeypatch.setattr(select, "_ranked", watched)
    x = DATA[kind]()
    check_kept(x, trimmed(x, 600), 600)
    assert any(missed)


@pytest.mark.parametrize("kind", list(DATA))
@pytest.mark.parametrize("held", [20, 100])
def test_never_more_keys_are_collected_than_are_held(kind, held, monkeypatch):
    made_small(monkeypatch, 1, 16, 300)
    x = DATA[kind]()
    wanted, collected, ranked = trimmed(x, 600), [], select._ranked

    def watched(parts, rank, bracket, known):
        most = held if bracket.share == 1 else bracket.share * known.inside
        collected.append(sum(len(own) // 8 for part in parts for own in part.keys or ()))
        assert collected[-1] <= most + select.FEW * len(parts)
        # what is larger lies among what a block frees, and 137 kB of each block are lost
        assert all(sys.getsizeof(own) <= 512 for part in parts for own in (part.bins, *(part.keys or ())))
        found = ranked(parts, rank, bracket, known)
        if isinstance(found, select.Range):
            assert found.high - found.low < known.high - known.low
            assert 0 < found.inside <= known.inside
        return found

    monkeypatch.setattr(select, "HELD", held)
    monkeypatch.setattr(select, "FEW", 1)
    monkeypatch.setattr(select, "SAMPLE", 100)
    monkeypatch.setattr(select, "_ranked", watched)
    for lie in (lambda keys: keys, lambda keys: keys // 3, lambda keys: keys * 0):
        sample = select._sample
        with monkeypatch.context() as lying:
            lying.setattr(select, "_sample", lambda *args, told=lie, f=sample: [told(keys) for keys in f(*args)])
            result = trimmed(x, 600)
        assert torch.equal(result, wanted)
    check_kept(x, wanted, 600)
    assert max(collected) > 0 or kind in ("constant", "zeros")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_other_devices_take_the_same_keys(dtype, monkeypatch):
    """What runs where there is no numpy, run here: the same cut, and the same order of rows."""
    x, at = half_differences().to(dtype), Place(12345, 1 << 20)
    wanted = HERE.take(cuts, x[None], 700).keys, ranked_places(x.reshape(30, 100), at)
    own_turns, own_magnitudes = select.turns_of, select.magnitudes

    def turns_elsewhere(at: Place, count: int, _: torch.device) -> Tensor:
        return (torch.arange(count) * select.TURN + ((at.start * select.TURN + at.key) & LOW)) & LOW

    def magnitudes_elsewhere(x: Tensor) -> Tensor:
        return torch.from_numpy(own_magnitudes(x).astype("int64"))

    assert torch.equal(turns_elsewhere(at, 50, x.device), torch.from_numpy(own_turns(at, 50, x.device).astype("int64")))
    monkeypatch.setattr(select, "turns_of", turns_elsewhere)
    monkeypatch.setattr(select, "magnitudes", magnitudes_elsewhere)
    found = HERE.take(cuts, x[None], 700).keys, ranked_places(x.reshape(30, 100), at)
    assert found[0] == wanted[0]
    assert torch.equal(found[1], wanted[1])


# ties


@pytest.mark.parametrize("small", [1, 1 << 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_of_equal_magnitudes_exactly_as_many_are_kept_as_are_missing(dtype, small, monkeypatch):
    made_small(monkeypatch, small, 64, 100)
    x = torch.full((1000,), -2.0, dtype=dtype)
    x[::10] = 5.0
    result = topk(x, 0.35)
    assert int((result == 5).sum()) == 100
    assert int((result == -2).sum()) == 250


def test_all_equal_magnitudes_are_kept_where_asked_for():
    x = torch.tensor([1.0, -2.0, 2.0, 2.0, 3.0, 0.5])
    assert trimmed(x, 2, with_equals=True).tolist() == [0, -2, 2, 2, 3, 0]


@pytest.mark.parametrize("keep", [1, 2, 3, 100, 299, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_entries_of_several_names_with_one_turn_are_told_apart_by_the_name(dtype, keep):
    """Keys of names that agree in their lower half give their entries the same turns."""
    places = [Place(7 + (i << 32)) for i in range(3)]
    blocks = [torch.ones(1, 100, dtype=dtype) for _ in places]
    passes = largest(1, 300, keep)
    try:
        look = next(passes)
        while True:
            look = passes.send([look.f(x, at, *look.args) for x, at in zip(blocks, places, strict=True)])
    except StopIteration as end:
        found = [end.value.keep(x, at) for x, at in zip(blocks, places, strict=True)]
    assert sum(int(x.count_nonzero()) for x in found) == keep


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


@pytest.mark.parametrize("small", [50, 1 << 16])
@pytest.mark.parametrize("size", [17, 256, 100_000])
def test_the_choice_does_not_depend_on_the_blocks(size, small, monkeypatch):
    tensors = {"b": half_differences().reshape(50, 60), "a": few_values(), "c": torch.ones(())}
    wanted = TaskVector(tensors).map(topk, density=0.4)
    made_small(monkeypatch, small, 16, size)
    for source in (tensors, lazy(tensors)):
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
    assert torch.equal(trimmed(x, 4), torch.cat([at, below * 0, at, below * 0]))


@given(testing.tensors())
def test_everything_and_nothing_are_new_tensors(x):
    for key, wanted in ((EVERYTHING, x), (NOTHING, torch.zeros_like(x))):
        found = Cuts((key,)).keep(x[None], HERE)[0]
        assert testing.same_bits(found, wanted)
        assert found.data_ptr() != x.data_ptr()


@given(testing.tensors(dtype=torch.float32) | testing.tensors(dtype=torch.float64))
def test_the_order_of_magnitude_bits_is_the_order_of_magnitudes(x):
    bits, sizes = torch.from_numpy(magnitudes(x.flatten()).astype("int64")), x.abs().flatten()
    assert torch.equal(bits[:, None] < bits, sizes[:, None] < sizes)


@given(testing.tensors())
def test_ranked_places_go_from_the_smallest_to_the_largest(x):
    rows = x.reshape(len(x) if x.ndim > 1 else 1, -1)
    order = ranked_places(rows, HERE)
    assert torch.equal(order.sort(1).values, torch.arange(rows.numel()).reshape(rows.shape))
    assert torch.equal(rows.abs().take(order), rows.abs().sort(1).values)


def test_equal_entries_of_a_row_come_in_the_order_of_their_turns():
    rows, at = torch.ones(2, 64, dtype=torch.float64), Place(5, 128)
    turns = torch.from_numpy(turns_of(at, 128, rows.device).astype("int64")).reshape(2, 64)
    first = torch.tensor([[0], [64]])
    assert torch.equal(ranked_places(rows, at), turns.argsort(1) + first)
    single = ranked_places(rows.float(), at)  # the lowest bits of a turn make room for the column
    assert torch.equal(single, (turns >> 6).argsort(dim=1, stable=True) + first)


def test_turns_of_a_tensor_all_differ_and_are_spread_evenly():
    turns = torch.from_numpy(turns_of(Place(99), 1 << 16, torch.device("cpu")).astype("int64"))
    assert len(turns.unique()) == 1 << 16
    assert torch.bincount(turns >> 24, minlength=256).sub(256).abs().max() <= 4


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
