"""Coefficients that follow from the vectors or from their layers, to be given to `merge` or `apply`.

merge(vectors, weighted, weights=metagpt(vectors)).apply(base)
merged.apply(base, scale=lines(merged, alpha=lines_alpha(vectors, merged), beta=0.5))
"""

import re
from collections.abc import Iterable, Sequence

from ._vectors.merge import merge
from ._vectors.vector import TaskVector
from .errors import DegenerateError, MissingError
from .merges import total

__all__ = ["lines", "lines_alpha", "metagpt"]

NUMBERED = re.compile(r"(?:^|\.)(\d+)(?:\.|$)")
"""The number of a layer in the name of a tensor: `encoder.layers.3.weight`."""


def metagpt(vectors: Iterable[TaskVector]) -> list[float]:
    """Weigh each vector by its share of all squared norms: MetaGPT's coefficients.

    `|x_i|^2 / sum_j |x_j|^2`.

    Args:
        vectors: task vectors.

    Returns:
        n numbers that add up to 1, for `weighted`.

    Raises:
        DegenerateError: all vectors are zero.
        NonFiniteError: NaN or inf.

    Examples:
        >>> import torch
        >>> metagpt([TaskVector({"w": torch.tensor([1.0])}), TaskVector({"w": torch.tensor([3.0])})])
        [0.1, 0.9]

    References:
        [Zhou et al., MetaGPT, 2024](https://arxiv.org/abs/2406.11385)
    """
    squares = [float(vector.norm()) ** 2 for vector in vectors]
    whole = sum(squares)
    if whole == 0:
        raise DegenerateError("all vectors are zero: no shares of their norms")
    return [own / whole for own in squares]


def lines(names: Iterable[str], alpha: float, beta: float) -> dict[str, float]:
    """Scale layers up with their depth: LiNeS.

    `alpha + beta * layer / (layers - 1)`, with the layer the first number that is a part of a name, and as many layers
    as the largest of them says; `alpha` for names without one.

    Args:
        names: of tensors, such as a vector.
        alpha: the coefficient of the first layer, and of all that is in none.
        beta: what the last layer has more.

    Returns:
        name -> coefficient, for the `scale` of `apply`.

    Raises:
        MissingError: no name has a number in it.

    Examples:
        >>> lines(["embed", "layers.0.w", "layers.1.w", "layers.2.w"], alpha=0.2, beta=0.4)
        {'embed': 0.2, 'layers.0.w': 0.2, 'layers.1.w': 0.4, 'layers.2.w': 0.6000000000000001}

    References:
        [Wang et al., LiNeS, 2024](https://arxiv.org/abs/2410.17146)
    """
    given = list(names)
    found = {name: int(match[1]) for name in given if (match := NUMBERED.search(name))}
    if not found:
        raise MissingError(f"no name has the number of a layer in it, such as 'layers.3.weight'; got {given[:4]}")
    last = max(found.values())
    return {name: alpha + beta * found.get(name, 0) / max(1, last) for name in given}


def lines_alpha(vectors: Sequence[TaskVector], merged: TaskVector) -> float:
    """The first coefficient of `lines` that the authors take after a merge: `|sum_i x_i| / (n |merged|)`.

    Args:
        vectors: task vectors.
        merged: what was made of them.

    Raises:
        DegenerateError: the merged vector is zero.

    Examples:
        >>> import torch
        >>> vectors = [TaskVector({"w": torch.tensor([1.0])}), TaskVector({"w": torch.tensor([3.0])})]
        >>> lines_alpha(vectors, vectors[1])
        0.6666666666666666

    References:
        [Wang et al., LiNeS, 2024](https://arxiv.org/abs/2410.17146)
    """
    norm = float(merged.norm())
    if norm == 0:
        raise DegenerateError("the merged vector is zero: nothing to scale")
    return float(merge(vectors, total).norm()) / len(vectors) / norm


def __dir__() -> list[str]:  # completion shows what is public
    return __all__
