"""Claims about backdoor vectors on real images, with tolerances that a broken method fails.

A small multilayer perceptron on MNIST digits; the demo and the docs have the measurements on better encoders.
"""

from functools import cache, partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from taskvec import BackdoorVector, TaskVector, merge
from taskvec.attacks import sparse_backdoor
from taskvec.attacks.triggers import random_patch, stamp
from taskvec.defenses import random_twin
from taskvec.merges import total
from taskvec.metrics import accuracy, attack_success_rate, sweep

pytestmark = pytest.mark.slow

DATA = Path(__file__).parent.parent / "examples" / "data" / "vision.npz"
SHAPE, TARGET = (1, 28, 28), 1


@cache
def images(task: str, part: str) -> tuple[torch.Tensor, torch.Tensor]:
    with np.load(DATA) as file:
        x, y = file[f"{task}_{part}_images"], file[f"{task}_{part}_labels"]
    return torch.from_numpy(x).float().div(255).unsqueeze(1), torch.from_numpy(y).long()


def logits(params, x: torch.Tensor) -> torch.Tensor:
    hidden = F.relu(F.linear(x.flatten(1), params["1.weight"], params["1.bias"]))
    hidden = F.relu(F.linear(hidden, params["2.weight"], params["2.bias"]))
    return F.linear(hidden, params["3.weight"], params["3.bias"])


def fine_tune(start, x, y, *, seed: int, steps: int = 200, trigger=None):
    g = torch.Generator().manual_seed(seed)
    params = {name: p.clone().requires_grad_() for name, p in start.items()}
    optimizer = torch.optim.AdamW(params.values(), lr=1e-3)
    for _ in range(steps):
        rows = torch.randint(len(x), (64,), generator=g)
        loss = F.cross_entropy(logits(params, x[rows]), y[rows])
        if trigger is not None:
            loss = loss + F.cross_entropy(logits(params, trigger(x[rows[:32]])), torch.full((32,), TARGET))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return {name: p.detach() for name, p in params.items()}


@cache
def base():
    g = torch.Generator().manual_seed(0)
    sizes = {"1": (784, 128), "2": (128, 64), "3": (64, 26)}
    start = {}
    for name, (before, after) in sizes.items():
        start[f"{name}.weight"] = torch.randn(after, before, generator=g) / before**0.5
        start[f"{name}.bias"] = torch.zeros(after)
    return fine_tune(start, *images("glyph_lower", "train"), seed=0, steps=300)


@cache
def patch(seed: int):
    return random_patch(5, SHAPE, seed=seed, place="bottom-right" if seed == 0 else "top-left")


@cache
def models(seed: int, trigger: int):
    """A clean fine-tune, and a backdoored one that saw the same images in the same order."""
    x, y = images("mnist", "train")
    clean = fine_tune(base(), x, y, seed=seed)
    return clean, fine_tune(base(), x, y, seed=seed, trigger=partial(stamp, patch=patch(trigger)))


def vector(seed: int, trigger: int = 0) -> BackdoorVector:
    clean, backdoored = models(seed, trigger)
    return BackdoorVector.between(clean=clean, backdoored=backdoored, pretrained=base())


def asr(params, trigger: int = 0) -> float:
    stamped = partial(stamp, patch=patch(trigger))
    return attack_success_rate(partial(logits, params), *images("mnist", "test"), target=TARGET, trigger=stamped).value


def test_injection_rises_from_the_control_to_the_whole_backdoor_at_no_cost_in_accuracy():
    clean, backdoored = models(0, 0)
    curve = sweep([0.0, 0.25, 0.5, 0.75, 1.0], lambda s: vector(0).inject(clean, s), asr)
    values = list(curve.values())
    assert values[0] < 0.1
    assert values[-1] > 0.95
    assert all(a <= b + 0.02 for a, b in pairwise(values))
    before, after = (accuracy(partial(logits, p), *images("mnist", "test")).value for p in (clean, backdoored))
    assert abs(before - after) < 0.03


def test_subtracting_the_vector_removes_the_backdoor_and_a_random_one_of_its_norm_does_not():
    backdoored = models(0, 0)[1]
    removed = vector(0).remove(backdoored)
    randomly = random_twin(vector(0), seed=0).remove(backdoored)
    assert asr(removed) < 0.1
    assert asr(randomly) > 0.9


def test_vectors_of_one_trigger_are_alike_over_seeds_and_more_than_of_two():
    same, other = float(vector(0).cosine(vector(1))), float(vector(0).cosine(vector(2, trigger=1)))
    assert same > 0.2
    assert same > other + 0.1


def test_a_backdoor_transfers_to_another_clean_model_by_its_trigger_alone():
    other_clean = models(1, 0)[0]
    assert asr(vector(0).inject(other_clean)) > 0.9
    assert asr(vector(0).inject(other_clean), trigger=1) < 0.5


def test_a_backdoor_is_diluted_by_a_small_coefficient_and_an_sbv_of_its_seeds_less():
    clean = models(0, 0)[0]
    tuned = TaskVector.between(base(), clean)

    def merged(backdoor) -> float:
        return asr(merge([tuned + backdoor], total).apply(base(), 0.3))

    single = vector(0)
    several = sparse_backdoor([vector(0), vector(1), vector(2)])
    assert merged(single) < 0.9
    assert float(several.norm()) == pytest.approx(float(sum(vector(i).norm() for i in range(3))) / 3)
    assert merged(several) > merged(single) - 0.05
