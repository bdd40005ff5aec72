"""Moving a vector to another base: a fine-tune of one model applied to the next version of it."""

from collections.abc import Mapping
from typing import TypeVar

from torch import Tensor

from ._engine.pieces import HERE, Place
from ._engine.totals import gram
from ._vectors.merge import merge
from ._vectors.vector import TaskVector
from .errors import RangeError
from .merges._sums import weighted
from .rules import Scope, runs

__all__ = ["orthogonal_shift"]

V = TypeVar("V", bound=TaskVector)


def orthogonal_shift(
    vector: V, old: Mapping[str, Tensor], new: Mapping[str, Tensor], beta: float = 1.0, *, scope: Scope = "tensor"
) -> V:
    """Take out of a vector what the new base has, or has lost, already, so that it can be applied there.

    `x - beta * <x, d> / <d, d> * d` with `d = new - old`: with beta 1 the vector is orthogonal to the step between the
    bases.

    Args:
        vector: a difference from the old base.
        old: the base that it was taken from.
        new: the base that it will be applied to, with the same names and shapes.
        beta: how much of the projection is taken out; 0 gives the vector itself.
        scope: of the projection: `"tensor"` or `"global"`.

    Returns:
        A vector of the new base, lazy if any of the three is.

    Raises:
        MismatchError: names or shapes differ, or the vector is of another base than the old one.
        RangeError: another scope.
        NonFiniteError: NaN or inf.

    Examples:
        >>> import torch
        >>> old, new = {"w": torch.zeros(2)}, {"w": torch.tensor([2.0, 0.0])}
        >>> orthogonal_shift(TaskVector.between(old, {"w": torch.tensor([1.0, 1.0])}), old, new)["w"]
        tensor([0., 1.])
    """
    if scope == "row":
        raise RangeError("scope must be 'tensor' or 'global' here; got 'row'")
    names = list(vector)
    step = TaskVector.between(old, new, include=names)
    moved = merge([vector, step], apart_from, beta=beta, scope=scope)
    return type(vector)(moved, meta={**vector.meta, **TaskVector.between(new, old, include=names).meta})


@runs("element", gram)
def apart_from(stack: Tensor, beta: float, *, scope: Scope = "tensor", at: Place = HERE) -> Tensor:
    """The first of two less its projection on the second."""
    del scope
    (_, product), (_, square) = at.take(gram, stack)
    return weighted(stack, [1.0, -beta * product / square if square else 0.0])


def __dir__() -> list[str]:  # completion shows what is public
    return __all__
