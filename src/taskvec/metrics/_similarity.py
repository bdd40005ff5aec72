"""How alike vectors are: all pairs at once, one along others, or layer by layer.

Matrices are `(n, n)` float64 tensors, and each vector is read once. All functions work on parts too: `select` some
names, `map` a sparsifier first, or use `by_layer` for each layer by itself.
"""

from collections.abc import Callable, Generator, Iterable, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from .._engine.names import check_aligned
from .._engine.pools import single_thread
from .._engine.run import measure
from .._engine.totals import gram, numbers_in, over
from .._vectors.checks import check_vector, checked_vectors
from .._vectors.fingerprint import common_meta
from .._vectors.show import layer_of
from .._vectors.vector import TaskVector
from ..errors import DegenerateError, NonFiniteError
from ..rules import Look, Place

__all__ = ["by_layer", "coefficients", "cosine_matrix", "projection", "sign_agreement", "spectrum", "support_overlap"]

T = TypeVar("T")
V = TypeVar("V", bound=TaskVector)


def cosine_matrix(vectors: Iterable[TaskVector]) -> Tensor:
    """Compute the cosines of all pairs of vectors, over all entries.

    Args:
        vectors: task vectors with the same names and shapes.

    Returns:
        `(n, n)` float64, symmetric, ones on the diagonal.

    Raises:
        DegenerateError: no vectors, or a zero one.
        MismatchError: names, shapes or bases differ.
        NonFiniteError: NaN or inf.
        OptionError: an argument that is not a list of task vectors.

    Examples:
        >>> entries = [1.0, 0.0], [0.0, 2.0], [1.0, 1.0]
        >>> cosine_matrix([TaskVector({"w": torch.tensor(w)}) for w in entries])
        tensor([[1.0000, 0.0000, 0.7071],
                [0.0000, 1.0000, 0.7071],
                [0.7071, 0.7071, 1.0000]], dtype=torch.float64)
    """
    dots = _dots(checked_vectors("vectors", vectors))
    norms = _norms(dots, "vector")
    cosines = (dots / norms.outer(norms)).clamp(-1, 1)
    cosines.fill_diagonal_(1)
    return cosines


def sign_agreement(vectors: Iterable[TaskVector]) -> Tensor:
    """Compute the fraction of entries with the same sign, for all pairs of vectors, where neither is zero.

    Independent vectors agree in half of their entries; equal ones in all, opposite ones in none. Unlike the cosine,
    the fraction does not weigh entries by their magnitude.

    Args:
        vectors: task vectors with the same names and shapes.

    Returns:
        `(n, n)` float64 in [0, 1], symmetric; NaN for a pair without a common non-zero entry.

    Raises:
        DegenerateError: no vectors.
        MismatchError: names, shapes or bases differ.
        NonFiniteError: NaN or inf.
        OptionError: an argument that is not a list of task vectors.

    Examples:
        >>> entries = [1.0, 2.0, 0.0], [3.0, -1.0, 5.0]
        >>> sign_agreement([TaskVector({"w": torch.tensor(w)}) for w in entries])
        tensor([[1.0000, 0.5000],
                [0.5000, 1.0000]], dtype=torch.float64)
    """
    same, _, both = _counted(vectors)
    return same / both


def support_overlap(vectors: Iterable[TaskVector]) -> Tensor:
    """Compute the overlap of the non-zero entries of all pairs of vectors: intersection over union (Jaccard).

    For dense vectors, sparsify first: `support_overlap(v.map(topk, density=0.1) for v in vectors)`. Random supports of
    density p overlap in p / (2 - p), which is 5.3 % for p = 0.1.

    Args:
        vectors: task vectors with the same names and shapes.

    Returns:
        `(n, n)` float64 in [0, 1], symmetric; NaN for a pair of zero vectors.

    Raises:
        DegenerateError: no vectors.
        MismatchError: names, shapes or bases differ.
        NonFiniteError: NaN or inf.
        OptionError: an argument that is not a list of task vectors.

    Examples:
        >>> entries = [1.0, 2.0, 0.0], [0.0, -1.0, 5.0]
        >>> support_overlap([TaskVector({"w": torch.tensor(w)}) for w in entries])
        tensor([[1.0000, 0.3333],
                [0.3333, 1.0000]], dtype=torch.float64)
    """
    _, own, both = _counted(vectors)
    return both / (own[:, None] + own[None, :] - both)


