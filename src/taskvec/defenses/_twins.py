"""Twins of a vector that lack its direction: the controls that show whether a subtracted vector mattered."""

from collections.abc import Generator
from typing import Any, TypeVar

import torch
from torch import Tensor

from .._engine.random import fold, normal
from .._engine.totals import numbers_in
from .._vectors.checks import check_vector
from .._vectors.vector import TaskVector
from ..rules import HERE, Look, Place, over, runs, sum64

__all__ = ["random_twin", "shuffled_twin"]

V = TypeVar("V", bound=TaskVector)


def random_twin(vector: V, *, seed: int) -> V:
    """Draw a random vector with the same norm in every tensor: the control for a vector that is subtracted.

    Entries are independent and nearly normal (sums of four uniforms), the same for a seed on every device.

    Args:
        vector: the vector to be matched.
        seed: any integer; use another one for each draw.

    Returns:
        A vector of the same type, names, shapes and norms per tensor.

    Raises:
        NonFiniteError: NaN or inf.
        OptionError: an argument that is not a task vector.

    Examples:
        >>> v = TaskVector({"w": torch.tensor([3.0, 4.0])})
        >>> round(float(random_twin(v, seed=0).norm()), 4)
        5.0
    """
    check_vector("vector", vector)
    return vector.map(_random_like, seed=seed)


def shuffled_twin(vector: V, *, seed: int) -> V:
    """Shuffle the entries of every tensor: norm and distribution stay, the direction is lost.

    Args:
        vector: the vector to be shuffled.
        seed: any integer.

    Returns:
        A vector of the same type, names and shapes.

    Raises:
        OptionError: an argument that is not a task vector.

    Examples:
        >>> v = TaskVector({"w": torch.tensor([1.0, 2.0, 3.0])})
        >>> sorted(shuffled_twin(v, seed=0)["w"].tolist())
        [1.0, 2.0, 3.0]
    """
    check_vector("vector", vector)
    return vector.map(_shuffled, seed=seed)


@runs("tensor")
def _shuffled(x: Tensor, *, seed: int, at: Place) -> Tensor:
    order = at.bits(seed, x).reshape(-1).argsort(stable=True)
    return x.reshape(-1)[order].reshape(x.shape)


def _block_squares(stack: Tensor, at: Place, seed: int) -> Tensor:
    x = stack[0].to(torch.float64)
    return torch.stack([sum64(x.square()), sum64(_noise(x, at, seed).to(torch.float64).square())])


def norms(n: int, entries: int, seed: int) -> Generator[Look, list[Any], tuple[float, float]]:
    """The statistic: the norm of a tensor, and of the noise that will replace it."""
    del n, entries
    own, noise = numbers_in((yield from over(_block_squares, seed)).sqrt())
    return own, noise


@runs("element", norms)
def _random_like(x: Tensor, *, seed: int, at: Place = HERE) -> Tensor:
    own, noise = at.take(norms, x[None], seed)
    return (_noise(x, at, seed) * (own / noise if noise else 0.0)).to(x.dtype)


def _noise(x: Tensor, at: Place, seed: int) -> Tensor:
    return normal((fold(seed, 0), fold(seed, 1)), at.key, at.start, x.numel(), x.device).reshape(x.shape)
