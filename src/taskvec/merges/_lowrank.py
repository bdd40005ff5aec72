"""Rules on the singular values of each matrix: `(n, rows, columns) -> (rows, columns)`; all else is averaged."""

from collections.abc import Callable, Sequence
from functools import partial
from math import ceil

import torch
from torch import Tensor

from .._engine.select import check_density
from ..errors import RangeError
from ..rules import runs
from ._matrices import Rest, by_matrix, factors, polar
from ._sums import mean, total

__all__ = ["cart", "iso_c", "iso_cts", "star", "subspace_boosting", "tsv_m"]


def flat(values: Tensor) -> Tensor:
    """All values replaced by their mean."""
    return values.mean().expand_as(values)


def recomposed(u: Tensor, s: Tensor, v: Tensor) -> Tensor:
    """`U diag(s) V`."""
    return (u * s) @ v


@runs("tensor")
def tsv_m(stack: Tensor, *, rest: Rest = "mean", matrix: bool = True) -> Tensor:
    """Keep of each vector its leading singular directions, make them orthogonal to each other, add them up: TSV-M.

    `U' S V'` with U, S, V the leading `floor(min(rows, columns) / n)` singular vectors and values of all n vectors side
    by side, and U', V' the orthogonal matrices nearest to U, V.

    Args:
        stack: `(n, *shape)` of task vectors, any float dtype.
        rest: what becomes of tensors that are no matrices, and of those with fewer rows or columns than vectors.
        matrix: whether to treat a matrix as one; by name, such as `{"*embed*": False, "*": True}`.

    Returns:
        `(*shape)`, the dtype of the stack.

    Raises:
        RangeError: an unknown rest.
        NonFiniteError: NaN or inf.

    Examples:
        >>> stack = torch.zeros(2, 2, 2)
        >>> stack[0, 0, 0], stack[1, 1, 1] = 3.0, 2.0
        >>> tsv_m(stack)
        tensor([[3., 0.],
                [0., 2.]])

    References:
        [Gargiulo et al., Task Singular Vectors, 2024](https://arxiv.org/abs/2412.00081). Directions below the numerical
        rank are left out, which the authors' code takes for directions: their results for adapters change under
        rounding.
    """
    return by_matrix(stack, _tsv, rest, matrix)


def _tsv(stack: Tensor) -> Tensor:
    most = min(stack.shape[1:]) // len(stack)
    return recomposed(*_joined([factors(x, most) for x in stack]))


