"""RegMean: a merge of linear maps that takes the statistics of their inputs."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from ..errors import DegenerateError, MismatchError, NonFiniteError, RangeError
from ..rules import runs
from ._sums import mean

__all__ = ["regmean"]


@runs("tensor")
def regmean(
    stack: Tensor,
    gram: Sequence[Tensor] | None = None,
    *,
    off_diagonal: float = 0.9,
    ridge: float = 1e-6,
    transposed: bool = False,
) -> Tensor:
    """Find the linear map whose outputs are nearest to those of all, each on its own inputs: RegMean.

    `W = (sum_i W_i G_i) (sum_i G_i)^-1` for weights `(out, in)`, with each Gram matrix's off-diagonal entries scaled
    down and a ridge of `ridge` times the mean diagonal added, so that inputs which are always zero get the mean. It is
    linear, so it merges task vectors as it merges weights. Tensors without a Gram matrix are averaged.

    Args:
        stack: `(n, out, in)` weights or task vectors, any float dtype; any shape where there is no Gram matrix.
        gram: n matrices `(in, in)`, such as `linear_grams(...).matrices` of each model, as a list of mappings.
        off_diagonal: what off-diagonal entries are multiplied by, in [0, 1]: 0.9 in the paper (second-hand), 0.1 in
            BadMerging's code.
        ridge: relative to the mean diagonal of all.
        transposed: the weights are `(in, out)`.

    Returns:
        `(*shape)`, the dtype of the stack.

    Raises:
        MismatchError: a Gram matrix that does not fit the weights.
        DegenerateError: without a ridge, matrices whose sum is singular.
        RangeError: an option outside its range, a wrong number of matrices.
        NonFiniteError: a Gram matrix with NaN or inf.

    Examples:
        >>> stack = torch.tensor([[[1.0, 1.0]], [[3.0, 3.0]]])
        >>> regmean(stack, [torch.diag(torch.tensor([1.0, 0.0])), torch.eye(2)], ridge=0.0)
        tensor([[2., 3.]])

    References:
        [Jin et al., Dataless Knowledge Fusion, 2022](https://arxiv.org/abs/2212.09849)
    """
    if not 0 <= off_diagonal <= 1 or not ridge >= 0:
        raise RangeError(f"off_diagonal must be in [0, 1] and ridge at least 0; got {off_diagonal!r} and {ridge!r}")
    if gram is None:
        return mean(stack)
    if len(gram) != len(stack):
        raise RangeError(f"gram must be one matrix per model; got {len(gram)} for {len(stack)} models")
    weights = stack.transpose(1, 2) if transposed and stack.ndim == 3 else stack
    inputs = weights.shape[-1]
    if weights.ndim != 3 or any(g.shape != (inputs, inputs) for g in gram):
        raise MismatchError(
            f"Gram matrices of {[tuple(g.shape) for g in gram]} do not fit weights of {tuple(stack.shape[1:])}"
        )
    if not all(bool(g.isfinite().all()) for g in gram):
        raise NonFiniteError("a Gram matrix holds NaN or inf; collect it from finite inputs")
    wide = [g.to(device=stack.device, dtype=torch.float64) for g in gram]
    ridges = (
        ridge * torch.stack([g.diagonal().mean() for g in wide]).mean()
    )  # the same for all: a mean where it decides
    matrices = [_conditioned(g, off_diagonal, ridges) for g in wide]
    total = matrices[0].clone()
    product = weights[0].to(torch.float64) @ matrices[0]
    for w, g in zip(weights[1:], matrices[1:], strict=True):
        total += g
        product += w.to(torch.float64) @ g
    try:
        solved: Tensor = cast("Any", torch.linalg).solve(total, product, left=False)
    except RuntimeError as error:  # torch's LinAlgError is one
        raise DegenerateError("the sum of the Gram matrices is singular: give more data, or ridge=1e-6") from error
    merged = solved.transpose(0, 1) if transposed else solved
    return merged.to(stack.dtype)


def _conditioned(gram: Tensor, off_diagonal: float, ridge: Tensor) -> Tensor:
    return off_diagonal * gram + torch.diag((1 - off_diagonal) * gram.diagonal() + ridge)
