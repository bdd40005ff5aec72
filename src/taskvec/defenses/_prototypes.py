"""Prototype purification: suppress the singular directions of a suspect update that known backdoors share."""

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from .._engine.run import single_thread
from .._vectors.backdoor import BackdoorVector
from .._vectors.merge import merge
from .._vectors.vector import TaskVector
from ..errors import DegenerateError, RangeError
from ..merges import mean
from ..metrics._similarity import cosine_matrix
from ..rules import runs

__all__ = ["prototype", "purify"]


def prototype(vector: TaskVector, pool: Iterable[BackdoorVector]) -> BackdoorVector:
    """The backdoor vector of a pool that is most like a suspect one: a member, or the mean of all.

    Given: a pool of the defender's own backdoor vectors. Nothing of the attack. Cost: the dot products of all vectors.

    Args:
        vector: the suspect task vector: a contributor's, or a merge's.
        pool: backdoor vectors with the same names and shapes.

    Returns:
        Of the members and their mean, the one of greatest cosine with the vector.

    Raises:
        DegenerateError: an empty pool, a zero vector.
        MismatchError: names, shapes or bases differ.

    Examples:
        >>> pool = [BackdoorVector({"w": torch.tensor(w)}) for w in ([1.0, 0.0], [0.0, 1.0])]
        >>> prototype(TaskVector({"w": torch.tensor([3.0, 4.0])}), pool)["w"]
        tensor([0.5000, 0.5000])
    """
    members = list(pool)
    if not members:
        raise DegenerateError("an empty pool: there is no prototype")
    candidates = [*members, BackdoorVector(merge(members, mean))] if len(members) > 1 else members
    cosines = cosine_matrix([vector, *candidates])[0, 1:]
    return candidates[int(cosines.argmax())]


def purify(
    suspect: Mapping[str, Tensor],
    base: Mapping[str, Tensor],
    pool: Iterable[BackdoorVector],
    strength: float = 1.0,
    *,
    energy: float = 0.5,
    alignment: float = 0.0,
) -> Mapping[str, Tensor]:
    """Prototype purification, after ProtoPurify: ours in all that its text leaves open.

    With `P` the pool's `prototype` and `W = U S V^T` the suspect's update, matrix by matrix: component i has the share
    `a_i^2 = (u_i^T P v_i)^2` of the prototype. The components of largest share that together hold the `energy` of
    `sum_i a_i^2` are multiplied by `1 - strength`. Other tensors than matrices stay (those of more dimensions are
    flattened behind the first).

    Given: the base, and a pool of the defender's own backdoor vectors. Nothing of the attack, no data. Cost: a thin SVD
    of every matrix.

    Args:
        suspect: a contributor's model, or a merge.
        base: the pre-trained model.
        pool: the defender's backdoor vectors.
        strength: 1 removes the components, 0 leaves them; more than 1 turns them round.
        energy: in (0, 1], how much of what the prototype shares with the update is suppressed.
        alignment: matrices whose cosine with the prototype's is lower are left alone, in [-1, 1].

    Returns:
        The purified model.

    Raises:
        DegenerateError: an empty pool, or an update of zero.
        MismatchError: names, shapes or bases differ.
        RangeError: outside their ranges.

    Examples:
        >>> base, suspect = {"w": torch.zeros(2, 2)}, {"w": torch.tensor([[3.0, 0.0], [0.0, 1.0]])}
        >>> pool = [BackdoorVector({"w": torch.tensor([[0.0, 0.0], [0.0, 2.0]])})]
        >>> purify(suspect, base, pool)["w"]
        tensor([[3., 0.],
                [0., 0.]])

    References:
        [Plato's Form (ProtoPurify), 2026](https://arxiv.org/abs/2602.06887) (second-hand). Theirs also finds a boundary
        layer above which it acts; `select` the layers, or `alignment`, takes its place here.
    """
    if not strength >= 0:
        raise RangeError(f"strength must be at least 0; got {strength!r}")
    if not 0 < energy <= 1:
        raise RangeError(f"energy is a fraction in (0, 1], not {energy!r}")
    if not -1 <= alignment <= 1:
        raise RangeError(f"alignment is a cosine, in [-1, 1], not {alignment!r}")
    update = TaskVector.between(base, suspect)
    rule = partial(_shared, energy=energy, alignment=alignment)
    with single_thread():  # an SVD changes bits with the number of threads
        shared = merge([update, prototype(update, pool)], rule)
        return (-shared).apply(suspect, strength)


@runs("tensor")
def _shared(stack: Tensor, *, energy: float, alignment: float) -> Tensor:
    """The part of an update, stack[0], in the singular directions that the prototype, stack[1], has too."""
    if stack.ndim < 3 or not stack.numel():
        return torch.zeros_like(stack[0])
    own, like = stack[0].flatten(1), stack[1].flatten(1)
    sizes = own.square().sum() * like.square().sum()
    cosine = (own * like).sum() / torch.where(sizes > 0, sizes.sqrt(), torch.ones_like(sizes))
    factors: tuple[Tensor, Tensor, Tensor] = cast("Any", torch.linalg).svd(own, full_matrices=False)
    u, s, vh = factors
    shares = ((u.T @ like) * vh).sum(1).square()
    largest = shares.sort(descending=True)
    before = largest.values.cumsum(0) - largest.values  # the share of those before it
    chosen = torch.zeros_like(s).scatter(0, largest.indices, (before < energy * shares.sum()).to(s.dtype))
    return torch.where(cosine >= alignment, (u * (s * chosen)) @ vh, torch.zeros_like(own)).reshape(stack.shape[1:])
