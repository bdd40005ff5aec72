"""Memory that is used again: fresh pages cost as much as what is read or computed into them."""

import threading
from collections.abc import Iterable

import torch
from torch import Tensor

__all__ = ["give_back", "take"]

MOST = 24
"""Buffers that a thread keeps."""

# The C library of Linux gives freed blocks above a threshold back to the system, and raises the threshold to the size
# of the largest that was freed so, up to 32 MB. Freeing one of that size, which was never touched, makes the blocks of
# a merge stay: nearly half of the time of ranking, and of what is as short, was spent on fresh pages.
torch.empty((32 << 20) - (1 << 16), dtype=torch.uint8, device="cpu")


class _Kept(threading.local):
    def __init__(self) -> None:
        self.buffers: list[tuple[int, Tensor]] = []


_KEPT = _Kept()


def take(size: int) -> Tensor:
    """Uninitialized bytes, `(size,)`, of a buffer that was given back or of a new one."""
    for i, (length, _) in enumerate(_KEPT.buffers):
        if size <= length <= 2 * size:
            return _KEPT.buffers.pop(i)[1][:size]
    return torch.empty(size, dtype=torch.uint8, device="cpu")


def give_back(buffers: Iterable[Tensor]) -> None:
    """Keep buffers for the next chunk; nothing may look at them any more."""
    for buffer in buffers:
        if len(_KEPT.buffers) < MOST:
            whole = torch.empty(0, dtype=torch.uint8, device="cpu")
            _KEPT.buffers.append((buffer.untyped_storage().nbytes(), whole.set_(buffer.untyped_storage())))
