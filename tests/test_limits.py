"""Ranges: their ends are accepted and what lies outside is refused. Labels: what is refused is named. Defaults."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from small import bv, weights
from torch import Tensor

from taskvec import TaskVector, defenses
from taskvec._engine.pieces import HERE
from taskvec._engine.totals import COLUMNS, pair_dots, sum64
from taskvec.attacks import (
    adversarial_crops,
    amplify,
    most_connected,
    optimise_patch,
    sparse_backdoor,
    trojan_trigger,
    universal_trigger,
)
from taskvec.attacks.triggers import physical, random_patch, solid_patch, stamp
from taskvec.calibration import adamerging, surgery
from taskvec.errors import OptionError, RangeError

BASE, MODEL, OTHER = ({n: x for n, x in weights(seed).items() if x.is_floating_point()} for seed in (1, 2, 3))
PROBE, SECOND = bv(4), bv(5)
IMAGES = torch.rand(3, 1, 4, 4, generator=torch.Generator().manual_seed(0))
PATCH = solid_patch(2, (1, 4, 4))


def crops(**how: Any) -> Tensor:
    return adversarial_crops(lambda x: x.flatten(1)[:, :3], IMAGES, seed=0, **({"count": 2, "steps": 1} | how))


def patched(**how: Any) -> Any:
    return optimise_patch(lambda x: x.mean(), IMAGES, PATCH, seed=0, **({"steps": 1, "lr": 0.1, "batch": 2} | how))


def learned_scales(**how: Any) -> Any:
    vectors = [TaskVector({"w": torch.ones(2)}), TaskVector({"w": torch.tensor([1.0, -1.0])})]
    loaders = {"task": lambda: iter([torch.ones(2, 2)])}
    return adamerging(lambda p, x, task: x * p["w"], {"w": torch.zeros(2)}, vectors, loaders, **how)


def adapter(**how: Any) -> Any:
    return surgery(lambda x: x, lambda x: x + 1, lambda: iter([IMAGES.reshape(16, 3) - 0.5]), **({"rank": 2} | how))


# the ends

ENDS: list[tuple[str, Callable[..., Any], dict[str, list[float]], dict[str, list[float]]]] = [
    ("mix", partial(defenses.mix, MODEL, BASE, seed=0), {"strength": [0, 1]}, {"strength": [-0.1, 1.1]}),
    (
        "cosine_gate",
        partial(defenses.cosine_gate, PROBE, SECOND),
        {"threshold": [-1, 1], "strength": [0, 1]},
        {"threshold": [-1.1, 1.1], "strength": [-0.1, 1.1]},
    ),
    (
        "purify",
        partial(defenses.purify, MODEL, BASE, [PROBE]),
        {"energy": [0.01, 1], "alignment": [-1, 1]},
        {"energy": [0, 1.1], "alignment": [-1.1, 1.1]},
    ),
    (
        "flagged",
        partial(defenses.flagged, [{i: float(i * i) for i in range(6)}]),
        {"threshold": [0.01]},
        {"threshold": [0, -1]},
    ),
    ("amplify", partial(amplify, PROBE, 2.0, clean=SECOND), {"max_norm_ratio": [1, 2]}, {"max_norm_ratio": [0.9]}),
    (
        "sparse_backdoor",
        partial(sparse_backdoor, [PROBE, SECOND], match_norm=False),
        {"density": [0.01, 1]},
        {"density": [-0.1, 1.1, 20]},
    ),
    ("crops", crops, {"count": [1], "batch": [1], "steps": [0]}, {"count": [0], "batch": [0], "steps": [-1]}),
    ("patch", patched, {"batch": [1], "steps": [1]}, {"batch": [0], "steps": [0], "lr": [0, -1]}),
    ("most_connected", partial(most_connected, torch.rand(4, 3)), {"count": [1, 4]}, {"count": [0, 5]}),
    ("adamerging", partial(learned_scales, steps=1), {"lr": [0.1]}, {"lr": [0, -1], "steps": [0]}),
    ("surgery", partial(adapter, steps=1), {"rank": [1], "lr": [0.1]}, {"rank": [0], "lr": [0], "steps": [0]}),
    ("stamp", partial(stamp, IMAGES, PATCH), {"opacity": [0, 1]}, {"opacity": [-0.1, 1.1]}),
]


def cases(which: int) -> list[Any]:
    return [
        pytest.param(f, {key: value}, id=f"{name}-{key}={value}")
        for name, f, *ranges in ENDS
        for key, values in ranges[which].items()
        for value in values
    ]


@pytest.mark.parametrize(("function", "how"), cases(0))
def test_the_end_of_a_range_is_accepted(function, how):
    function(**how)


@pytest.mark.parametrize(("function", "how"), cases(1))
def test_what_lies_outside_is_refused(function, how):
    with pytest.raises(RangeError, match=next(iter(how))):
        function(**how)


@pytest.mark.parametrize("size", [(0, 2), (2, 0), (5, 2), (2, 5)])
def test_a_patch_must_fit_in_both_directions(size):
    with pytest.raises(RangeError, match="size must fit"):
        random_patch(size, (1, 4, 4), seed=0)
    with pytest.raises(RangeError, match="place must keep the patch"):
        random_patch(2, (1, 4, 4), seed=0, place=(0, 3))
    with pytest.raises(RangeError, match="place must keep the patch"):
        random_patch(2, (1, 4, 4), seed=0, place=(3, 0))


def test_a_white_pixel_and_the_first_neuron_are_in_range():
    adversarial_crops(lambda x: x.flatten(1)[:, :3], torch.ones(1, 1, 4, 4), seed=0, count=2, steps=1)
    with pytest.raises(RangeError):
        adversarial_crops(lambda x: x.flatten(1)[:, :3], torch.full((1, 1, 4, 4), 1.5), seed=0, count=2)
    how = {"aim": 1.0, "seed": 0, "steps": 1}
    trojan_trigger(lambda x: x.flatten(1), IMAGES, PATCH, neurons=torch.tensor([0]), **how)
    for neuron in (-1, 16):
        with pytest.raises(RangeError, match="neurons"):
            trojan_trigger(lambda x: x.flatten(1), IMAGES, PATCH, neurons=torch.tensor([neuron]), **how)


# labels

MODELS: dict[str, Callable[..., Any]] = {
    "shrink": lambda model=MODEL, base=BASE: defenses.shrink(model, base, 0.5),
    "mix": lambda model=MODEL, base=BASE: defenses.mix(model, base, 0.5, seed=0),
    "harden": lambda merged=MODEL, clean=BASE, robust=OTHER: defenses.harden(merged, clean, robust),
    "project_out": lambda merged=MODEL, base=BASE: defenses.project_out(merged, base, [PROBE]),
    "negate": lambda model=MODEL, triggered=OTHER: defenses.negate(model, triggered),
    "purify": lambda suspect=MODEL, base=BASE: defenses.purify(suspect, base, [PROBE]),
}
VECTORS: dict[str, Callable[..., Any]] = {
    "cosine_gate": lambda vector=PROBE, reference=SECOND: defenses.cosine_gate(vector, reference),
    "disarm": lambda vector=PROBE: defenses.disarm(vector, [SECOND]),
    "prototype": lambda vector=PROBE: defenses.prototype(vector, [SECOND]),
    "amplify": lambda vector=PROBE: amplify(vector, 2.0),
}
LISTS: dict[str, Callable[..., Any]] = {
    "disarm": lambda probes: defenses.disarm(PROBE, probes),
    "consensus_subtraction": lambda probes: defenses.consensus_subtraction(MODEL, probes),
    "project_out": lambda probes: defenses.project_out(MODEL, BASE, probes),
    "prototype": lambda pool: defenses.prototype(PROBE, pool),
    "sparse_backdoor": lambda vectors: sparse_backdoor(vectors, agree=0.5),
    "clip_norms": lambda vectors: defenses.clip_norms(vectors, 0.5),
}


def arguments(table: dict[str, Callable[..., Any]]) -> list[Any]:
    return [
        (name, argument) for name, f in table.items() for argument in f.__code__.co_varnames[: f.__code__.co_argcount]
    ]


@pytest.mark.parametrize(("name", "argument"), arguments(MODELS))
def test_a_vector_in_a_models_place_is_refused_by_its_label(name, argument):
    with pytest.raises(OptionError, match=f"^{argument} must be a model's weights"):
        MODELS[name](**{argument: PROBE})


@pytest.mark.parametrize(("name", "argument"), arguments(VECTORS))
def test_a_model_in_a_vectors_place_is_refused_by_its_label(name, argument):
    with pytest.raises(OptionError, match=f"^{argument} must be a "):
        VECTORS[name](**{argument: MODEL})


@pytest.mark.parametrize(("name", "argument"), arguments(LISTS))
def test_a_model_in_a_list_of_vectors_is_refused_by_its_label(name, argument):
    with pytest.raises(OptionError, match=argument):
        LISTS[name](**{argument: [PROBE, MODEL]})


# defaults: a schedule is told by what it asks for, a learning rate by Adam's first step


def counted(answer: Callable[[Tensor], Tensor]) -> tuple[Callable[[Tensor], Tensor], list[int]]:
    asked: list[int] = []

    def score(x: Tensor) -> Tensor:
        asked.append(len(x))
        return answer(x)

    return score, asked


@pytest.mark.parametrize("attack", [universal_trigger, trojan_trigger])
def test_triggers_are_optimized_for_100_steps_of_64_images_at_a_rate_of_a_fifth(attack):
    images, start = torch.full((200, 1, 2, 2), 0.5), solid_patch(1, (1, 2, 2), value=0.5)
    score, asked = counted(lambda x: x.flatten(1) * torch.tensor([1.0, 2.0, -1.0, 3.0]))
    how = {"target": 3} if attack is universal_trigger else {"neurons": torch.tensor([3]), "aim": 9.0}
    ticks: list[Any] = []
    attack(score, images, start, seed=0, progress=lambda *a: ticks.append(a), **how)
    assert set(asked) == {64}
    assert len(ticks) == 100
    one = attack(score, images, start, seed=0, steps=1, **how)
    assert float((one.pattern - start.pattern).abs().max()) == pytest.approx(0.2, rel=1e-3)
    assert float((attack(score, images, start, seed=0, steps=1, lr=0.05, **how).pattern - start.pattern).max()) < 0.06
    asked.clear()
    attack(score, images, start, seed=0, steps=2, batch=7, **how)
    assert set(asked) == {7}
    wide = attack(score, images, start, seed=0, steps=60, bounds=(-9.0, 9.0), **how)
    assert float(wide.pattern.abs().max()) > 1


def test_adamerging_takes_500_steps_at_a_thousandth():
    ticks: list[int] = []
    learned_scales(progress=lambda: ticks.append(1))
    assert len(ticks) == 500
    _, scales = learned_scales(steps=1)
    moved = [abs(value - 0.3) for line in scales for value in line.values()]
    assert max(moved) == pytest.approx(1e-3, rel=1e-2)


def test_surgery_takes_500_steps_at_a_thousandth():
    ticks: list[int] = []
    adapter(progress=lambda: ticks.append(1))
    assert len(ticks) == 500
    assert float(adapter(steps=1).up.abs().max()) == pytest.approx(1e-3, rel=1e-2)


def test_a_physical_trigger_is_turned_by_10_degrees_and_lit_by_a_fifth():
    images = torch.rand(2, 1, 8, 8)
    defaults = {"degrees": 10, "shift": 0.1, "scale": (0.8, 0.9), "brightness": 0.2}
    patch = solid_patch(2, (1, 8, 8))
    assert torch.equal(physical(images, patch, seed=1), physical(images, patch, seed=1, **defaults))


# long sums


def test_long_sums_are_whole_and_have_the_same_bits_on_any_number_of_threads():
    x = torch.arange(3 * 2**15 + 5, dtype=torch.float64) / 7
    before, found = torch.get_num_threads(), list[float]()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(float(sum64(x)))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert len(set(found)) == 1
    assert float(sum64(x)) == pytest.approx(sum(i / 7 for i in range(len(x))))
    stack = torch.stack([x[: 2 * COLUMNS + 3], 2 - x[: 2 * COLUMNS + 3]])
    found = torch.tensor(pair_dots(stack, HERE), dtype=torch.float64).reshape(2, 2)
    assert torch.allclose(found, stack @ stack.T)
    assert math.isclose(float(found[0, 1]), float(found[1, 0]))
