"""Merges of what each task needs: masks by comparison with the multi-task vector, or by magnitude."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .._engine.pieces import HERE, Place
from .._engine.select import Count, masked
from ..errors import RangeError
from ..rules import Scope, runs
from ..signs import Zero
from ..sparsify import topk_cuts
from ._sums import total
from ._ties import ties, ties_majority

__all__ = ["consensus_ta", "consensus_ties", "localize_and_stitch", "tall_masks_of"]


def tall_masks_of(stack: Tensor, merged: Tensor, threshold: float | Sequence[float]) -> list[Tensor]:
    """Which entries of a multi-task vector each task needs, `|x_i| > threshold_i |merged - x_i|`: TALL masks.

    Args:
        stack: `(n, *shape)` of task vectors.
        merged: `(*shape)`.
        threshold: one number for all, or n.

    Returns:
        n masks `(*shape)`, bool.
    """
    given = [threshold] * len(stack) if isinstance(threshold, int | float) else list(threshold)
    if len(given) != len(stack):
        raise RangeError(f"threshold must be one number, or one per vector; got {len(given)} for {len(stack)} vectors")
    if not all(value >= 0 for value in given):
        raise RangeError(f"threshold must be at least 0; got {threshold!r}")
    return [x.abs() > (merged - x).abs().mul_(value) for x, value in zip(stack, given, strict=True)]


def _needed_by_several(stack: Tensor, merged: Tensor, threshold: float | Sequence[float], tasks: int) -> Tensor:
    """The entries of a multi-task vector that so many tasks need, zeros elsewhere."""
    if not tasks >= 0:
        raise RangeError(f"tasks must be a number of vectors, at least 0; got {tasks!r}")
    users = torch.zeros_like(merged)
    for mask in tall_masks_of(stack, merged, threshold):
        users += mask
    return masked(merged, ~(users < tasks) | merged.isnan())


@runs("element")
def consensus_ta(stack: Tensor, threshold: float | Sequence[float] = 0.4, *, tasks: int = 2) -> Tensor:
    """Add the vectors up, and keep the entries that several tasks need: consensus task arithmetic.

    `m * 1[#{i : |x_i| > threshold_i |m - x_i|} >= tasks]` with `m = sum_i x_i`. What one task alone needs ("selfish")
    and what none needs ("catastrophic") is left out. The coefficient is the scale of `apply`.

    Args:
        stack: `(n, *shape)` of task vectors, any float dtype.
        threshold: the masks' lambda, one number or n. The authors choose each task's on validation data among .2, .3,
            .4, .5 and .6; the default is the middle of these.
        tasks: how many must need an entry: 0 keeps all, more than n none.

    Returns:
        `(*shape)`, the dtype of the stack.

    Raises:
        RangeError: a threshold below 0, a wrong number of them, tasks below 0.

    Examples:
        >>> consensus_ta(torch.tensor([[1.0, 1.0, 0.1], [1.0, 0.0, -0.1]]))
        tensor([2., 0., 0.])

    References:
        [Wang et al., Localizing Task Information, 2024](https://arxiv.org/abs/2405.07813)
    """
    return _needed_by_several(stack, total(stack), threshold, tasks)


@runs("element", topk_cuts, ties_majority)
def consensus_ties(
    stack: Tensor,
    density: float = 0.2,
    threshold: float | Sequence[float] = 0.4,
    *,
    tasks: int = 2,
    scope: Scope = "global",
    count: Count = "reference",
    zero: Zero = "majority",
    at: Place = HERE,
) -> Tensor:
    """Merge by TIES with a sum, and keep the entries that several tasks need: consensus TIES.

    As `consensus_ta`, with `m = ties(stack, density, reduce="sum")` and the defaults of the authors' TIES.

    Args:
        stack: `(n, *shape)` of task vectors, any float dtype.
        density: fraction kept of each vector before the merge, in [0, 1]. The masks compare the vectors as they came.
        threshold: the masks' lambda, one number or n.
        tasks: how many must need an entry: 0 keeps all, more than n none.
        scope: of the trim: `"global"` or `"tensor"`.
        count: how a density becomes a number of entries, see `topk`.
        zero: what an exact zero elects, see `elect`.

    Returns:
        `(*shape)`, the dtype of the stack.

    Raises:
        RangeError: a density outside [0, 1], a threshold below 0, tasks below 0.
        NonFiniteError: NaN or inf, where density is below 1.

    Examples:
        >>> consensus_ties(torch.tensor([[1.0, 1.0, 0.1], [1.0, 0.0, -0.2]]), 1.0)
        tensor([2., 0., 0.])

    References:
        [Wang et al., Localizing Task Information, 2024](https://arxiv.org/abs/2405.07813)
    """
    merged = ties(stack, density, scope=scope, count=count, zero=zero, reduce="sum", at=at)
    return _needed_by_several(stack, merged, threshold, tasks)


@runs("element", topk_cuts)
def localize_and_stitch(
    stack: Tensor, density: float = 0.05, *, scope: Scope = "global", count: Count = "round", at: Place = HERE
) -> Tensor:
    """Keep the largest entries of each vector, average where several are kept: dataless Localize-and-Stitch.

    `sum_i t_i / #{i : t_i != 0}` with `t_i = topk(x_i, density)`; 0 where none is kept. Unlike in `ties`, no sign is
    elected.

    Args:
        stack: `(n, *shape)` of task vectors, any float dtype.
        density: fraction kept of each vector, in [0, 1]; 0.05 in the authors' dataless script.
        scope: of the trim: `"global"` (a region of the whole model, as in the paper) or `"tensor"`.
        count: how a density becomes a number of entries, see `topk`.

    Returns:
        `(*shape)`, the dtype of the stack.

    Raises:
        RangeError: density outside [0, 1], an unknown choice.
        NonFiniteError: NaN or inf, where density is below 1.

    Examples:
        >>> localize_and_stitch(torch.tensor([[4.0, 3.0, 0.1], [2.0, 0.2, -3.0]]), 2 / 3)
        tensor([ 3.,  3., -3.])

    References:
        [He et al., Localize-and-Stitch, 2024](https://arxiv.org/abs/2408.13656). The paper trains masks on data; this
        is its variant without any, by magnitude.
    """
    if scope == "row":
        raise RangeError("scope must be 'global' or 'tensor' here; got 'row'")
    kept = at.take(topk_cuts, stack, density, count).keep(stack, at)
    result = total(kept)
    return result.div_(total(kept.sign_().abs_()).clamp_(min=1))
