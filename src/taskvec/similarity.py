"""How alike vectors are."""

from collections.abc import Iterable

from torch import Tensor

from ._errors import DegenerateError, check_aligned
from ._fingerprint import common_meta
from ._lazy import specs_of
from .rules import Total, numbers_in
from .sphere import pairwise_dots
from .vector import TaskVector

__all__ = ["cosine_matrix"]


def cosine_matrix(vectors: Iterable[TaskVector]) -> Tensor:
    """The cosines of all pairs of vectors, over all entries; each vector is read once.

    Args:
        vectors: with the same names and shapes.

    Returns:
        `(n, n)` float64, symmetric, ones on the diagonal.

    Raises:
        DegenerateError: no vectors, or a zero one.
        MismatchError: names, shapes or bases differ.
        NonFiniteError: NaN or inf.

    Example:
        >>> import torch
        >>> cosine_matrix([TaskVector({"w": torch.tensor(w)}) for w in ([1.0, 0.0], [0.0, 2.0], [1.0, 1.0])])
        tensor([[1.0000, 0.0000, 0.7071],
                [0.0000, 1.0000, 0.7071],
                [0.7071, 0.7071, 1.0000]], dtype=torch.float64)
    """
    given = list(vectors)
    if not given:
        raise DegenerateError("no vectors to compare")
    check_aligned({f"vector {i}": specs_of(vector.tensors) for i, vector in enumerate(given)}, "compare")
    common_meta([vector.meta for vector in given], "compare")
    dots = Total([vector.tensors for vector in given], list(given[0]))(pairwise_dots)
    norms = dots.diagonal().sqrt()
    for i, norm in enumerate(numbers_in(norms)):
        if norm == 0:
            raise DegenerateError(f"no cosine: vector {i} is zero")
    cosines = (dots / norms.outer(norms)).clamp(-1, 1)
    cosines.fill_diagonal_(1)
    return cosines
