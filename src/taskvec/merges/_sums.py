"""Sums and means: `(n, *shape) -> (*shape)`.

They add vector after vector and never reduce over dim 0, whose sums change bits with the length of a block.
"""

from collections.abc import Sequence

from torch import Tensor

from ..errors import DegenerateError, RangeError
from ..rules import runs

__all__ = ["mean", "total", "weighted"]


@runs("element")
def mean(stack: Tensor, weights: Sequence[float] | None = None) -> Tensor:
    """Average the vectors, `sum_i w_i x_i / sum_i w_i`: weight averaging, model soups.

    Args:
        stack: `(n, *shape)`, any float dtype.
        weights: n numbers whose sum is not zero; equal by default.

    Returns:
        `(*shape)`, the dtype of the stack.

    Raises:
        RangeError: a wrong number of weights.
        DegenerateError: weights whose sum is zero.

    Examples:
        >>> import torch
        >>> mean(torch.tensor([[1.0, 2.0], [3.0, 6.0]]), weights=[3, 1])
        tensor([1.5000, 3.0000])

    References:
        [Wortsman et al., Model soups, 2022](https://arxiv.org/abs/2203.05482)
    """
    if weights is None:
        return total(stack).div_(len(stack))
    scale = sum(check_weights(weights, len(stack)))
    if scale == 0:
        raise DegenerateError(f"weights {list(weights)} sum to zero: no mean; weighted() takes their sum as it is")
    return weighted(stack, weights).div_(scale)


@runs("element")
def total(stack: Tensor) -> Tensor:
    """Add the vectors up, `sum_i x_i`: task arithmetic, whose coefficient is the scale of `apply`.

    Args:
        stack: `(n, *shape)`, any float dtype.

    Returns:
        `(*shape)`, the dtype of the stack.

    Examples:
        >>> import torch
        >>> total(torch.tensor([[1.0, 2.0], [3.0, 6.0]]))
        tensor([4., 8.])

    References:
        [Ilharco et al., Editing Models with Task Arithmetic, 2022](https://arxiv.org/abs/2212.04089)
    """
    result = stack[0].clone()
    for x in stack[1:]:
        result += x
    return result


@runs("element")
def weighted(stack: Tensor, weights: Sequence[float]) -> Tensor:
    """Add the vectors up with weights, `sum_i w_i x_i`, and divide by nothing.

    Args:
        stack: `(n, *shape)`, any float dtype.
        weights: n numbers of any sign.

    Returns:
        `(*shape)`, the dtype of the stack.

    Raises:
        RangeError: a wrong number of weights.

    Examples:
        >>> import torch
        >>> weighted(torch.tensor([[1.0, 2.0], [3.0, 6.0]]), [1, -1])
        tensor([-2., -4.])
    """
    first, *rest = check_weights(weights, len(stack))
    result = stack[0] * first
    for x, weight in zip(stack[1:], rest, strict=True):
        result += x * weight  # not add_(x, alpha=weight), which is fused and has other bits than every peer's
    return result


def added(stack: Tensor, factors: Sequence[float]) -> Tensor:
    """The sum of the vectors times their factors; ones cost nothing."""
    return total(stack) if all(factor == 1 for factor in factors) else weighted(stack, factors)


def check_weights(weights: Sequence[float], n: int) -> list[float]:
    """The weights as floats, refused unless there is one for each vector."""
    values = [float(weight) for weight in weights]
    if len(values) != n:
        raise RangeError(f"weights must be one number per vector; got {len(values)} for {n} vectors")
    return values


def factors_of(weights: Sequence[float] | None, n: int) -> list[float]:
    """The weights as floats, 1 for each vector by default."""
    return [1.0] * n if weights is None else check_weights(weights, n)