def _joined(parts: Sequence[tuple[Tensor, Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    """Singular triples side by side, their vectors made orthogonal."""
    left, values, right = zip(*parts, strict=True)
    return polar(torch.cat(left, 1)), torch.cat(values), polar(torch.cat(right))


@runs("tensor")
def iso_c(stack: Tensor, *, rest: Rest = "mean", matrix: bool = True) -> Tensor:
    """Give all singular values of the vectors' sum their mean: Iso-C.

    `mean(s) U V^T` of `sum_i x_i = U diag(s) V^T`. Its coefficient is the scale of `apply` (searched, 0 to 3).

    Args:
        stack: `(n, *shape)` of task vectors, any float dtype.
        rest: what becomes of tensors that are no matrices.
        matrix: see `tsv_m`.

    Returns:
        `(*shape)`, the dtype of the stack.

    Raises:
        RangeError: an unknown rest.
        NonFiniteError: NaN or inf.

    Examples:
        >>> iso_c(torch.diag(torch.tensor([3.0, 1.0]))[None])
        tensor([[2., 0.],
                [0., 2.]])

    References:
        [Marczak et al., No Task Left Behind, 2025](https://arxiv.org/abs/2502.04959). Of a rank-deficient sum
        (adapters) only directions above the numerical rank are kept, and the mean is over those; the authors' code
        spreads the energy over directions that are rounding.
    """
    return by_matrix(stack, _iso_c, rest, matrix)


def _iso_c(stack: Tensor) -> Tensor:
    u, s, v = factors(total(stack))
    return recomposed(u, flat(s), v)


@runs("tensor")
def iso_cts(stack: Tensor, common: float = 0.8, *, rest: Rest = "mean", matrix: bool = True) -> Tensor:
    """Join the leading directions of the sum with each vector's own, and flatten their values: Iso-CTS.

    The leading directions of the sum, a fraction of them all, rounded so that the vectors share the others equally;
    then of each vector the leading directions of what is left of it outside the common columns; made orthogonal as in
    `tsv_m`, and all singular values replaced by their mean.

    Args:
        stack: `(n, *shape)` of task vectors, any float dtype.
        common: fraction of the directions that are taken from the sum, in [0, 1].
        rest: what becomes of tensors that are no matrices.
        matrix: see `tsv_m`.

    Returns:
        `(*shape)`, the dtype of the stack.

    Raises:
        RangeError: a fraction outside [0, 1], an unknown rest.
        NonFiniteError: NaN or inf.

    Examples:
        >>> iso_cts(torch.diag(torch.tensor([3.0, 1.0]))[None], common=0.5)
        tensor([[2., 0.],
                [0., 2.]])

    References:
        [Marczak et al., No Task Left Behind, 2025](https://arxiv.org/abs/2502.04959). Cut at the numerical rank, as
        `iso_c`.
    """
    check_density(common, "common")
    return by_matrix(stack, partial(_iso_cts, common=common), rest, matrix)


def _iso_cts(stack: Tensor, common: float) -> Tensor:
    n, size = len(stack), min(stack.shape[1:])
    own = round((size - int(size * common)) / n)
    shared = factors(total(stack), size - own * n)
    u = shared[0]
    parts = [factors(x - u @ (u.T @ x), own, beside=float(x.square().sum().sqrt())) for x in stack]
    left, values, right = _joined([*parts, shared])
    return recomposed(left, flat(values), right)


def _check_share(share: float) -> None:
    if not 0 < share <= 1:
        raise RangeError(f"share must be in (0, 1]; got {share!r}")


@runs("tensor")
def star(stack: Tensor, share: float = 0.4, *, rest: Rest = "mean", matrix: bool = True) -> Tensor:
    """Truncate each vector's spectrum, restore its nuclear norm, average: STAR.

    `mean_i c_i sum_{j <= r_i} s_ij u_ij v_ij^T`, with r_i the fewest singular values whose sum reaches a share of all,
    and c_i the sum of all over the sum of those kept.

    Args:
        stack: `(n, *shape)` of task vectors, any float dtype.
        share: of the sum of singular values, in (0, 1].
        rest: what becomes of tensors that are no matrices.
        matrix: see `tsv_m`.

    Returns:
        `(*shape)`, the dtype of the stack.

    Raises:
        RangeError: a share outside (0, 1], an unknown rest.
        NonFiniteError: NaN or inf.

    Examples:
        >>> star(torch.diag(torch.tensor([3.0, 1.0]))[None], share=0.5)
        tensor([[4., 0.],
                [0., 0.]])

    References:
        [Lee et al., STAR, 2025](https://arxiv.org/abs/2502.10339)
    """
    _check_share(share)
    return by_matrix(stack, partial(_star, share=share), rest, matrix)


def _star(stack: Tensor, share: float) -> Tensor:
    kept: list[Tensor] = []
    for x in stack:
        u, s, v = factors(x)
        rank = reached(s, share)
        scale = s.sum() / s[:rank].sum() if rank else 1.0
        kept.append(recomposed(u[:, :rank], s[:rank] * scale, v[:rank]))
    return mean(torch.stack(kept))


def reached(values: Tensor, share: float) -> int:
    """How many of the largest values it takes to reach a share of the sum of all."""
    sums = values.cumsum(0)
    return min(len(values), int((sums < share * sums[-1]).sum()) + 1) if len(values) else 0


@runs("tensor")
def cart(stack: Tensor, share: float = 0.04, scale: float = 1.0, *, rest: Rest = "mean", matrix: bool = True) -> Tensor:
    """Add to the mean the leading directions of each vector's difference from it: CART.

    `m + scale sum_i lowrank(x_i - m)` with m the mean and a share of the ranks kept.

    Args:
        stack: `(n, *shape)` of task vectors, any float dtype.
        share: of the singular values of each centered vector, in (0, 1], rounded up.
        scale: of what is added.
        rest: what becomes of tensors that are no matrices.
        matrix: see `tsv_m`.

    Returns:
        `(*shape)`, the dtype of the stack.

    Raises:
        RangeError: a share outside (0, 1], an unknown rest.
        NonFiniteError: NaN or inf.

    Examples:
        >>> cart(torch.diag(torch.tensor([3.0, 1.0]))[None], share=0.5)
        tensor([[3., 0.],
                [0., 1.]])

    References:
        [Choi et al., Revisiting Weight Averaging for Model Merging, 2024](https://arxiv.org/abs/2412.12153)
    """
    _check_share(share)
    return by_matrix(stack, partial(_cart, share=share, scale=scale), rest, matrix)


def _cart(stack: Tensor, share: float, scale: float) -> Tensor:
    center = mean(stack)
    most = max(1, ceil(share * min(center.shape)))
    return center + scale * total(torch.stack([recomposed(*factors(x - center, most)) for x in stack]))


@runs("tensor")
def subspace_boosting(
    stack: Tensor,
    share: float = 0.1,
    *,
    inner: Callable[[Tensor], Tensor] = total,
    rest: Rest = "mean",
    matrix: bool = True,
) -> Tensor:
    """Raise the small singular values of a merge to the one at which a share of their sum is reached.

    `U diag(max(s, s_r)) V^T` of `inner(stack) = U diag(s) V^T`, r the fewest values whose sum reaches the share.

    Args:
        stack: `(n, *shape)` of task vectors, any float dtype.
        share: of the sum of singular values, in (0, 1]; smaller shares raise more.
        inner: the merge, a function of the stack such as `total` or a partial of `ties`.
        rest: what becomes of tensors that are no matrices.
        matrix: see `tsv_m`.

    Returns:
        `(*shape)`, the dtype of the stack.

    Raises:
        RangeError: a share outside (0, 1], an unknown rest.
        NonFiniteError: NaN or inf.

    Examples:
        >>> subspace_boosting(torch.diag(torch.tensor([3.0, 1.0]))[None], share=0.5)
        tensor([[3., 0.],
                [0., 3.]])

    References:
        [Skorobogat et al., Subspace-Boosted Model Merging, 2025](https://arxiv.org/abs/2506.16506). Only directions
        above the numerical rank are raised.
    """
    _check_share(share)
    return by_matrix(stack, partial(_boosted, share=share, inner=inner), rest, matrix)


def _boosted(stack: Tensor, share: float, inner: Callable[[Tensor], Tensor]) -> Tensor:
    u, s, v = factors(inner(stack))
    return recomposed(u, s.clamp(min=float(s[reached(s, share) - 1])), v) if len(s) else torch.zeros_like(stack[0])
