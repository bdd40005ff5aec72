"""A bank of probes (ours): which contributor is backdoored, into which class, and which part of it to remove.

The defender runs an attack of their own on the base, once for every class of every task, and keeps the backdoor
vectors. A contributor's task vector is then expressed by the bank; a backdoored one stands out at its target class,
also for triggers that the probes were not made with. The part that agrees with those probes is removed from it, before
the merge.

    scores = bank_scores(vectors, bank)
    for flag in flagged(scores):
        vectors[flag.contributor] = disarm(vectors[flag.contributor], bank[flag.label])

It says nothing of attacks that no probe is like: see the measured limits in docs/study.md.
"""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from math import inf
from statistics import median
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from .._engine.totals import numbers_in
from .._vectors.backdoor import BackdoorVector
from .._vectors.merge import merge
from .._vectors.vector import TaskVector
from ..errors import DegenerateError, DtypeError, RangeError
from ..merges import weighted
from ..metrics._similarity import coefficients
from ..rules import runs

__all__ = ["Flag", "bank_scores", "disarm", "flagged"]

Label = TypeVar("Label", bound=Hashable)


def bank_scores(
    vectors: Iterable[TaskVector], bank: Mapping[Label, Sequence[BackdoorVector]]
) -> list[dict[Label, float]]:
    """How much of each class's probes every contributor holds.

    Each vector is expressed by all probes together, by least squares; the score of a class is the sum of its probes'
    coefficients. Around 0 for clean contributors, of either sign.

    Given: finished probes. To make them, an attack's recipe and a few labelled images of every class. Cost: the dot
    products of all vectors; with k probes, `k^2 / 2` of them.

    Args:
        vectors: the contributors' task vectors.
        bank: label, such as (task, class), -> its probes, which may differ in place, size and seed. For an honest
            figure they share no data, seed, twin or trigger with the attack.

    Returns:
        For each contributor, label -> score.

    Raises:
        DegenerateError: no vectors, an empty bank, a label without probes, a zero probe.
        MismatchError: names, shapes or bases differ.
        NonFiniteError: NaN or inf.

    Examples:
        >>> bank = {c: [BackdoorVector({"w": torch.eye(3)[c]})] for c in range(2)}
        >>> bank_scores([TaskVector({"w": torch.tensor([0.0, 0.5, 2.0])})], bank)
        [{0: 0.0, 1: 0.5}]
    """
    for label, probes in bank.items():
        if isinstance(probes, TaskVector):
            raise DtypeError(f"bank must map a label to a list of probes; got one for {label!r}; use [probe]")
    if empty := [label for label, probes in bank.items() if not probes]:
        raise DegenerateError(f"no probes for {empty[0]!r}")
    found = coefficients(vectors, [probe for probes in bank.values() for probe in probes])
    owners = [label for label, probes in bank.items() for _ in probes]
    scores = [dict.fromkeys(bank, 0.0) for _ in found]
    for row, own in zip(scores, found, strict=True):
        for label, part in zip(owners, numbers_in(own), strict=True):
            row[label] += part
    return scores


class Flag(NamedTuple, Generic[Label]):
    """A score that stands out.

    Attributes:
        contributor: its index.
        label: the class, as the bank names it.
        deviation: how far the score stands out, in robust standard deviations.
    """

    contributor: int
    label: Label
    deviation: float


def flagged(scores: Sequence[Mapping[Label, float]], threshold: float = 6.0) -> list[Flag[Label]]:
    """The contributors and classes whose scores stand out from all others.

    `(score - median) / (1.4826 * median absolute deviation) > threshold`, over the scores of all contributors and
    classes together, most of which must be clean. Only high scores count.

    Args:
        scores: as `bank_scores` gives them.
        threshold: in robust standard deviations. The default is a choice of ours, see docs/study.md for how
            often it is wrong.

    Returns:
        A `Flag` for each, the highest score first; a contributor may be there several times.

    Raises:
        DegenerateError: fewer than five scores, or more than half of them equal: there is nothing to stand out from.
        RangeError: a threshold that is not positive.

    Examples:
        >>> scores = [{0: 0.01, 1: -0.02, 2: 0.0}, {0: 0.02, 1: 0.6, 2: -0.01}]
        >>> [(flag.contributor, flag.label) for flag in flagged(scores)]
        [(1, 1)]
    """
    if not threshold > 0:
        raise RangeError(f"threshold is a number of deviations, greater than 0, not {threshold!r}")
    everything = [score for row in scores for score in row.values()]
    middle = median(everything) if everything else 0.0
    spread = 1.4826 * median([abs(score - middle) for score in everything]) if everything else 0.0
    if len(everything) < 5 or spread == 0:
        raise DegenerateError(f"{len(everything)} scores, of spread {spread:g}: there is nothing to stand out from")
    found = [Flag(i, label, (x - middle) / spread) for i, row in enumerate(scores) for label, x in row.items()]
    return sorted((flag for flag in found if flag.deviation > threshold), key=lambda flag: -flag.deviation)


def disarm(vector: TaskVector, probes: Sequence[BackdoorVector], strength: float = inf) -> TaskVector:
    """Take out of a contributor what agrees with some probes, entry by entry, and never more than there is.

    With `q` the contributor's least-squares image in the probes: where `v` and `q` have the same sign,
    `v - sign(v) min(|v|, strength |q|)`, which is 0 at the default strength; elsewhere `v`. Subtracting `strength * q`
    itself would push entries to the other side, which costs accuracy.

    Given: the probes of the class that was flagged. Nothing of the attack, no data. Cost: one pass.

    Args:
        vector: the flagged contributor's task vector.
        probes: of the class.
        strength: how many times `q`. Infinity, which docs/study.md measures, drops every entry that agrees in sign;
            after that `v . q <= 0`: there is no more to find for a second pass.

    Returns:
        A task vector.

    Raises:
        DegenerateError: no probes, or a zero one.
        RangeError: a negative strength.
        MismatchError: names, shapes or bases differ.

    Examples:
        >>> probe = BackdoorVector({"w": torch.tensor([1.0, -1.0, 1.0, 1.0])})
        >>> disarm(TaskVector({"w": torch.tensor([3.0, 1.0, 1.0, 1.0])}), [probe], strength=2.0)["w"]
        tensor([1., 1., 0., 0.])
    """
    if not strength >= 0:
        raise RangeError(f"strength must be at least 0; got {strength!r}")
    along = coefficients([vector], probes)[0]
    image = merge(list(probes), weighted, weights=numbers_in(along))
    return merge([vector, image], _without, strength=strength)


@runs("element")
def _without(stack: Tensor, *, strength: float) -> Tensor:
    own, image = stack[0], stack[1]
    taken = torch.minimum(own.abs(), strength * image.abs())
    return torch.where(own * image > 0, own - own.sign() * taken, own)
