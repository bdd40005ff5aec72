"""Memory that a thread uses again for the chunks it reads: fresh memory costs as much as the reading."""

import threading
from collections.abc import Iterable

import torch
from torch import Tensor

__all__ = ["give_back", "take"]

MOST = 24
"""Buffers that a thread keeps."""


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
