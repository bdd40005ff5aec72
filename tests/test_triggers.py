"""Triggers and poisoning against naive loops, and what a seed draws, as golden numbers: those must not change."""

import math

import pytest
import torch
from torch import Tensor

from taskvec._engine.random import random_bits
from taskvec.attacks import poison
from taskvec.attacks.triggers import blend, dynamic, physical, sinusoid, solid_patch, stamp, warp, warp_field
from taskvec.errors import MismatchError, RangeError

WIDE = (-1.0, 1.0)

# what the seeds 7 draw, seen once
POISONED = [1, 5, 13, 15]
DRAWN = [1, 3, 3, 1, 3, 2, 2, 3, 0, 2, 2, 2]
FIELD = [-1.0, -1.0, -0.024998, -0.747519, 0.876132, -0.852522]
SEEN = [-0.952542, -0.292711, 0.014565, -0.138661, -0.236, -0.509053]


def pictures(n: int = 3, side: int = 6, low: float = -1.0) -> Tensor:
    random = torch.Generator().manual_seed(0)
    return low + (1 - low) * torch.rand(n, 2, side, side, generator=random, dtype=torch.float64)


# what a seed draws


def test_a_seed_poisons_these_rows():
    labels = torch.tensor([0, 1] * 8)
    _, relabelled, chosen = poison(
        torch.zeros(16, 1, 1, 1), labels, trigger=lambda x: x + 1, target=0, fraction=0.5, seed=7
    )
    assert chosen.nonzero().flatten().tolist() == POISONED
    assert relabelled[chosen].eq(0).all()


def test_a_fraction_of_one_poisons_all_candidates_and_more_than_one_is_refused():
    images, labels = torch.zeros(4, 1, 1, 1), torch.tensor([0, 1, 1, 2])
    poisoned, _, chosen = poison(images, labels, trigger=lambda x: x + 1, target=0, fraction=1, seed=0)
    assert chosen.tolist() == [False, True, True, True]
    assert poisoned.flatten().tolist() == [0, 1, 1, 1]
    with pytest.raises(RangeError, match=r"fraction must be in \[0, 1\]; got 1.5"):
        poison(images, labels, trigger=lambda x: x, target=0, fraction=1.5, seed=0)


def test_a_seed_draws_these_patches():
    patches = [solid_patch(1, (1, 4, 4), place=(0, i)) for i in range(4)]
    stamped = dynamic(torch.zeros(12, 1, 4, 4), patches, seed=7)
    assert stamped[:, 0, 0].argmax(1).tolist() == DRAWN
    below = dynamic(torch.full((12, 1, 4, 4), -1.0), patches, seed=7, pixel_range=WIDE)
    assert below[:, 0, 0].argmax(1).tolist() == DRAWN
    assert below.min() == -1


def test_a_seed_draws_this_field():
    assert warp_field(3, seed=7, strength=0.5)[0].flatten().tolist() == pytest.approx(FIELD, abs=1e-6)
    assert warp_field(1, seed=7, control=1).shape == (1, 1, 2)


def test_a_seed_draws_this_view():
    seen = physical(pictures(1), solid_patch(2, (2, 6, 6)), seed=7, pixel_range=WIDE)
    assert seen[0, 0, 2].tolist() == pytest.approx(SEEN, abs=1e-6)


# loops


@pytest.mark.parametrize("low", [0.0, -1.0])
def test_a_sine_wave_is_its_naive_loop(low):
    images = pictures(low=low)
    found = sinusoid(images, amplitude=0.4, frequency=2, pixel_range=(low, 1.0))
    for i in range(3):
        for column in range(6):
            wave = math.sin(2 * math.pi * column * 2 / 6) * 0.4 * (1 - low)
            for before, after in zip(images[i, 1, :, column].tolist(), found[i, 1, :, column].tolist(), strict=True):
                assert after == pytest.approx(min(1, max(low, before + wave)))
    assert (found == low).any()
    assert (found == 1).any()
    assert torch.equal(sinusoid(images[0], amplitude=0.4, frequency=2, pixel_range=(low, 1.0)), found[0])


