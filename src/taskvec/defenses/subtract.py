"""Defences that subtract a vector, and the twins that say whether the vector mattered."""

from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor

from .._lazy import Lazy
from .._random import fold, normal
from ..backdoor import BackdoorVector
from ..rules import Place, Total, numbers_in, over, runs, sum64
from ..vector import Scale, TaskVector

__all__ = ["injection_subtraction", "random_twin", "shuffled_twin"]

V = TypeVar("V", bound=TaskVector)


def injection_subtraction(
    merged: Mapping[str, Tensor], probe: BackdoorVector, scale: Scale = 0.3
) -> dict[str, Tensor] | Lazy:
    """Injection BV Subtraction (IBVS): subtract a backdoor the defender planted himself.

    `merged - scale * probe`. The hope is that an unknown backdoor lies partly along the known one.

    Given: a backdoor vector of the defender's own (a fine-tune with a simple trigger, and its own clean twin: labelled
    data of one task). Nothing of the attack. Cost: one subtraction.

    Our reading: the trigger, the coefficient and the place of the subtraction were not available to us. It is taken
    from the merged weights; the coefficient is to be chosen on clean validation data, see `selection.strength`.

    Args:
        merged: the merged model.
        probe: the defender's backdoor vector. For an honest figure it shares no data, seed, twin, trigger or class with
            the attack.
        scale: the coefficient.

    Returns:
        The model with the probe subtracted.

    Example:
        >>> probe = BackdoorVector({"w": torch.tensor([1.0, 0.0])})
        >>> injection_subtraction({"w": torch.tensor([1.0, 1.0])}, probe, scale=0.5)["w"]
        tensor([0.5000, 1.0000])

    Reference:
        Pawlak et al., Backdoor Vectors, 2025, https://arxiv.org/abs/2510.08016
    """
    return probe.remove(merged, scale)


def random_twin(vector: V, *, seed: int) -> V:
    """A random vector with the norm of each tensor: the control for any vector that is subtracted.

    Entries are independent and nearly normal (sums of four uniforms), the same for a seed on every device.

    Args:
        vector: the vector to be matched.
        seed: any integer; give each draw its own.

    Returns:
        A vector of the same type, names, shapes and norms per tensor.

    Raises:
        NonFiniteError: NaN or inf.

    Example:
        >>> v = TaskVector({"w": torch.tensor([3.0, 4.0])})
        >>> round(float(random_twin(v, seed=0).norm()), 4)
        5.0
    """
    return vector.map(_random_like, seed=seed)


def shuffled_twin(vector: V, *, seed: int) -> V:
    """The same entries in another order, inside each tensor: norm and distribution kept, direction lost.

    Args:
        vector: the vector to be shuffled.
        seed: any integer.

    Returns:
        A vector of the same type, names and shapes.

    Example:
        >>> v = TaskVector({"w": torch.tensor([1.0, 2.0, 3.0])})
        >>> sorted(shuffled_twin(v, seed=0)["w"].tolist())
        [1.0, 2.0, 3.0]
    """
    return vector.map(_shuffled, seed=seed)


@runs("tensor")
def _shuffled(x: Tensor, *, seed: int, at: Place) -> Tensor:
    order = at.bits(seed, x).reshape(-1).argsort(stable=True)
    return x.reshape(-1)[order].reshape(x.shape)


def _norms(total: Total, seed: int) -> tuple[float, float]:
    """The norm of a tensor, and of the noise that will replace it."""

    def squares(x: Tensor, at: Place) -> Tensor:
        return torch.stack([sum64(x.double().square()), sum64(_noise(x, at, seed).double().square())])

    own, noise = numbers_in(total(squares).sqrt())
    return own, noise


@runs("element", norms=_norms)
def _random_like(
    x: Tensor,
    *,
    seed: int,
    norms: tuple[float, float] | None = None,
    at: Place = Place(),  # noqa: B008
) -> Tensor:
    own, noise = _norms(over(x, at, stacked=False), seed) if norms is None else norms
    return (_noise(x, at, seed) * (own / noise if noise else 0.0)).to(x.dtype)


def _noise(x: Tensor, at: Place, seed: int) -> Tensor:
    return normal((fold(seed, 0), fold(seed, 1)), at.key, at.start, x.numel(), x.device).reshape(x.shape)