def projection(vector: TaskVector, on: TaskVector) -> Tensor:
    """Compute how much of one vector lies along another: `<v, w> / <w, w>`.

    `projection(v, w) * w` is the part of `v` along `w`. Unlike the cosine it is not symmetric, and it grows with `v`.

    Args:
        vector: the vector v.
        on: the direction w, not zero.

    Returns:
        0-d float64.

    Raises:
        DegenerateError: the direction is zero.
        MismatchError: names, shapes or bases differ.
        NonFiniteError: NaN or inf.
        OptionError: an argument that is not a task vector.

    Examples:
        >>> v, w = (TaskVector({"w": torch.tensor(x)}) for x in ([3.0, 4.0], [2.0, 0.0]))
        >>> float(projection(v, w))
        1.5
    """
    check_vector("vector", vector)
    check_vector("on", on)
    return coefficients([vector], [on])[0, 0]


def coefficients(vectors: Iterable[TaskVector], bank: Iterable[TaskVector]) -> Tensor:
    """Express each vector as a weighted sum of the vectors in a bank, by least squares.

    The `C` that minimizes `||v_i - sum_j C[i, j] b_j||` for every i. It is computed from dot products alone, so every
    vector is read once and may have any number of entries. Directions in which the bank is degenerate to about eight
    digits are left out (the solution of least norm).

    Args:
        vectors: n task vectors.
        bank: k task vectors with the same names and shapes.

    Returns:
        `(n, k)` float64.

    Raises:
        DegenerateError: no vectors, an empty bank, or a zero vector in the bank.
        MismatchError: names, shapes or bases differ.
        NonFiniteError: NaN or inf.
        OptionError: an argument that is not a list of task vectors.

    Examples:
        >>> b = [TaskVector({"w": torch.tensor(x)}) for x in ([1.0, 0, 0], [0, 2.0, 0])]
        >>> coefficients([TaskVector({"w": torch.tensor([3.0, 2.0, 7.0])})], b)
        tensor([[3., 1.]], dtype=torch.float64)
    """
    given, probes = checked_vectors("vectors", vectors), checked_vectors("bank", bank)
    if not probes:
        raise DegenerateError("bank must not be empty; got no vectors to express the others by")
    dots = _dots([*given, *probes])
    n = len(given)
    if n == 0:
        raise DegenerateError("vectors must not be empty; got no vectors to express by the bank")
    norms = _norms(dots[n:, n:], "bank vector")
    # in units of the bank's norms, so that a short probe is as good a direction as a long one
    gram = dots[n:, n:] / norms.outer(norms)
    with single_thread():
        inverse: Tensor = cast("Any", torch.linalg).pinv(gram, hermitian=True, rtol=1e-8)
        return (dots[:n, n:] / norms) @ inverse / norms


def spectrum(vector: TaskVector) -> dict[str, Tensor]:
    """Compute the singular values of every matrix in a vector.

    Tensors of more than two dimensions are flattened behind the first. The bits do not depend on the number of torch
    threads.

    Args:
        vector: a task vector; a lazy one is read matrix by matrix.

    Returns:
        Name -> `(min(rows, columns),)` float64, largest first; names of fewer than two dimensions are left out.

    Raises:
        NonFiniteError: NaN or inf, naming the tensor.
        OptionError: an argument that is not a task vector.

    Examples:
        >>> w = torch.tensor([[3.0, 0.0], [0.0, -4.0]])
        >>> spectrum(TaskVector({"w": w, "b": torch.ones(2)}))
        {'w': tensor([4., 3.], dtype=torch.float64)}
    """
    check_vector("vector", vector)
    specs = vector.source.specs
    names = [name for name, spec in specs.items() if len(spec.shape) >= 2 and spec.entries]
    vector = vector.select(*names).check() if names else vector
    values = cast("Any", torch.linalg).svdvals
    with single_thread():
        return {name: values(vector[name].detach().to(torch.float64).flatten(1)) for name in names}