def test_a_blend_knows_the_range_of_pixels():
    images, pattern = pictures(), torch.full((2, 6, 6), -0.5)
    assert torch.allclose(blend(images, pattern, opacity=0.3, pixel_range=WIDE), 0.7 * images - 0.15)
    assert torch.equal(stamp(images, solid_patch(6, (2, 6, 6)), pixel_range=WIDE), torch.ones_like(images))


def sampled(image: Tensor, row: float, column: float) -> float:
    """The value between four pixels; outside there is nothing."""
    found = 0.0
    for i in (math.floor(row), math.floor(row) + 1):
        for j in (math.floor(column), math.floor(column) + 1):
            if 0 <= i < len(image) and 0 <= j < len(image):
                found += float(image[i, j]) * (1 - abs(row - i)) * (1 - abs(column - j))
    return found


@pytest.mark.parametrize("low", [0.0, -1.0])
@pytest.mark.parametrize(
    "how",
    [
        {"degrees": 40, "shift": 0, "scale": (1, 1), "brightness": 0},
        {"degrees": 0, "shift": 0.3, "scale": (1, 1), "brightness": 0},
        {"degrees": 0, "shift": 0, "scale": (0.5, 1.5), "brightness": 0},
        {"degrees": 0, "shift": 0, "scale": (1, 1), "brightness": 0.5},
        {"degrees": 20, "shift": 0.1, "scale": (0.7, 1.1), "brightness": 0.2},
    ],
    ids=["turned", "shifted", "scaled", "lit", "all"],
)
def test_a_physical_trigger_is_its_naive_loop(how, low):
    """Each pixel looks where it comes from: turned back, at another scale, shifted."""
    images, patch = pictures(low=low), solid_patch(2, (2, 6, 6))
    draws = draws_of(seed=5, n=3)
    found = physical(images, patch, seed=5, pixel_range=(low, 1.0), **how)
    stamped = stamp(images, patch, pixel_range=(low, 1.0)) - low
    for i in range(3):
        turn, size, right, down, light = (float(line[i]) for line in draws)
        angle = math.radians(turn * how["degrees"])
        ratio = how["scale"][0] + (size + 1) / 2 * (how["scale"][1] - how["scale"][0])
        for row in range(6):
            for column in range(6):
                x, y = (2 * column + 1) / 6 - 1, (2 * row + 1) / 6 - 1
                u = (math.cos(angle) * x - math.sin(angle) * y) / ratio + right * 2 * how["shift"]
                v = (math.sin(angle) * x + math.cos(angle) * y) / ratio + down * 2 * how["shift"]
                value = sampled(stamped[i, 0], ((v + 1) * 6 - 1) / 2, ((u + 1) * 6 - 1) / 2)
                expected = min(1, max(low, low + value * (1 + how["brightness"] * light)))
                assert float(found[i, 0, row, column]) == pytest.approx(expected, abs=1e-6)


def draws_of(seed: int, n: int) -> Tensor:
    """The five numbers in [-1, 1) for each of n images."""
    return random_bits(seed, 0, 0, 5 * n, torch.device("cpu")).double().reshape(5, n) / 2**31


def test_warping_is_its_naive_loop_for_one_field_or_one_per_image():
    images = pictures()
    fields = torch.stack([warp_field(6, seed=seed, strength=2.0).double() for seed in range(3)])
    found = warp(images, fields)
    for i in range(3):
        for row in range(6):
            for column in range(6):
                x, y = fields[i, row, column].tolist()
                expected = sampled(images[i, 1], (y + 1) * 5 / 2, (x + 1) * 5 / 2)
                assert float(found[i, 1, row, column]) == pytest.approx(expected)
    assert torch.equal(warp(images[1], fields[1]), found[1])
    assert torch.equal(warp(images, fields[0])[0], found[0])
    with pytest.raises(MismatchError, match=r"images must be \(6, 6\)"):
        warp(torch.zeros(6, 1, 6, 5), fields[:1])


@pytest.mark.parametrize("wrong", [{"side": 0}, {"side": 4, "control": 0}])
def test_a_field_of_no_size_is_refused(wrong):
    with pytest.raises(RangeError, match="side and control must be positive"):
        warp_field(seed=0, **wrong)
