"""What rules on matrices share: which tensors are matrices, singular values that are there, orthogonal factors."""

from collections.abc import Callable
from typing import Any, Literal, TypeAlias, cast

import torch
from torch import Tensor

from .._engine.pieces import wide
from .._engine.pools import single_thread
from ..errors import NonFiniteError, RangeError
from ._sums import mean, total

__all__ = ["Rest", "by_matrix", "factors", "polar", "smallest"]

Rest: TypeAlias = Literal["mean", "sum", "zero"]
"""What becomes of tensors that are no matrices: their mean, their sum, or nothing (the base stays)."""


def by_matrix(stack: Tensor, merge: Callable[[Tensor], Tensor], rest: Rest, matrix: bool) -> Tensor:
    """Merge matrices by a function, all else by the rest.

    Args:
        stack: `(n, rows, columns)`, or `(n, k, rows, columns)` for k stacked matrices, merged one by one (experts).
            Of fewer or more dimensions are biases and convolutions; matrices with fewer rows or columns than there are
            vectors have no direction for each, and are taken for none.
        merge: `(n, rows, columns) -> (rows, columns)`, in float32 or float64.
        rest: for what is no matrix.
        matrix: whether it is one, though it looks like one (embeddings may be taken for none).

    Raises:
        NonFiniteError: NaN or inf in a matrix.
    """
    if rest not in ("mean", "sum", "zero"):
        raise RangeError(f"rest must be 'mean', 'sum' or 'zero'; got {rest!r}")
    if not matrix or stack.ndim not in (3, 4) or min(stack.shape[-2:]) < len(stack):
        return torch.zeros_like(stack[0]) if rest == "zero" else (mean if rest == "mean" else total)(stack)
    if not bool(stack.isfinite().all()):
        raise NonFiniteError("NaN or inf: no matrix can be decomposed")
    x = wide(stack).contiguous()  # bits depend on the layout
    with single_thread():  # and on the number of threads
        merged = merge(x) if x.ndim == 3 else torch.stack([merge(x[:, k].contiguous()) for k in range(x.shape[1])])
    return merged.to(stack.dtype)


def factors(x: Tensor, most: int | None = None, *, beside: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """The singular vectors and values of a matrix, cut at its numerical rank.

    Args:
        x: `(rows, columns)`.
        most: how many at most, the largest.
        beside: a norm, where x is what is left of something larger, whose rounding it holds.

    Returns:
        `(rows, r)`, `(r,)`, `(r, columns)`; r is 0 for a zero matrix, and what is composed of them is one again.
    """
    u, s, v = cast("tuple[Tensor, Tensor, Tensor]", cast("Any", torch.linalg).svd(x, full_matrices=False))
    rank = int((s > smallest(x) * max(beside, float(s[:1].sum()))).sum())
    rank = rank if most is None else min(rank, most)
    if rank == len(s):
        return u, s, v
    return u[:, :rank].clone(), s[:rank].clone(), v[:rank].clone()  # a slice would hold the whole


def smallest(x: Tensor) -> float:
    """The singular values below this share of the largest are rounding."""
    return max(x.shape) * torch.finfo(x.dtype).eps


def polar(x: Tensor) -> Tensor:
    """The orthogonal matrix nearest to one, `U V^T` of its singular vectors: orthonormal columns, or rows."""
    u, _, v = factors(x)
    return u @ v
