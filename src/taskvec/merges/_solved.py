"""Rules that solve a least-squares problem of each matrix, from the vectors alone; all else is averaged."""

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import Tensor

from ..errors import RangeError
from ..rules import runs
from ._matrices import Rest, by_matrix, smallest
from ._sums import factors_of, total

__all__ = ["actmat", "wudi"]


@runs("tensor")
def actmat(
    stack: Tensor, *, weights: Sequence[float] | None = None, rest: Rest = "mean", matrix: bool = True
) -> Tensor:
    """Weigh each vector's rows by its own covariance, as RegMean does with that of the inputs: ACTMat.

    `(sum_i w_i x_i G_i) (sum_i w_i G_i)^+` with `G_i = x_i^T x_i`, computed in float64.

    Args:
        stack: `(n, *shape)` of task vectors, any float dtype.
        weights: n numbers, not negative; 1 by default.
        rest: what becomes of tensors that are no matrices.
        matrix: see `tsv_m`.

    Returns:
        `(*shape)`, the dtype of the stack.

    Raises:
        RangeError: a wrong number of weights, a negative one, an unknown rest.
        NonFiniteError: NaN or inf.

    Examples:
        >>> actmat(torch.stack([torch.eye(2), 3 * torch.eye(2)]))
        tensor([[2.8000, 0.0000],
                [0.0000, 2.8000]])

    References:
        [ACTMat, 2026](https://arxiv.org/abs/2604.01329)
    """
    factors = factors_of(weights, len(stack))
    if min(factors) < 0:
        raise RangeError(f"weights must not be negative here; got {min(factors)}")
    return by_matrix(stack, partial(_actmat, factors=factors), rest, matrix)


def _actmat(stack: Tensor, factors: Sequence[float]) -> Tensor:
    wide = stack.to(torch.float64)
    grams = [factor * (x.T @ x) for x, factor in zip(wide, factors, strict=True)]
    weighed = total(torch.stack([x @ gram for x, gram in zip(wide, grams, strict=True)]))
    return (weighed @ _inverse(total(torch.stack(grams)), stack[0])).to(stack.dtype)


def _inverse(gram: Tensor, x: Tensor) -> Tensor:
    """The pseudo-inverse of a sum of Gram matrices, without directions that are rounding of what they are made from."""
    cut = max(smallest(x) ** 2, smallest(gram))
    return cast("Tensor", cast("Any", torch.linalg).pinv(gram, rtol=cut, hermitian=True))


@runs("tensor")
def wudi(
    stack: Tensor,
    *,
    solver: Literal["exact", "adam"] = "exact",
    steps: int = 300,
    rate: float = 1e-5,
    rest: Rest = "mean",
    matrix: bool = True,
) -> Tensor:
    """Find the update whose difference from each vector is least along that vector's rows: WUDI.

    Minimizes `sum_i |(d - x_i) x_i^T|^2 / |x_i|^2` over d. The minimum is `(sum_i x_i G_i) (sum_i G_i)^+` with
    `G_i = x_i^T x_i / |x_i|^2`; the authors take 300 steps of Adam from the vectors' sum, which end far from it, and
    their published figures are of that.

    Args:
        stack: `(n, *shape)` of task vectors, any float dtype; zero vectors take no part.
        solver: `"exact"` in float64, or `"adam"` as the authors.
        steps: of Adam.
        rate: the learning rate of Adam.
        rest: what becomes of tensors that are no matrices; the authors leave them at the base (`"zero"`).
        matrix: see `tsv_m`.

    Returns:
        `(*shape)`, the dtype of the stack.

    Raises:
        RangeError: an unknown solver or rest, a number of steps or a rate that is not positive.
        NonFiniteError: NaN or inf.

    Examples:
        >>> wudi(torch.stack([torch.eye(2), 3 * torch.eye(2)]))
        tensor([[2., 0.],
                [0., 2.]])

    References:
        [Cheng et al., Whoever Started the Interference Should End It, 2025](https://arxiv.org/abs/2503.08099). The
        exact solution is our derivation.
    """
    if solver not in ("exact", "adam"):
        raise RangeError(f"solver must be 'exact' or 'adam'; got {solver!r}")
    if steps < 1 or not rate > 0:
        raise RangeError(f"steps and rate must be positive; got {steps!r} and {rate!r}")
    solve = _wudi_exact if solver == "exact" else partial(_wudi_adam, steps=steps, rate=rate)
    return by_matrix(stack, solve, rest, matrix)


def _wudi_exact(stack: Tensor) -> Tensor:
    wide = stack.to(torch.float64)
    norms = [float(x.square().sum()) for x in wide]
    grams = [x.T @ x / (norm or 1.0) for x, norm in zip(wide, norms, strict=True)]
    weighed = total(torch.stack([x @ gram for x, gram in zip(wide, grams, strict=True)]))
    return (weighed @ _inverse(total(torch.stack(grams)), stack[0])).to(stack.dtype)


def _wudi_adam(stack: Tensor, steps: int, rate: float) -> Tensor:
    """Adam with the gradient `2 sum_i (d - x_i) G_i`; betas and epsilon are torch's own."""
    norms = [float(x.square().sum(dtype=torch.float64)) for x in stack]
    grams = [2 * (x.T @ x) / (norm or 1.0) for x, norm in zip(stack, norms, strict=True)]
    whole, target = total(torch.stack(grams)), total(torch.stack([x @ g for x, g in zip(stack, grams, strict=True)]))
    found = total(stack)
    first, second = torch.zeros_like(found), torch.zeros_like(found)
    for step in range(1, steps + 1):
        gradient = found @ whole - target
        first.lerp_(gradient, 0.1)
        second.mul_(0.999).addcmul_(gradient, gradient, value=0.001)
        bound = (second / (1 - 0.999**step)).sqrt_().add_(1e-8)
        found -= rate / (1 - 0.9**step) * first / bound
    return found
