"""Moving a vector to another base: a fine-tune of one model applied to the next version of it."""

from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor

from ._engine.pieces import HERE, Place
from ._engine.totals import gram
from ._vectors.fingerprint import fingerprint
from ._vectors.merge import merge
from ._vectors.model import as_model
from ._vectors.vector import TaskVector
from .errors import MismatchError, NonFiniteError, RangeError
from .merges._matrices import polar
from .merges._sums import weighted
from .rules import Scope, runs

__all__ = ["alignment", "descending", "orthogonal_shift", "transport"]

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


def descending(vector: V, gradient: Mapping[str, Tensor], new: Mapping[str, Tensor], *, flip: bool = False) -> V:
    """Keep the entries along which the loss of the new base falls: GradFix.

    `x` where `sign(x) = -sign(g)`, else 0; with `flip` all entries, `-abs(x) sign(g)`.

    Args:
        vector: a difference from the old base.
        gradient: of the loss of a few labelled samples, by every parameter of the vector, at the new base. For the
            authors' vote, the sum over samples of the signs of their gradients.
        new: the base that the gradient was taken at and the vector will be applied to.
        flip: turn the entries that point the other way, rather than leave them out.

    Returns:
        A vector of the new base, lazy if the vector is.

    Raises:
        MismatchError: names or shapes differ.
        NonFiniteError: NaN or inf in the gradient.

    Examples:
        >>> import torch
        >>> old, new = {"w": torch.zeros(3)}, {"w": torch.ones(3)}
        >>> vector = TaskVector.between(old, {"w": torch.tensor([1.0, 2.0, -3.0])})
        >>> descending(vector, {"w": torch.tensor([-0.1, 0.1, 0.1])}, new)["w"]
        tensor([ 1.,  0., -3.])

    References:
        [Rinaldi et al., Gradient-Sign Masking for Task Vector Transport, 2025](https://arxiv.org/abs/2510.09658). The
        authors' code drops the tensors it has no gradient of; here they are an error.
    """
    infinite = [name for name, x in gradient.items() if not bool(torch.as_tensor(x).isfinite().all())]
    if infinite:
        raise NonFiniteError(f"the gradient has NaN or inf in {infinite[0]!r}; was the loss finite at the new base?")
    slopes = TaskVector({name: gradient[name] for name in vector if name in gradient})
    masked = merge([vector, slopes], against, flip=flip)
    return type(vector)(masked, meta={**vector.meta, **fingerprint(as_model("new", new))})


@runs("element")
def against(stack: Tensor, *, flip: bool = False) -> Tensor:
    """The first of two where its sign is the opposite of the second's."""
    x, downhill = stack[0], -stack[1].sign()
    return x.abs() * downhill if flip else torch.where(x.sign() == downhill, x, torch.zeros_like(x))


def alignment(source: Tensor, target: Tensor) -> Tensor:
    """The orthogonal map from one model's features to another's, of the same samples: Procrustes.

    `U V^T` of `source^T target = U diag(s) V^T`: among the maps with orthonormal rows or columns, the one that brings
    `source @ map` nearest to the target.

    Args:
        source: `(samples, a)`, the inputs or the outputs of a layer of the old base.
        target: `(samples, b)`, those of the new base's layer, in the same order.

    Returns:
        `(a, b)`, float64.

    Raises:
        MismatchError: other shapes, or other numbers of samples.
        NonFiniteError: NaN or inf.

    Examples:
        >>> features = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
        >>> alignment(features, features.flip(1)).round()
        tensor([[0., 1.],
                [1., 0.]], dtype=torch.float64)
    """
    if source.ndim != 2 or target.ndim != 2 or len(source) != len(target):
        raise MismatchError(
            f"features must be (samples, features), of the same samples; got {tuple(source.shape)}, "
            f"{tuple(target.shape)}"
        )
    if not (bool(source.isfinite().all()) and bool(target.isfinite().all())):
        raise NonFiniteError("NaN or inf in the features")
    return polar(source.double().T @ target.double())


def transport(
    vector: TaskVector, into: Mapping[str, Tensor], out: Mapping[str, Tensor], new: Mapping[str, Tensor]
) -> TaskVector:
    """Express a vector in the features of another base, of any width: Theseus.

    `out^T x into` of a matrix `(outputs, inputs)`, `x out` of a bias. With orthogonal maps between the two models'
    features, the layer's answers change by what they changed by in the old base, in the new one's features.

    Args:
        vector: a difference from the old base.
        into: for each matrix, the map `(inputs, new inputs)` of what its layer is given; see `alignment`.
        out: for each matrix and bias, the map `(outputs, new outputs)` of what its layer answers.
        new: the base that the result will be applied to.

    Returns:
        A vector of the new base with the names in `out`, in the vector's dtypes, in memory. Tensors without a map, such
        as embeddings and convolutions, are left out, as the authors do: the new base keeps its own.

    Raises:
        MismatchError: a map of a tensor the vector or the new base lacks, of other sizes, or of a tensor that is
            neither matrix nor bias.

    Examples:
        >>> vector = TaskVector({"w": torch.tensor([[1.0, 2.0]])})
        >>> swap, one = torch.tensor([[0.0, 1.0], [1.0, 0.0]]), torch.ones(1, 1)
        >>> transport(vector, {"w": swap}, {"w": one}, new={"w": torch.zeros(1, 2)})["w"]
        tensor([[2., 1.]])

    References:
        Rinaldi et al., Transporting Task Vectors across Different Architectures without Training, 2026. Read in code
        only: [merge-and-rebase](https://github.com/apanariello4/merge-and-rebase), whose partial whitening and
        data-free maps are not here.
    """
    unknown = sorted({*into, *out} - {*vector}) or sorted({*into} - {*out}) or sorted({*out} - {*new})
    if unknown:
        raise MismatchError(f"no such tensor in the vector, in `out` or in the new base: {unknown}")
    moved = {name: _transported(name, vector[name], into.get(name), out[name], new[name]) for name in out}
    return TaskVector(moved, meta=fingerprint(as_model("new", new)))


def _transported(name: str, x: Tensor, into: Tensor | None, out: Tensor, new: Tensor) -> Tensor:
    if x.ndim != (1 if into is None else 2):
        raise MismatchError(f"{name!r} must be a bias, with a map in `out`, or a matrix, with one in `into` too")
    sizes = (out.shape[0], *(() if into is None else (into.shape[0],)))
    found = (out.shape[1], *(() if into is None else (into.shape[1],)))
    if sizes != x.shape or found != new.shape:
        raise MismatchError(
            f"the maps of {name!r} lead from {sizes} to {found}; the vector has {tuple(x.shape)}, the new base "
            f"{tuple(new.shape)}"
        )
    wide = out.double().T @ x.double()
    return (wide if into is None else wide @ into.double()).to(x.dtype)


def __dir__() -> list[str]:  # completion shows what is public
    return __all__
