"""Rules on norms and angles: `(n, *shape) -> (*shape)`.

Their statistic is the matrix of dot products of the vectors over the scope; given that, they run on pieces.
"""

import math
from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from .._engine.pieces import HERE, Place
from .._engine.pools import single_thread
from .._engine.totals import gram, numbers_in
from ..errors import DegenerateError, NonFiniteError, RangeError
from ..rules import Scope, runs
from ._sums import check_weights, factors_of, total, weighted

__all__ = ["karcher", "model_stock", "nuslerp", "slerp"]

Products: TypeAlias = Sequence[Sequence[float]]
"""The dot products of all pairs of vectors."""

SINGULAR = 1e-6
"""A divisor of Model Stock's that is taken for 0 (mergekit's bound): the vectors add up to nothing."""

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
        scope: of the angle: `"tensor"` (mergekit), `"global"` or `"row"`.

    Returns:
        `(*shape)`, the dtype of the stack.

    Raises:
        RangeError: other than two inputs, an unknown scope.
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
        raise RangeError(f"slerp must be given two inputs; got {len(stack)}; for more use karcher")

    return _by_products(stack, lambda products: _slerp_factors(products, t), scope, at)


def _slerp_factors(products: Products, t: float) -> tuple[float, float]:
    (first, product), (_, second) = products
    if (first == 0) != (second == 0):
        raise DegenerateError("slerp has no angle to a zero vector; use mean(weights=[1 - t, t])")
    if first == 0:
        return 1 - t, t
    angle = math.acos(max(-1.0, min(1.0, product / math.sqrt(first) / math.sqrt(second))))
    if min(angle, math.pi - angle) < NEARLY_PARALLEL:
        return 1 - t, t
    return math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)


@runs("element", gram)
def nuslerp(
    stack: Tensor, weights: Sequence[float] = (1.0, 1.0), *, scope: Scope = "tensor", at: Place = HERE
) -> Tensor:
    """Interpolate between two along the arc between their directions, by weights: NuSLERP.

    `slerp(stack, t)` with `t = w_1 / (w_0 + w_1)`.

    Args:
        stack: `(2, *shape)`, any float dtype; weights or task vectors.
        weights: two numbers whose sum is not zero.
        scope: of the angle: `"tensor"`, `"row"` or `"global"`.

    Returns:
        `(*shape)`, the dtype of the stack.

    Raises:
        RangeError: other than two inputs or two weights.
        DegenerateError: weights whose sum is zero; one of the two is zero over the scope and the other is not.
        NonFiniteError: NaN or inf.

    Examples:
        >>> import torch
        >>> nuslerp(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), [1, 2])
        tensor([0.5000, 0.8660])

    References:
        mergekit, whose rows are along the last dimension (its option `nuslerp_row_wise` takes those along the first),
        and which takes t = 0.5 where the weights add up to zero.
    """
    first, second = check_weights(weights, 2)
    if first + second == 0:
        raise DegenerateError(f"weights {list(weights)} sum to zero: no place between the two")
    return slerp(stack, second / (first + second), scope=scope, at=at)


@runs("element", gram)
def karcher(
    stack: Tensor,
    weights: Sequence[float] | None = None,
    *,
    scope: Scope = "tensor",
    steps: int = 100,
    at: Place = HERE,
) -> Tensor:
    """Average directions on the sphere and norms on the line: the Karcher (Riemannian) mean.

    `(sum_i w_i |x_i|) u`, where u is the unit vector with `sum_i w_i log_u(x_i / |x_i|) = 0`: the point from which the
    arcs to all directions cancel. It lies in the span of the vectors, so their dot products are all that is needed. For
    two vectors it is `slerp` of their directions.

    Args:
        stack: `(n, *shape)`, any float dtype; weights or task vectors.
        weights: n numbers, not negative, divided by their sum; equal by default.
        scope: of directions and norms: `"tensor"` (mergekit), `"row"` or `"global"`.
        steps: of the iteration, at most; it ends where the arcs cancel to 1e-14. mergekit ends at 10, or 1e-5.

    Returns:
        `(*shape)`, the dtype of the stack. Vectors that are zero over the scope have no direction, and count in the
        mean of norms alone.

    Raises:
        RangeError: a wrong number of weights, or a negative one.
        DegenerateError: weights whose sum is zero; directions that cancel, so that there is no mean direction.
        NonFiniteError: NaN or inf.

    Examples:
        >>> import torch
        >>> karcher(torch.tensor([[2.0, 0.0], [0.0, 2.0]]))
        tensor([1.4142, 1.4142])

    References:
        [Karcher, Riemannian center of mass, 1977](https://doi.org/10.1002/cpa.3160300502); mergekit.
    """
    given = factors_of(weights, len(stack))
    if min(given) < 0:
        raise RangeError(f"weights must not be negative; got {given}")
    if sum(given) == 0:
        raise DegenerateError("weights sum to zero: no mean")
    shares = [weight / sum(given) for weight in given]
    return _by_products(stack, lambda products: _karcher_factors(products, shares, steps), scope, at)


