"""The statistics that a vector takes of itself, or with another: module-level functions of blocks."""

from collections.abc import Generator
from typing import Any

import torch
from torch import Tensor

from .._engine.pieces import Look, Place
from .._engine.totals import over, sum64

__all__ = ["changed", "far", "not_finite", "squares"]


def _block_squares(stack: Tensor, at: Place) -> float:
    del at
    return float(sum64(stack.to(torch.float64).square()))


def squares(n: int, entries: int) -> Generator[Look, list[Any], float]:
    """The sum of the squares of one vector."""
    del n
    return (yield from over(_block_squares)) if entries else 0.0


def _block_far(stack: Tensor, at: Place, rtol: float, atol: float) -> int:
    del at
    return int((~stack[0].isclose(stack[1], rtol=rtol, atol=atol)).sum())


def far(n: int, entries: int, rtol: float, atol: float) -> Generator[Look, list[Any], int]:
    """How many entries of two vectors are far from each other."""
    del n
    return (yield from over(_block_far, rtol, atol)) if entries else 0


def _block_not_finite(stack: Tensor, at: Place) -> Tensor:
    del at
    return torch.stack([stack.isnan().sum(), stack.isinf().sum()])


def not_finite(n: int, entries: int) -> Generator[Look, list[Any], list[int]]:
    """How many entries are NaN, and how many inf."""
    del n
    counts: list[int] = (yield from over(_block_not_finite)).tolist() if entries else [0, 0]
    return counts


def _block_changed(stack: Tensor, at: Place) -> int:
    del at
    return int(stack.count_nonzero())


def changed(n: int, entries: int) -> Generator[Look, list[Any], int]:
    """How many entries are not zero."""
    del n, entries
    return (yield from over(_block_changed))
