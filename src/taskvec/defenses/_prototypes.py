"""Prototype purification: suppress the singular directions of an update that known backdoors share."""

from collections.abc import Iterable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from .._engine.pools import single_thread
from .._vectors.backdoor import BackdoorVector
from .._vectors.checks import check_models, check_vector, checked_vectors
from .._vectors.merge import merge
from .._vectors.model import Params
from .._vectors.vector import TaskVector
from ..errors import DegenerateError, RangeError
from ..merges import mean
from ..metrics import cosine_matrix
from ..rules import runs

__all__ = ["prototype", "purify"]


def prototype(vector: TaskVector, pool: Iterable[BackdoorVector]) -> BackdoorVector:
    """Choose the backdoor vector of a pool that is most like a suspect vector: a member, or the mean of all.

    Requires a pool of the defender's own backdoor vectors; nothing of the attack. Cost: the dot products of all
    vectors.

    Args:
        vector: the suspect task vector, of a contributor or a merge.
        pool: backdoor vectors with the same names and shapes.

    Returns:
        The one of greatest cosine with the vector, among the members and their mean.

    Raises:
        DegenerateError: an empty pool, a zero vector.
        MismatchError: names, shapes or bases differ.
        OptionError: an argument that is not a task vector, or not a list of them.

    Examples:
        >>> pool = [BackdoorVector({"w": w}) for w in torch.eye(2)]
        >>> prototype(TaskVector({"w": torch.tensor([3.0, 4.0])}), pool)["w"]
        tensor([0.5000, 0.5000])
    """
    check_vector("vector", vector)
    members = checked_vectors("pool", pool)
    if not members:
        raise DegenerateError("pool must not be empty; got an empty pool, which has no prototype")
    candidates = [*members, BackdoorVector(merge(members, mean))] if len(members) > 1 else members
    cosines = cosine_matrix([vector, *candidates])[0, 1:]
    return candidates[int(cosines.argmax())]


def purify(
    suspect: Params,
    base: Params,
    pool: Iterable[BackdoorVector],
    strength: float = 1.0,
    *,
    energy: float = 0.5,
    alignment: float = 0.0,
) -> Params:
    """Suppress the singular directions of an update that a pool's prototype has, too (after ProtoPurify).

    With `P` the pool's `prototype` and `W = U S V^T` the suspect's update, matrix by matrix: component i has the share
    `a_i^2 = (u_i^T P v_i)^2` of the prototype. The components of largest share that together hold the fraction
    `energy` of `sum_i a_i^2` are multiplied by `1 - strength`. Tensors of more than two dimensions are flattened behind
    the first; those of fewer stay as they are. What the paper's text leaves open is our choice. The bits do not depend
    on the number of torch threads.

    Requires the base, and a pool of the defender's own backdoor vectors; nothing of the attack, no data. Cost: a thin
    SVD of every matrix.

    Args:
        suspect: a contributor's model, or a merge.
        base: the pre-trained model.
        pool: the defender's backdoor vectors.
        strength: 0 leaves the components, 1 removes them; more than 1 reverses them.
        energy: in (0, 1], the fraction of the shared part that is suppressed.
        alignment: matrices whose cosine with the prototype's is lower stay as they are, in [-1, 1].

    Returns:
        The purified model.

    Raises:
        DegenerateError: an empty pool, or an update of zero.
        MismatchError: names, shapes or bases differ.
        OptionError: an argument that is not a model's weights, or not a list of task vectors.
        RangeError: an option outside its range.

    Examples:
        >>> base = {"w": torch.zeros(2, 2)}
        >>> suspect = {"w": torch.tensor([[3.0, 0.0], [0.0, 1.0]])}
        >>> pool = [BackdoorVector({"w": torch.tensor([[0.0, 0.0], [0.0, 2.0]])})]
        >>> purify(suspect, base, pool)["w"]
        tensor([[3., 0.],
                [0., 0.]])

    Reference:
        [Plato's Form (ProtoPurify), 2026](https://arxiv.org/abs/2602.06887) (second-hand). Theirs also finds a boundary
        layer above which it acts; here, `select` the layers or use `alignment` instead.
    """
    if not strength >= 0:
        raise RangeError(f"strength must be at least 0; got {strength!r}; 0 leaves the model untouched")
    if not 0 < energy <= 1:
        raise RangeError(f"energy must be a fraction in (0, 1]; got {energy!r}")
    if not -1 <= alignment <= 1:
        raise RangeError(f"alignment must be a cosine, in [-1, 1]; got {alignment!r}")
    check_models(suspect=suspect, base=base)
    update = TaskVector.between(base, suspect)
    rule = partial(_shared, energy=energy, alignment=alignment)
    return (-merge([update, prototype(update, pool)], rule)).apply(suspect, strength)


@runs("tensor")
def _shared(stack: Tensor, *, energy: float, alignment: float) -> Tensor:
    """The part of an update, stack[0], in the singular directions that the prototype, stack[1], has too."""
    if stack.ndim < 3 or not stack.numel():
        return torch.zeros_like(stack[0])
    own, like = stack[0].flatten(1), stack[1].flatten(1)
    with single_thread():
        sizes = own.square().sum() * like.square().sum()
        cosine = (own * like).sum() / torch.where(sizes > 0, sizes.sqrt(), torch.ones_like(sizes))
        factors: tuple[Tensor, Tensor, Tensor] = cast("Any", torch.linalg).svd(own, full_matrices=False)
        u, s, vh = factors
        shares = ((u.T @ like) * vh).sum(1).square()
        largest = shares.sort(descending=True)
        before = largest.values.cumsum(0) - largest.values  # the share of those before it
        chosen = torch.zeros_like(s).scatter(0, largest.indices, (before < energy * shares.sum()).to(s.dtype))
        removed = (u * (s * chosen)) @ vh
    return torch.where(cosine >= alignment, removed, torch.zeros_like(own)).reshape(stack.shape[1:])
