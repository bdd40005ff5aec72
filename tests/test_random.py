"""Random bits: a function of (seed, name, flat index) only, and random enough for masks."""

import hashlib
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from taskvec import TaskVector, merge
from taskvec._engine.random import _random_bits_anywhere, bernoulli, fold, key_of, normal, random_bits
from taskvec.merges import dare
from taskvec.rules import Place
from taskvec.sparsify import drop

CPU = torch.device("cpu")
WORD = 1 << 32


def bits(seed: int, name: str, start: int, count: int) -> Tensor:
    return random_bits(seed, key_of(name), start, count, CPU)


def chi_square(counts: Tensor) -> float:
    """In standard deviations from what even chances give."""
    expected = counts.sum() / counts.numel()
    free = counts.numel() - 1
    return float((((counts - expected) ** 2 / expected).sum() - free) / (2 * free) ** 0.5)


# the same for ever: a mask that changed would change published results silently


def test_the_first_bits_never_change():
    assert bits(0, "", 0, 4).tolist() == [663414292, -1415687114, -1600637614, 231348795]
    assert bits(7, "encoder.weight", 1000, 4).tolist() == [289821807, -2002177314, 1496372553, 1463909090]
    assert [fold(0, 1), fold(3, 0), fold(-1, -1)] == [7359998640416684799, 1150187422431486483, 4193050897753921253]
    assert key_of("w") == 2347026877809978270


def test_the_first_masks_never_change():
    kept = drop(torch.ones(24), 0.5, seed=1, rescale=None).int().tolist()
    assert "".join(map(str, kept)) == "100001100100100011110110"


def test_the_first_normal_numbers_never_change():
    assert normal([1, 2, 3], key_of("w"), 0, 3, CPU).tolist() == [
        0.5031619071960449,
        0.03502301871776581,
        0.7360444664955139,
    ]


def splitmix64(state: int) -> int:
    """The published mixer, on Python's integers."""
    z = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 % (1 << 64)
    z = (z ^ z >> 27) * 0x94D049BB133111EB % (1 << 64)
    return z ^ z >> 31


