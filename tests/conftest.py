"""One profile for hypothesis: the same examples on every machine, and few enough that all tests take a minute.

And what the tests of several experiments share.
"""

import sys
from pathlib import Path

import pytest
import torch
from hypothesis import settings

settings.register_profile("repeatable", derandomize=True, deadline=None, max_examples=10, database=None)
settings.load_profile("repeatable")

torch.set_num_threads(1)  # tensors here are small: more threads would only wait for each other

EXPERIMENTS = str(Path(__file__).parents[1] / "examples" / "experiments")


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """An encoder that has hardly been trained, and a cache of its own."""
    sys.path.insert(0, EXPERIMENTS)
    from bench import cache, zoo

    sys.path.remove(EXPERIMENTS)
    before, cache.FOLDER = cache.FOLDER, tmp_path_factory.mktemp("cache")
    yield zoo.Setting("vits", steps=2, pretrain_steps=2)
    cache.FOLDER = before


@pytest.fixture
def world(setting, monkeypatch):
    """A world of that encoder, whose models take a few steps."""
    from bench.second import World

    monkeypatch.setattr(World, "setting", property(lambda self: setting._replace(base_seed=0)))
    return World(7)
