"""Ranks of magnitudes in rows: the order of the entries of each row, and what is taken and put in that order."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import NonFiniteError
from .pieces import Place, wide
from .select import LOW, as_tensor, magnitudes, turns_of

__all__ = ["placed", "ranked_places", "taken"]


def ranked_places(rows: Tensor, at: Place) -> Tensor:
    """The entries of each row from the smallest magnitude to the largest, as flat indices `(rows, length)` int64.

    Equal magnitudes come in the order of their turns.
    """
    rows = wide(rows.detach())
    mags, turns = magnitudes(rows), turns_of(at, rows.numel(), rows.device).reshape(rows.shape)
    _check_rows(mags, 0x7FF0000000000000 if rows.dtype == torch.float64 else 0x7F800000)
    count, length = rows.shape
    bits = max(1, (length - 1).bit_length())
    firsts = torch.arange(count, device=rows.device)[:, None] * length
    if rows.dtype == torch.float64:
        columns = (
            _sorted_twice(mags, turns) if isinstance(mags, Tensor) else as_tensor(np.lexsort((turns, mags), axis=1))
        )
        return columns + firsts
    # one sort of one number that carries all: magnitude, turn, column
    if isinstance(mags, Tensor):
        keys = (mags << 32) | (turns >> bits << bits) | torch.arange(length, device=rows.device)
        return (keys.sort(dim=1).values & ((1 << bits) - 1)) + firsts
    keys = mags.astype(np.uint64)
    keys <<= np.uint64(32)
    turns &= np.uint32(LOW >> bits << bits)
    turns |= np.arange(length, dtype=np.uint32)
    keys |= turns
    keys.sort(axis=1)
    keys &= np.uint64((1 << bits) - 1)
    keys += firsts.numpy().astype(np.uint64)
    return as_tensor(keys.view(np.int64))


def _sorted_twice(mags: Tensor, turns: Tensor) -> Tensor:
    by_turn = turns.argsort(dim=1)
    return by_turn.gather(1, mags.gather(1, by_turn).argsort(dim=1, stable=True))


def _check_rows(mags: Any, infinity: int) -> None:
    if mags.shape[0] and mags.shape[1] and int(mags.max()) >= infinity:
        raise NonFiniteError("cannot rank a row that holds NaN or inf; check() lists such tensors")


def taken(x: Tensor, places: Tensor) -> Tensor:
    """The entries of a flat tensor at some places, shaped as those."""
    if x.device.type != "cpu":
        return x[places]
    return as_tensor(x.numpy().take(places.numpy()))  # several times faster


def placed(shape: torch.Size, places: Tensor, values: Tensor) -> Tensor:
    """A new tensor with some values, which broadcast, at flat places, and zeros elsewhere."""
    if places.device.type != "cpu":
        flat = torch.zeros(shape.numel(), dtype=values.dtype, device=places.device)
        flat[places] = values
        return flat.reshape(shape)
    given = values.numpy()
    found = np.zeros(shape.numel(), dtype=given.dtype)
    found[places.numpy()] = given  # several times faster
    return as_tensor(found).reshape(shape)