def by_layer(
    measure: Callable[[list[V]], T], vectors: Iterable[V], *, layer: Callable[[str], str] = layer_of
) -> dict[str, T]:
    """Apply a measure of several vectors to each layer by itself.

    Args:
        measure: such as `cosine_matrix`; it is given the part of every vector in one layer.
        vectors: task vectors with the same names and shapes.
        layer: a tensor's name -> the name of its layer; by default up to its first number (`blocks.0`), or its first
            part.

    Returns:
        Layer -> measure, in the vectors' order of names.

    Raises:
        DegenerateError: no vectors, or an error of the measure.
        MismatchError: names or shapes differ.
        OptionError: an argument that is not a list of task vectors.

    Examples:
        >>> a, b = torch.tensor([1.0]), torch.tensor([-1.0])
        >>> v, w = TaskVector({"a.w": a, "b.w": a}), TaskVector({"a.w": a, "b.w": b})
        >>> {k: float(m[0, 1]) for k, m in by_layer(cosine_matrix, [v, w]).items()}
        {'a': 1.0, 'b': -1.0}
    """
    given = checked_vectors("vectors", vectors)
    _check(given)
    layers: dict[str, list[str]] = {}
    for name in given[0]:
        layers.setdefault(layer(name), []).append(name)
    return {own: measure([vector.select(*names) for vector in given]) for own, names in layers.items()}


def _check(given: Sequence[TaskVector]) -> None:
    if not given:
        raise DegenerateError("vectors must not be empty; got no vectors to compare")
    check_aligned({f"vector {i}": vector.source.specs for i, vector in enumerate(given)}, "compare")
    common_meta([vector.meta for vector in given], "compare")


def _dots(given: Sequence[TaskVector]) -> Tensor:
    _check(given)
    dots = measure([vector.source for vector in given], list(given[0]), gram)
    return torch.tensor(dots, dtype=torch.float64, device=_device(given[0]))


def _norms(dots: Tensor, who: str) -> Tensor:
    norms = dots.diagonal().sqrt()
    for i, norm in enumerate(numbers_in(norms)):
        if norm == 0:
            raise DegenerateError(f"{who} {i} must have a direction; got a zero vector")
    return norms


def _counted(vectors: Iterable[TaskVector]) -> tuple[Tensor, Tensor, Tensor]:
    """Entries of the same sign by pair, non-zero ones by vector, and those where both of a pair are not zero."""
    given = checked_vectors("vectors", vectors)
    _check(given)
    same, both = measure([vector.source for vector in given], list(given[0]), _signs)
    return same, both.diagonal(), both


def _device(vector: TaskVector) -> torch.device:
    """Where a vector lies."""
    return next((vector.source.device(name) for name in vector), torch.device("cpu"))


def _signs(n: int, entries: int) -> Generator[Look, list[Any], Tensor]:
    """The statistic of `_counted`."""
    del n, entries
    return (yield from over(_pairs))


def _pairs(stack: Tensor, at: Place) -> Tensor:
    del at
    if not bool(stack.isfinite().all()):
        raise NonFiniteError("NaN or inf")  # the engine adds the tensor's name
    signs = stack.reshape(len(stack), -1).sign().to(torch.float64)
    present = signs.abs()
    both, product = present @ present.T, signs @ signs.T  # integers: exact in whatever order they are added
    return torch.stack([(both + product) / 2, both])
