"""Defences that act on each contributor's task vector before the merge. They need no data."""

from collections.abc import Iterable, Sequence
from statistics import median
from typing import TypeVar

import torch
from torch import Tensor

from .._errors import DegenerateError, RangeError
from ..merging import merge
from ..rules import runs
from ..vector import TaskVector

__all__ = ["clip_norms", "cosine_gate", "equalise_norms"]

V = TypeVar("V", bound=TaskVector)


def clip_norms(vectors: Iterable[V], limit: float | None = None) -> list[V]:
    """Shorten the vectors that are longer than a limit, to it.

    `v * min(1, limit / ||v||)`. Against amplified backdoors; a backdoor that is no longer than its neighbours passes.

    Given: nothing beyond the contributors. Cost: one pass.

    Args:
        vectors: the contributors' task vectors.
        limit: the greatest norm; by default the median of theirs.

    Returns:
        As many vectors, in the same order.

    Raises:
        DegenerateError: no vectors.
        RangeError: a limit that is not positive.
        NonFiniteError: NaN or inf.

    Example:
        >>> vectors = [TaskVector({"w": torch.tensor([x, 0.0])}) for x in (1.0, 2.0, 6.0)]
        >>> [v["w"][0].item() for v in clip_norms(vectors)]
        [1.0, 2.0, 2.0]
    """
    given, norms = _measured(vectors)
    top = median(norms) if limit is None else limit
    if not top > 0:
        raise RangeError(f"a limit on the norm is greater than 0, not {top!r}")
    return [v * (top / norm) if norm > top else v for v, norm in zip(given, norms, strict=True)]


def equalise_norms(vectors: Iterable[V], norm: float | None = None) -> list[V]:
    """Give all vectors one norm.

    `v * norm / ||v||`. Stronger than clipping: what a backdoor adds to its contributor is paid for by the rest of it.

    Given: nothing beyond the contributors. Cost: one pass.

    Args:
        vectors: the contributors' task vectors.
        norm: the norm of all; by default the median of theirs.

    Returns:
        As many vectors, in the same order.

    Raises:
        DegenerateError: no vectors, or a zero one.
        RangeError: a norm that is not positive.
        NonFiniteError: NaN or inf.

    Example:
        >>> vectors = [TaskVector({"w": torch.tensor([x, 0.0])}) for x in (1.0, 2.0, 6.0)]
        >>> [v["w"][0].item() for v in equalise_norms(vectors)]
        [2.0, 2.0, 2.0]
    """
    given, norms = _measured(vectors)
    if 0 in norms:
        raise DegenerateError(f"vector {norms.index(0)} is zero: it has no norm to change")
    common = median(norms) if norm is None else norm
    if not common > 0:
        raise RangeError(f"a norm is greater than 0, not {common!r}")
    return [v * (common / own) for v, own in zip(given, norms, strict=True)]


def _measured(vectors: Iterable[V]) -> tuple[Sequence[V], list[float]]:
    given = list(vectors)
    if not given:
        raise DegenerateError("no vectors")
    return given, [float(v.norm()) for v in given]


def cosine_gate(vector: TaskVector, reference: TaskVector, *, threshold: float = 0.35, keep: float = 0.8) -> TaskVector:
    """Mix those matrices of a vector with a trusted one's that point out of its column space (SafeMERGE's rule).

    For each matrix, `C = V V^T / ||V||_F` of the reference and `rho = cos(C W, W)`; where rho is below the threshold,
    `W` becomes `keep * W + (1 - keep) * V`. Tensors of other than two dimensions stay.

    Given: a vector that is trusted: an aligned model's, or a clean fine-tune's. No data. Cost: two products of matrices
    each.

    Args:
        vector: a contributor's task vector.
        reference: the trusted one, from the same base.
        threshold: in [-1, 1]; the code's own is 0.35.
        keep: how much stays of a matrix that fails, in [0, 1].

    Returns:
        A task vector.

    Raises:
        RangeError: outside their ranges.
        MismatchError: names, shapes or bases differ.

    Example:
        >>> vector = TaskVector({"w": torch.tensor([[0.0, 0.0], [1.0, 1.0]])})
        >>> cosine_gate(vector, TaskVector({"w": torch.tensor([[1.0, 1.0], [0.0, 0.0]])}))["w"]
        tensor([[0.2000, 0.2000],
                [0.8000, 0.8000]])

    Reference:
        Djuhera et al., SafeMERGE, 2025, https://arxiv.org/abs/2503.17239, as its code does it. There the matrices are
        LoRA updates and the reference is aligned minus base.
    """
    if not -1 <= threshold <= 1:
        raise RangeError(f"threshold is a cosine, in [-1, 1], not {threshold!r}")
    if not 0 <= keep <= 1:
        raise RangeError(f"keep is a fraction in [0, 1], not {keep!r}")
    return merge([vector, reference], _gated, threshold=threshold, keep=keep)


@runs("tensor")
def _gated(stack: Tensor, *, threshold: float, keep: float) -> Tensor:
    own, trusted = stack[0], stack[1]
    if own.ndim != 2:
        return own
    seen = trusted @ (trusted.T @ own)  # C W, but for a factor that the cosine does not see
    sizes = seen.square().sum() * own.square().sum()
    rho = (seen * own).sum() / torch.where(sizes > 0, sizes.sqrt(), torch.ones_like(sizes))
    return torch.where(rho < threshold, keep * own + (1 - keep) * trusted, own)
