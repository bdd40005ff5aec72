"""Several backdoors in one vector, and amplified ones."""

from collections.abc import Iterable
from typing import Literal, TypeAlias

from .._engine.select import check_density
from .._vectors.backdoor import BackdoorVector
from .._vectors.checks import check_vector, checked_vectors
from .._vectors.merge import merge
from .._vectors.vector import TaskVector
from ..errors import DegenerateError, RangeError
from ..merges import consensus
from ..sparsify import topk

__all__ = ["amplify", "sparse_backdoor"]

Reduce: TypeAlias = Literal["mean", "sum", "largest"]


def sparse_backdoor(
    vectors: Iterable[BackdoorVector],
    *,
    agree: float = 1.0,
    density: float = 1.0,
    reduce: Reduce = "mean",
    match_norm: bool = True,
) -> BackdoorVector:
    """Merge several backdoor vectors into one sparse backdoor vector (SBV).

    `SBV = 1[enough agree in sign] * reduce_k BV_k`, then the `density` of largest magnitude, then scaled to the mean
    norm of the inputs. The default, unanimous signs and no further sparsification, is the sign-consistent variant that
    the paper writes SBV_SC.

    Our reading: the paper's formulas were not available to us. The mean, the unanimous signs and the restored norm are
    our choices, and each is an argument. In our own trials the restored norm is what makes a merged backdoor stronger
    than a single one.

    Args:
        vectors: backdoor vectors with the same names and shapes, at least one.
        agree: the fraction of the vectors that must have the elected sign, in (0, 1]; 1 means all.
        density: the fraction of the entries kept at the end, over all names, in [0, 1].
        reduce: `"mean"`, `"sum"`, or `"largest"`, the entry of largest magnitude.
        match_norm: scale the result to the mean norm of the inputs.

    Returns:
        A backdoor vector, to `inject`.

    Raises:
        DegenerateError: no vectors, or no entry on which enough agree.
        MismatchError: names, shapes or bases differ.
        OptionError: an argument that is not a list of task vectors.
        RangeError: a fraction outside its range, an unknown reduction.

    Examples:
        >>> import torch
        >>> values = [3.0, 1.0], [1.0, -1.0]
        >>> bvs = [BackdoorVector({"w": torch.tensor(x)}) for x in values]
        >>> sparse_backdoor(bvs, match_norm=False)["w"]
        tensor([2., 0.])

    Reference:
        [Pawlak et al., Backdoor Vectors, 2025](https://arxiv.org/abs/2510.08016)
    """
    given = checked_vectors("vectors", vectors)
    if not given:
        raise DegenerateError("vectors must not be empty; got no backdoor vectors to merge")
    merged = merge(given, consensus, agree=agree, reduce=reduce)
    if check_density(density) < 1:
        merged = merged.map(topk, density=density)
    if match_norm:
        norm = merged.norm()
        if norm == 0:
            raise DegenerateError(
                f"agree must leave an entry; got none on which {agree:g} of the {len(given)} vectors agree in sign; "
                "use a lower agree="
            )
        merged = merged * float(sum(vector.norm() for vector in given) / len(given) / norm)
    return BackdoorVector(merged)


def amplify(
    vector: BackdoorVector,
    scale: float,
    *,
    max_norm_ratio: float | None = None,
    clean: TaskVector | None = None,
) -> BackdoorVector:
    """Scale a backdoor vector up, so that it survives the merge (LoBAM), within a bound on the upload's norm.

    `scale * BV`; injected into the clean twin this is the paper's `clean + scale * (backdoored - clean)`. With a bound,
    the scale is lowered to the largest at which the upload's task vector is not much longer than the clean one:
    `||clean + scale * BV|| <= max_norm_ratio * ||clean||`.

    Args:
        vector: the backdoor vector.
        scale: LoBAM reports 3.5 to 4.5 (second-hand: the paper's tables were not available to us).
        max_norm_ratio: the bound, at least 1; needs `clean`.
        clean: the task vector of the clean twin, from the pre-trained model.

    Returns:
        A backdoor vector, to `inject` at scale 1.

    Raises:
        DegenerateError: a bound for a zero backdoor vector.
        MismatchError: names, shapes or bases differ.
        OptionError: an argument that is not a task vector.
        RangeError: a bound below 1, or one without `clean`.

    Examples:
        >>> import torch
        >>> bv = BackdoorVector({"w": torch.tensor([1.0, 0.0])})
        >>> amplify(bv, 4.0)["w"]
        tensor([4., 0.])
        >>> clean = TaskVector({"w": torch.tensor([1.0, 0.0])})
        >>> amplify(bv, 4.0, max_norm_ratio=2.0, clean=clean)["w"]
        tensor([1., 0.])

    Reference:
        [Yin et al., LoBAM, 2024](https://arxiv.org/abs/2411.16746). We solve for the bound, where another
        implementation searches by bisection.
    """
    check_vector("vector", vector)
    if max_norm_ratio is None:
        return vector * scale
    if clean is None:
        raise RangeError("max_norm_ratio must come with clean, the task vector of the clean twin; got none; use clean=")
    if not max_norm_ratio >= 1:
        raise RangeError(f"max_norm_ratio must be at least 1; got {max_norm_ratio!r}")
    check_vector("clean", clean)
    # ||c||^2 + 2 s c.b + s^2 ||b||^2 = r^2 ||c||^2, solved for the larger s
    square, product, own = float(vector.norm() ** 2), float(clean.dot(vector)), float(clean.norm() ** 2)
    if square == 0:
        raise DegenerateError("vector must not be zero; got a zero backdoor vector, which cannot be amplified")
    root = (product**2 + square * own * (max_norm_ratio**2 - 1)) ** 0.5
    return vector * min(scale, (root - product) / square)