def _karcher_factors(products: Products, shares: Sequence[float], steps: int) -> Sequence[float]:
    """What the vectors are multiplied by, found in the coordinates of their directions."""
    n = len(products)
    norms = [math.sqrt(products[i][i]) for i in range(n)]
    there = [i for i in range(n) if norms[i] and shares[i]]
    if not there:
        return [0.0] * n
    whole = sum(shares[i] for i in there)
    pulls = {i: shares[i] / whole for i in there}
    cosines = {i: {j: products[i][j] / norms[i] / norms[j] for j in there} for i in there}

    def length(c: dict[int, float]) -> float:
        return math.sqrt(max(0.0, sum(c[i] * c[j] * cosines[i][j] for i in there for j in there)))

    size = length(pulls)
    if size < NEARLY_PARALLEL:
        raise DegenerateError("the directions cancel: karcher has no mean direction; use mean()")
    mean_direction = {i: pulls[i] / size for i in there}
    for _ in range(steps):
        along = {i: max(-1.0, min(1.0, sum(mean_direction[j] * cosines[i][j] for j in there))) for i in there}
        tangent = dict.fromkeys(there, 0.0)
        for i in there:
            angle = math.acos(along[i])
            stretch = pulls[i] * (
                angle / math.sin(angle) if NEARLY_PARALLEL < angle < math.pi - NEARLY_PARALLEL else 1.0
            )
            tangent[i] += stretch
            for j in there:
                tangent[j] -= stretch * along[i] * mean_direction[j]
        step = length(tangent)
        if step < 1e-14:
            break
        turned = {i: math.cos(step) * mean_direction[i] + math.sin(step) / step * tangent[i] for i in there}
        size = length(turned)
        mean_direction = {i: turned[i] / size for i in there}
    norm = sum(share * own for share, own in zip(shares, norms, strict=True))
    return [norm * mean_direction[i] / norms[i] if i in pulls else 0.0 for i in range(n)]


@runs("element", gram)
def model_stock(stack: Tensor, *, scope: Scope = "tensor", extrapolate: bool = False, at: Place = HERE) -> Tensor:
    """Shrink the mean difference by how little the fine-tunes agree: Model Stock.

    `t * mean_i x_i` with `t = n c / (1 + (n - 1) c)` and c the mean cosine of all pairs over the scope. Applied to the
    base at scale 1 this is the paper's `t * mean(w_i) + (1 - t) * w_0`.

    Args:
        stack: `(n, *shape)` of task vectors, n >= 2, any float dtype.
        scope: of the cosines: `"tensor"` as in the paper, `"row"` (mergekit's `filter_wise`) or `"global"`.
        extrapolate: follow the formula backwards where the mean cosine is negative (mergekit); by default t is 0
            there.

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

    def factors(products: Products) -> Sequence[float]:
        return [stock_factor(products, extrapolate=extrapolate) / len(stack)] * len(stack)

    return _by_products(stack, factors, scope, at)


def stock_factor(products: Products, *, extrapolate: bool = False) -> float:
    """Model Stock's t from the dot products of the vectors; 0 where fewer than two are not zero.

    In [0, 1], but where it may extrapolate: then 0 only where the formula has no value.
    """
    n = len(products)
    norms = [math.sqrt(products[i][i]) for i in range(n)]
    cosines = [
        products[i][j] / norms[i] / norms[j] if norms[i] and norms[j] else 0.0
        for i in range(n)
        for j in range(i + 1, n)
    ]
    cosine = max(-1.0 if extrapolate else 0.0, min(1.0, sum(cosines) / len(cosines)))
    below = 1 + (n - 1) * cosine
    return n * cosine / below if abs(below) > SINGULAR else 0.0


def _by_products(stack: Tensor, factors: Callable[[Products], Sequence[float]], scope: Scope, at: Place) -> Tensor:
    """The sum of the vectors times factors that follow from their dot products, over the scope or row by row."""
    if scope not in ("global", "tensor", "row"):
        raise RangeError(f"scope must be 'global', 'tensor' or 'row'; got {scope!r}")
    if scope != "row":
        own = factors(at.take(gram, stack))
        return weighted(stack, own) if len(set(own)) > 1 else total(stack).mul_(own[0])
    n = len(stack)
    rows = (stack.flatten(2) if stack.ndim > 2 else stack.reshape(n, 1, -1)).to(torch.float64)
    if not bool(rows.isfinite().all()):
        raise NonFiniteError("NaN or inf: no statistic can be taken")
    with single_thread():
        products = [[numbers_in((rows[min(i, j)] * rows[max(i, j)]).sum(-1)) for j in range(n)] for i in range(n)]
    each = [factors([[products[i][j][k] for j in range(n)] for i in range(n)]) for k in range(rows.shape[1])]
    columns = torch.tensor(each, dtype=torch.float64, device=stack.device).reshape(-1, n).T[..., None]
    found = rows[0] * columns[0]
    for row, column in zip(rows[1:], columns[1:], strict=True):
        found += row * column
    return found.reshape(stack.shape[1:]).to(stack.dtype)
