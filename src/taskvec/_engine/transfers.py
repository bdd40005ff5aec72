"""Copies between the memory of the processor and that of a GPU, through page-locked memory.

A copy to a GPU does not wait. What is computed there after it comes after it, and torch does not give the page-locked
memory away before the copy is done. A copy from a GPU waits; meanwhile the other of two threads reads its next block.
"""

import torch
from torch import Tensor

__all__ = ["WORKERS", "copy_into", "moved_to"]

WORKERS = 2
"""Threads where a GPU computes: one reads and writes files while the other waits for the GPU."""


def moved_to(x: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """`x.to(device, dtype)`, which is `x` where nothing changes; converted where it arrives."""
    if not _crosses(x.device, device):
        return x.to(device=device, dtype=dtype)
    return _locked(x).copy_(x).to(device, non_blocking=True).to(dtype)


def copy_into(out: Tensor, x: Tensor) -> None:
    """`out.copy_(x)`."""
    if _crosses(x.device, out.device):
        out.copy_(_locked(x).copy_(x), non_blocking=True)
    elif _crosses(out.device, x.device):
        out.copy_(_locked(out).copy_(x))  # both wait
    else:
        out.copy_(x)


def _crosses(start: torch.device, end: torch.device) -> bool:
    return start.type == "cpu" and end.type == "cuda"


def _locked(like: Tensor) -> Tensor:
    """Page-locked memory for a tensor."""
    return torch.empty(like.shape, dtype=like.dtype, device="cpu", pin_memory=True)
