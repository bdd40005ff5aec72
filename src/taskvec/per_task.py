"""One vector for each task: what is made of several vectors where the task is known when the model is used.

Unlike a merge, these give as many vectors as they are given, each to be applied to the base when its task is asked.
What they share or leave out makes them small to store.
"""

from collections.abc import Iterable, Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from ._engine.marks import Rule
from ._engine.pieces import HERE, Place
from ._engine.select import masked
from ._engine.totals import numbers_in, over, sum64
from ._vectors.merge import merge
from ._vectors.vector import TaskVector
from .errors import DegenerateError, RangeError
from .merges._localized import tall_masks_of
from .merges._lowrank import recomposed
from .merges._matrices import by_matrix, factors
from .merges._sums import total
from .rules import Scope, runs
from .signs import elected
from .sparsify import Passes

__all__ = ["emr", "tall_masks", "tsv_c"]


def emr(vectors: Iterable[TaskVector], *, scope: Scope = "global") -> list[TaskVector]:
    """Give each task one shared vector under a mask and a factor of its own: EMR-Merging (elect, mask, rescale).

    `r_i * u * 1[x_i * s > 0]`, with s the elected sign, `sign(sum_j x_j)`, u the entry of largest magnitude among those
    that have it, and `r_i` such that the L1 norm is that of x_i.

    Args:
        vectors: task vectors of one base.
        scope: of the norms: `"global"`, or `"tensor"`, with a factor for each.

    Returns:
        As many vectors, lazy if any is.

    Raises:
        DegenerateError: no vectors.
        RangeError: another scope.
        NonFiniteError: NaN or inf.

    Examples:
        >>> a, b = (TaskVector({"w": torch.tensor(x)}) for x in ([1.0, -2.0], [3.0, 1.0]))
        >>> [vector["w"] for vector in emr([a, b])]
        [tensor([ 1.8000, -1.2000]), tensor([4., 0.])]

    References:
        [Huang et al., EMR-Merging, 2024](https://arxiv.org/abs/2405.17461). In two of their files the authors take
        sums of tensors' mean magnitudes for the norms, in another those of the whole vector, as here; where the vectors
        add up to exactly zero they elect -, here no sign.
    """
    if scope == "row":
        raise RangeError("scope must be 'global' or 'tensor' here; got 'row'")
    return _each(vectors, emr_of, scope=scope)


def _given(vectors: Iterable[TaskVector]) -> list[TaskVector]:
    """The vectors, refused where there are none."""
    given = list(vectors)
    if not given:
        raise DegenerateError("no vectors: give at least one")
    return given


def _each(vectors: Iterable[TaskVector], rule: Rule, **options: Any) -> list[TaskVector]:
    """A merge by the rule for each task."""
    given = _given(vectors)
    return [merge(given, rule, task=task, **options) for task in range(len(given))]


def _shared(stack: Tensor) -> list[Tensor]:
    """For each task, the largest entry that has the elected sign, where its own has it too."""
    signs = elected(stack, "sum", "none", None)
    along = [x * signs for x in stack]
    largest = reduce(torch.maximum, along).clamp(min=0) * signs
    return [masked(largest, ~(x <= 0)) for x in along]  # NaN stays


def _norms(stack: Tensor, at: Place) -> Tensor:
    del at
    pairs = zip(stack, _shared(stack), strict=True)
    return torch.stack([torch.stack([sum64(x.abs()), sum64(y.abs())]) for x, y in pairs])


def emr_factors(n: int, entries: int) -> Passes:
    """The statistic of `emr`: the L1 norm of each vector over that of the shared one under its mask."""
    del n, entries
    pairs = [numbers_in(row) for row in (yield from over(_norms))]
    return [own / shared if shared else 0.0 for own, shared in pairs]


@runs("element", emr_factors)
def emr_of(stack: Tensor, task: int, *, scope: Scope = "global", at: Place = HERE) -> Tensor:
    """The rule of `emr` for one task."""
    del scope
    return _shared(stack)[task].mul_(at.take(emr_factors, stack)[task])


def tall_masks(vectors: Iterable[TaskVector], threshold: float | Sequence[float] = 0.4) -> list[TaskVector]:
    """Give each task the part of the multi-task vector that it needs: TALL masks.

    `m * 1[|x_i| > threshold_i |m - x_i|]` with `m = sum_j x_j`: one vector, and n masks of a bit an entry.

    Args:
        vectors: task vectors of one base.
        threshold: one number for all, or one for each. The authors choose each on validation data among .2, .3, .4, .5
            and .6.

    Returns:
        As many vectors, lazy if any is.

    Raises:
        DegenerateError: no vectors.
        RangeError: a threshold below 0, or a wrong number of them.

    Examples:
        >>> a, b = (TaskVector({"w": torch.tensor(x)}) for x in ([1.0, 0.1], [1.0, -2.0]))
        >>> [vector["w"] for vector in tall_masks([a, b])]
        [tensor([2., 0.]), tensor([ 2.0000, -1.9000])]

    References:
        [Wang et al., Localizing Task Information, 2024](https://arxiv.org/abs/2405.07813). fusion_bench compares with
        the base's weights less the vector in place of the vector, so that nearly all entries are kept.
    """
    return _each(vectors, tall_of, threshold=threshold)


@runs("element")
def tall_of(stack: Tensor, task: int, threshold: float | Sequence[float]) -> Tensor:
    """The rule of `tall_masks` for one task."""
    merged = total(stack)
    return masked(merged, tall_masks_of(stack, merged, threshold)[task])


def tsv_c(vectors: Iterable[TaskVector], share: float | None = None) -> list[TaskVector]:
    """Keep of each matrix of each vector its leading singular directions: TSV-C(ompress).

    `U_k S_k V_k` with `k = floor(share * min(rows, columns))`; tensors that are no matrices stay as they are. For what
    is stored of it see `save_adapter`, which keeps the factors.

    Args:
        vectors: task vectors of one base.
        share: the fraction of singular directions kept, in (0, 1]; by default one over the number of vectors.

    Returns:
        As many vectors, lazy if any is.

    Raises:
        DegenerateError: no vectors.
        RangeError: a share outside (0, 1].
        NonFiniteError: NaN or inf in a matrix.

    Examples:
        >>> a, b = (TaskVector({"w": torch.diag(torch.tensor(x))}) for x in ([3.0, 1.0], [1.0, 2.0]))
        >>> [vector["w"].diagonal() for vector in tsv_c([a, b])]
        [tensor([3., 0.]), tensor([0., 2.])]

    References:
        [Gargiulo et al., Task Singular Vectors, 2024](https://arxiv.org/abs/2412.00081)
    """
    given = _given(vectors)
    kept = 1 / len(given) if share is None else share
    if not 0 < kept <= 1:
        raise RangeError(f"share must be the fraction of singular directions kept, in (0, 1]; got {share!r}")
    return [vector.map(leading, share=kept) for vector in given]


@runs("tensor")
def leading(x: Tensor, share: float) -> Tensor:
    """The rule of `tsv_c` for one tensor."""

    def cut(stack: Tensor) -> Tensor:
        most = int(min(stack.shape[1:]) * share)
        return recomposed(*factors(stack[0], most))

    return by_matrix(x[None], cut, "mean", True)


def __dir__() -> list[str]:  # completion shows what is public
    return __all__
