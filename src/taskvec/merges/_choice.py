"""Rules that choose among the vectors, entry by entry."""

from typing import Literal

import torch
from torch import Tensor

from .._engine.select import masked
from ..errors import RangeError
from ..rules import runs
from ..signs import consistent
from ._sums import mean, total

__all__ = ["consensus", "magmax"]


@runs("element")
def magmax(stack: Tensor) -> Tensor:
    """Take, of all vectors, the entry of largest magnitude, the last of equal ones: MagMax.

    Args:
        stack: `(n, *shape)` of task vectors, any float dtype.

    Returns:
        `(*shape)`, the dtype of the stack.

    Examples:
        >>> magmax(torch.tensor([[1.0, -5.0], [-2.0, 3.0]]))
        tensor([-2., -5.])

    References:
        [Marczak et al., MagMax, 2024](https://arxiv.org/abs/2407.06322)
    """
    result = stack[0].clone()
    for x in stack[1:]:
        result = torch.where((x.abs() < result.abs()) | result.isnan(), result, x)  # a NaN stays, so that it shows
    return result


@runs("element")
def consensus(stack: Tensor, agree: float = 1.0, *, reduce: Literal["mean", "sum", "largest"] = "mean") -> Tensor:
    """Combine all vectors where enough of them agree in sign, and give zero elsewhere.

    `1[enough agree] * reduce_i x_i`; NaN where the vectors' sum is NaN. Unlike in `ties`, nothing is trimmed and
    dissenters take part where they are few.

    Args:
        stack: `(n, *shape)` of task vectors, any float dtype.
        agree: the fraction of the vectors that must have the elected sign, in (0, 1]; 1 means unanimous.
        reduce: `"mean"`, `"sum"`, or `"largest"`, the entry of largest magnitude.

    Returns:
        `(*shape)`, the dtype of the stack.

    Raises:
        RangeError: a fraction outside (0, 1], an unknown reduction.

    Examples:
        >>> consensus(torch.tensor([[1.0, 2.0, 0.0], [3.0, -2.5, 1.0]]))
        tensor([2., 0., 0.])

    References:
        [Kim et al., NegMerge, 2024](https://arxiv.org/abs/2410.05583) (unanimous, mean); Pawlak et al.,
        Backdoor Vectors,
        2025, https://arxiv.org/abs/2510.08016 (sign-consistent sparsification; our reading)
    """
    rules = {"mean": mean, "sum": total, "largest": magmax}
    if reduce not in rules:
        raise RangeError(f"reduce must be 'mean', 'sum' or 'largest'; got {reduce!r}")
    agreed = consistent(stack, agree)
    return masked(rules[reduce](stack), ~(agreed == 0))  # of NaN it is not known, and NaN stays
