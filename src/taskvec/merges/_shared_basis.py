"""Rules that express all vectors in one basis first, merge there, and come back: of matrices; all else is averaged."""

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from ..rules import runs
from ._lowrank import flat, recomposed
from ._matrices import Rest, by_matrix, factors
from ._sums import total
from ._ties import ties

__all__ = ["core_space", "dc_merge", "knots"]

Inner = Callable[[Tensor], Tensor]

TRIMMED = partial(ties, density=0.2, scope="tensor")


@runs("tensor")
def knots(stack: Tensor, *, inner: Inner = TRIMMED, rest: Rest = "mean", matrix: bool = True) -> Tensor:
    """Merge what the vectors do with the columns of one shared left basis: KnOTS around any rule.

    `U inner(C_1, ..., C_n)` with `[x_1 ... x_n] = U [C_1 ... C_n]`, U the left singular vectors of the vectors side by
    side.

    Args:
        stack: `(n, *shape)` of task vectors, any float dtype.
        inner: the merge, a function of a stack such as a partial of `ties`; the authors trim to 20 %.
        rest: what becomes of tensors that are no matrices.
        matrix: see `tsv_m`.

    Returns:
        `(*shape)`, the dtype of the stack.

    Raises:
        RangeError: an unknown rest.
        NonFiniteError: NaN or inf.

    Examples:
        >>> knots(torch.ones(2, 3, 2), inner=total).round()
        tensor([[2., 2.],
                [2., 2.],
                [2., 2.]])

    References:
        [Stoica et al., Model Merging with SVD to Tie the KnOTS, 2024](https://arxiv.org/abs/2410.19735). Cut at the
        numerical rank; the authors' code cuts at singular values of 1e-5, whatever the largest is, and multiplies every
        vector by the first weight.
    """
    return by_matrix(stack, partial(_knots, inner=inner), rest, matrix)


def _knots(stack: Tensor, inner: Inner) -> Tensor:
    n, rows, columns = stack.shape
    u, s, v = factors(stack.transpose(0, 1).reshape(rows, n * columns))
    if not len(s):
        return torch.zeros_like(stack[0])
    parts = (s[:, None] * v).reshape(len(s), n, columns).transpose(0, 1)
    return u @ inner(parts.contiguous())


@runs("tensor")
def core_space(stack: Tensor, *, inner: Inner = TRIMMED, rest: Rest = "mean", matrix: bool = True) -> Tensor:
    """Merge low-rank vectors in the small space that all their rows and columns span: core space around any rule.

    `U inner(U^T x_1 V, ..., U^T x_n V) V^T`, with U and V orthonormal bases of the columns and of the rows of all
    vectors. Nothing is lost; the matrices that are merged have at most as many rows and columns as the ranks' sum.

    Args:
        stack: `(n, *shape)` of task vectors, any float dtype, of low rank (adapters).
        inner: the merge, a function of a stack such as `total` or a partial of `ties`.
        rest: what becomes of tensors that are no matrices.
        matrix: see `tsv_m`.

    Returns:
        `(*shape)`, the dtype of the stack.

    Raises:
        RangeError: an unknown rest.
        NonFiniteError: NaN or inf.

    Examples:
        >>> core_space(torch.ones(2, 3, 2), inner=total).round()
        tensor([[2., 2.],
                [2., 2.],
                [2., 2.]])

    References:
        [Panariello et al., Accurate and Efficient Low-Rank Model Merging in Core Space, 2025](https://arxiv.org/abs/2509.17786).
        The factors of an adapter cannot be told from its update: here each is split evenly between rows and columns,
        so an inner rule that is not linear sees other coordinates than with the adapter's own factors.
    """
    return by_matrix(stack, partial(_core_space, inner=inner), rest, matrix)


def _core_space(stack: Tensor, inner: Inner) -> Tensor:
    parts = [factors(x) for x in stack]
    columns = torch.cat([u * s.sqrt() for u, s, _ in parts], 1)
    rows = torch.cat([s.sqrt()[:, None] * v for _, s, v in parts], 0)
    if not columns.shape[1]:
        return torch.zeros_like(stack[0])
    u, v = factors(columns)[0], factors(rows)[2]
    cores = torch.stack([u.T @ x @ v.T for x in stack])
    return u @ inner(cores) @ v


@runs("tensor")
def dc_merge(stack: Tensor, *, inner: Inner = total, rest: Rest = "mean", matrix: bool = True) -> Tensor:
    """Flatten each vector's leading spectrum, merge in a basis that covers all of them, keep the own blocks: DC-Merge.

    The leading `floor(min(rows, columns) / n)` directions of each vector with their values replaced by their mean;
    expressed in orthonormal bases `U (U^T U)^(-1/2)` of all left and of all right directions side by side; merged;
    of the result only the blocks on the diagonal, one per vector, come back.

    Args:
        stack: `(n, *shape)` of task vectors, any float dtype.
        inner: the merge in the shared basis, a function of a stack.
        rest: what becomes of tensors that are no matrices.
        matrix: see `tsv_m`.

    Returns:
        `(*shape)`, the dtype of the stack.

    Raises:
        RangeError: an unknown rest.
        NonFiniteError: NaN or inf.

    Examples:
        >>> stack = torch.zeros(2, 2, 2)
        >>> stack[0, 0, 0], stack[1, 1, 1] = 3.0, 2.0
        >>> dc_merge(stack)
        tensor([[3., 0.],
                [0., 2.]])

    References:
        [DC-Merge, 2026](https://arxiv.org/abs/2603.06242). Vectors of lower rank than their share have smaller blocks.
    """
    return by_matrix(stack, partial(_dc_merge, inner=inner), rest, matrix)


def _dc_merge(stack: Tensor, inner: Inner) -> Tensor:
    most = min(stack.shape[1:]) // len(stack)
    parts = [factors(x, most) for x in stack]
    ranks = [len(s) for _, s, _ in parts]
    if not sum(ranks):
        return torch.zeros_like(stack[0])
    left = _whitened(torch.cat([u for u, _, _ in parts], 1))
    right = _whitened(torch.cat([v for _, _, v in parts], 0).T)
    smooth = [recomposed(u, flat(s), v) for u, s, v in parts]
    cores = torch.stack([left.T @ x @ right for x in smooth])
    owner = torch.tensor([i for i, rank in enumerate(ranks) for _ in range(rank)], device=stack.device)
    return left @ (inner(cores) * (owner[:, None] == owner)) @ right.T


def _whitened(x: Tensor, least: float = 1e-6) -> Tensor:
    """Columns made orthonormal with as little change as possible: `X (X^T X)^(-1/2)`."""
    values, vectors = cast("tuple[Tensor, Tensor]", cast("Any", torch.linalg).eigh(x.T @ x))
    return x @ (vectors * values.clamp(min=least).rsqrt()) @ vectors.T
