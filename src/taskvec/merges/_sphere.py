"""Rules on norms and angles: `(n, *shape) -> (*shape)`.

Their statistic is the matrix of dot products of the vectors over the scope; given that, they run on pieces.
"""

import math
from collections.abc import Sequence

from torch import Tensor

from .._engine.pieces import HERE, Place
from .._engine.totals import gram
from ..errors import DegenerateError, RangeError
from ..rules import Scope, runs
from ._sums import mean, weighted

__all__ = ["model_stock", "slerp"]

NEARLY_PARALLEL = 1e-6
"""Below this angle (radians, to 0 or to pi) slerp is linear: the arc has no direction to follow."""


@runs("element", gram)
def slerp(stack: Tensor, t: float, *, scope: Scope = "tensor", at: Place = HERE) -> Tensor:
    """Interpolate between two along the arc between their directions: slerp.

    `sin((1 - t) a) / sin(a) * x_0 + sin(t a) / sin(a) * x_1`, with the angle a between the two as vectors over the
    scope. Linear where they are nearly parallel or nearly opposite.

    Args:
        stack: `(2, *shape)`, any float dtype; weights or task vectors.
        t: 0 gives the first, 1 the second; outside [0, 1] it goes on along the circle.
        scope: of the angle: `"tensor"` (mergekit) or `"global"`.

    Returns:
        `(*shape)`, the dtype of the stack.

    Raises:
        RangeError: other than two inputs.
        DegenerateError: one of the two is zero over the scope and the other is not.
        NonFiniteError: NaN or inf.

    Examples:
        >>> import torch
        >>> slerp(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), 0.5)
        tensor([0.7071, 0.7071])

    References:
        [Shoemake, Animating rotation with quaternion curves, 1985](https://doi.org/10.1145/325334.325242).
        mergekit turns
        linear at a cosine of .9995; here only where the formula loses its digits.
    """
    if len(stack) != 2:
        raise RangeError(f"slerp must be given two inputs; got {len(stack)}; for more take a mean of directions")
    _check_scope(scope)
    (first, product), (_, second) = at.take(gram, stack)
    if (first == 0) != (second == 0):
        raise DegenerateError("slerp has no angle to a zero vector; use mean(weights=[1 - t, t])")
    return weighted(stack, _slerp_factors(first, second, product, t))


def _slerp_factors(first: float, second: float, product: float, t: float) -> tuple[float, float]:
    if first == 0:
        return 1 - t, t
    angle = math.acos(max(-1.0, min(1.0, product / math.sqrt(first) / math.sqrt(second))))
    if min(angle, math.pi - angle) < NEARLY_PARALLEL:
        return 1 - t, t
    return math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)


@runs("element", gram)
def model_stock(stack: Tensor, *, scope: Scope = "tensor", at: Place = HERE) -> Tensor:
    """Shrink the mean difference by how little the fine-tunes agree: Model Stock.

    `t * mean_i x_i` with `t = n c / (1 + (n - 1) c)` and c the mean cosine of all pairs over the scope. Applied to the
    base at scale 1 this is the paper's `t * mean(w_i) + (1 - t) * w_0`.

    Args:
        stack: `(n, *shape)` of task vectors, n >= 2, any float dtype.
        scope: of the cosines: `"tensor"` as in the paper, or `"global"`.

    Returns:
        `(*shape)`, the dtype of the stack; zeros where fewer than two vectors are not zero.

    Raises:
        RangeError: fewer than two vectors.
        NonFiniteError: NaN or inf.

    Examples:
        >>> import torch
        >>> model_stock(torch.tensor([[1.0, 0.0], [1.0, 0.0]]))
        tensor([1., 0.])

    References:
        [Jang et al., Model Stock, 2024](https://arxiv.org/abs/2403.19522). A negative mean cosine, for which
        the paper's
        formula extrapolates backwards (t = -6 at c = -.4 for three), gives t = 0 here; fusion_bench averages angles in
        place of cosines, and mergekit damps vectors of small norm.
    """
    if len(stack) < 2:
        raise RangeError(f"model_stock must be given at least two fine-tunes; got {len(stack)}")
    _check_scope(scope)
    return mean(stack).mul_(stock_factor(at.take(gram, stack)))


def stock_factor(products: Sequence[Sequence[float]]) -> float:
    """Model Stock's t from the dot products of the vectors, in [0, 1]; 0 where fewer than two are not zero."""
    n = len(products)
    norms = [math.sqrt(products[i][i]) for i in range(n)]
    cosines = [
        products[i][j] / norms[i] / norms[j] if norms[i] and norms[j] else 0.0
        for i in range(n)
        for j in range(i + 1, n)
    ]
    cosine = max(0.0, min(1.0, sum(cosines) / len(cosines)))
    return n * cosine / (1 + (n - 1) * cosine)


def _check_scope(scope: Scope) -> None:
    if scope not in ("tensor", "global"):
        raise RangeError(f"scope must be 'tensor' or 'global' here; got {scope!r}")