@given(st.integers(0, 1 << 40), st.integers(), st.integers(0, (1 << 64) - 1))
def test_the_bits_are_those_of_the_published_generator(index, seed, key):
    begin = int.from_bytes(hashlib.blake2b(f"{seed}/{key}".encode(), digest_size=8).digest(), "little")
    word = splitmix64((begin + (index // 2 + 1) * 0x9E3779B97F4A7C15) % (1 << 64))
    assert int(random_bits(seed, key, index, 1, CPU)) % WORD == (word >> 32 * (index % 2)) % WORD


@given(st.integers(0, 1 << 40), st.integers(), st.integers(0, 3000))
def test_the_bits_of_other_devices_are_the_same(start, seed, count):
    assert torch.equal(_random_bits_anywhere(seed, 5, start, count, CPU), random_bits(seed, 5, start, count, CPU))


# a function of the index, however it is cut


@given(
    start=st.integers(0, 1 << 17) | st.integers(WORD - 100, WORD + 100) | st.integers(0, 1 << 40),
    cuts=st.lists(st.integers(0, 3000), max_size=5),
)
def test_bits_are_the_same_for_any_start_and_cut(start, cuts):
    whole = bits(5, "w", start, 3000)
    ends = sorted({0, 3000, *cuts})
    pieces = [bits(5, "w", start + a, b - a) for a, b in itertools.pairwise(ends)]
    assert torch.equal(torch.cat(pieces), whole)


def test_no_bits_are_asked_for():
    assert bits(0, "w", 7, 0).shape == (0,)


def test_beyond_two_to_the_32_the_bits_are_others():
    first = bits(0, "w", 0, 1000)
    for start in (WORD, 2 * WORD, 1 << 40):
        assert int((bits(0, "w", start, 1000) == first).sum()) <= 1


def test_any_integer_is_a_seed():
    seeds = [0, -1, 1 << 31, -(1 << 63), 1 << 100]
    assert len({tuple(bits(seed, "w", 0, 4).tolist()) for seed in seeds}) == len(seeds)


def test_fold_gives_seeds_that_torch_and_we_take():
    folded = [fold(seed, i) for seed in range(-50, 50) for i in range(50)]
    assert len(set(folded)) == len(folded)
    assert all(0 <= seed < 1 << 63 for seed in folded)


# random enough

COUNT = 1 << 16


@pytest.mark.parametrize("shift", [0, 8, 16, 24])
def test_every_byte_is_uniform(shift):
    counts = torch.bincount((bits(0, "w", 0, COUNT) >> shift) & 0xFF, minlength=256).double()
    assert abs(chi_square(counts)) < 4


def others(how: str) -> Tensor:
    """Bits that differ from those of (0, "w", 0) in the seed, the name, the index, or the fold."""
    seed, name, start = {
        "seed": (1, "w", 0),
        "name": (0, "v", 0),
        "index": (0, "w", 1),
        "stride": (0, "w", 1 << 15),
        "fold": (fold(0, 1), "w", 0),
    }[how]
    return bits(seed, name, start, COUNT)


@pytest.mark.parametrize("how", ["seed", "name", "index", "stride", "fold"])
def test_masks_that_differ_in_one_thing_are_independent(how):
    left, right = bits(0, "w", 0, COUNT), others(how)
    for own, other in ((0, 0), (28, 28), (28, 0)):  # lowest bits, highest bits, and the one against the other
        pairs = torch.bincount(((left >> own) & 0xF) * 16 + ((right >> other) & 0xF), minlength=256).double()
        assert abs(chi_square(pairs)) < 4


def test_the_chi_square_can_fail():
    left = bits(0, "w", 0, COUNT)
    same = torch.bincount((left & 0xF) * 17, minlength=256).double()
    assert chi_square(same) > 100
    assert chi_square(torch.full((256,), 256.0).double()) < -5  # too even is suspicious too


@pytest.mark.parametrize("probability", [0.0, 0.001, 0.2, 0.5, 0.999, 1.0])
def test_bernoulli_has_its_mean(probability):
    count = 1 << 18
    mean = float(bernoulli(bits(3, "w", 0, count), probability).double().mean())
    assert abs(mean - probability) <= 4 * (probability * (1 - probability) / count) ** 0.5


def test_bernoulli_is_certain_at_its_ends_for_any_bits():
    ends = torch.tensor([-(1 << 31), -1, 0, (1 << 31) - 1], dtype=torch.int32)
    assert bernoulli(ends, 1.0).all()
    assert not bernoulli(ends, 0.0).any()


def test_more_probable_masks_contain_less_probable_ones():
    some = bits(3, "w", 0, COUNT)
    assert bool((bernoulli(some, 0.2) <= bernoulli(some, 0.3)).all())


def test_normal_numbers_have_mean_0_variance_1_and_do_not_follow_the_start():
    count = 1 << 17
    x = normal([1, 2, 3], 0, 0, count, CPU)
    assert abs(float(x.mean())) < 4 / count**0.5
    assert abs(float(x.var()) - 1) < 4 * (2 / count) ** 0.5
    assert torch.equal(normal([1, 2, 3], 0, 1000, 50, CPU), x[1000:1050])


# places


@given(st.integers(0, 40), st.integers(0, 40))
def test_a_place_gives_a_piece_the_bits_it_has_in_the_whole(a, b):
    a, b = sorted((a, b))
    like = torch.zeros(5, 8)
    whole = Place(9).bits(4, like).flatten()
    assert torch.equal(Place(9, a).bits(4, like.flatten()[a:b]), whole[a:b])
    assert torch.equal(Place(9, a).draw(4, 0.3, like.flatten()[a:b]), bernoulli(whole[a:b], 0.3))


def test_a_mask_depends_on_the_name_and_on_nothing_around_it():
    x = torch.ones(200)
    masks = [
        TaskVector(tensors).map(drop, density=0.5, seed=1)[name]
        for tensors, name in (({"a": x}, "a"), ({"0": x, "a": x, "b": x}, "a"), ({"b": x}, "b"))
    ]
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])


def test_a_mask_depends_on_the_flat_index_and_not_on_the_shape():
    flat = drop(torch.ones(60), 0.5, seed=1)
    assert torch.equal(drop(torch.ones(3, 4, 5), 0.5, seed=1).flatten(), flat)


def test_each_vector_of_a_stack_gets_a_mask_of_its_own():
    x = torch.ones(1000)
    first, second = (drop(x, 0.5, seed=fold(1, i), at=Place(key_of("w"))) for i in (0, 1))
    merged = merge([{"w": x}, {"w": x}], dare, density=0.5, seed=1)["w"]
    assert torch.equal(merged, first + second)
    assert 400 < int((first != second).sum()) < 600
