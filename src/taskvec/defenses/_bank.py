"""A bank of probes (ours): which contributor is backdoored, into which class, and which part of it to remove.

The defender runs an attack of their own on the base, once for every class of every task, and keeps the backdoor
vectors. A contributor's task vector is then expressed by the bank; a backdoored one stands out at its target class,
also for triggers that the probes were not made with. The part that agrees with those probes is removed from the
contributor, before the merge.

    scores = bank_scores(vectors, bank)
    for flag in flagged(scores):
        vectors[flag.contributor] = disarm(vectors[flag.contributor], bank[flag.label])

It says nothing of attacks that are unlike every probe: see the measured limits in docs/study_defenses.md.
"""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from math import inf
from statistics import median
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from .._engine.totals import numbers_in
from .._vectors.backdoor import BackdoorVector
from .._vectors.checks import check_vector, checked_vectors
from .._vectors.merge import merge
from .._vectors.vector import TaskVector
from ..errors import DegenerateError, NonFiniteError, RangeError
from ..merges import weighted
from ..metrics import coefficients
from ..rules import runs

__all__ = ["Flag", "bank_scores", "disarm", "flagged"]

Label = TypeVar("Label", bound=Hashable)


def bank_scores(
    vectors: Iterable[TaskVector], bank: Mapping[Label, Sequence[BackdoorVector]]
) -> list[dict[Label, float]]:
    """Score how much of each class's probes every contributor contains.

    Each vector is expressed by all probes together, by least squares; the score of a class is the sum of its probes'
    coefficients. Scores of clean contributors are around 0, of either sign.

    Requires finished probes; to make them, an attack's recipe and a few labeled images of every class. Cost: the dot
    products of all vectors; with k probes, `k^2 / 2` of them.

    Args:
        vectors: the contributors' task vectors.
        bank: label, such as (task, class), -> a list of its probes, which may differ in place, size and seed. For an
            honest figure they share no data, seed, twin or trigger with the attack.

    Returns:
        For each contributor, label -> score.

    Raises:
        DegenerateError: no vectors, an empty bank, a label without probes, a zero probe.
        MismatchError: names, shapes or bases differ.
        NonFiniteError: NaN or inf.
        OptionError: an argument that is not a list of task vectors, such as a single probe for a label.

    Examples:
        >>> bank = {c: [BackdoorVector({"w": torch.eye(3)[c]})] for c in range(2)}
        >>> bank_scores([TaskVector({"w": torch.tensor([0.0, 0.5, 2.0])})], bank)
        [{0: 0.0, 1: 0.5}]
    """
    own = {label: checked_vectors(f"bank[{label!r}]", probes) for label, probes in bank.items()}
    if empty := [label for label, probes in own.items() if not probes]:
        raise DegenerateError(f"every label must have a probe; got no probes for {empty[0]!r}")
    found = coefficients(vectors, [probe for probes in own.values() for probe in probes])
    owners = [label for label, probes in own.items() for _ in probes]
    scores = [dict.fromkeys(own, 0.0) for _ in found]
    for row, parts in zip(scores, found, strict=True):
        for label, part in zip(owners, numbers_in(parts), strict=True):
            row[label] += part
    return scores


class Flag(NamedTuple, Generic[Label]):
    """A score that stands out.

    Attributes:
        contributor: the position of the contributor.
        label: the label of the probes, such as (task, class).
        deviation: how far the score is above the median of all scores, in robust standard deviations.
    """

    contributor: int
    label: Label
    deviation: float


def flagged(scores: Sequence[Mapping[Label, float]], threshold: float = 6.0) -> list[Flag[Label]]:
    """Find the contributors and classes whose scores stand out from all others.

    `(score - median) / (1.4826 * median absolute deviation) > threshold`, over the scores of all contributors and
    classes together, most of which must be clean. Only high scores count.

    Args:
        scores: the result of `bank_scores`.
        threshold: in robust standard deviations. The default is a choice of ours; docs/detector.md says how often it is
            wrong.

    Returns:
        One `Flag` per score that stands out, the highest first; a contributor may have several.

    Raises:
        DegenerateError: fewer than five scores, or more than half of them equal: there is nothing to stand out from.
        NonFiniteError: a score that is NaN or inf.
        RangeError: a threshold that is not positive.

    Examples:
        >>> scores = [{0: 0.01, 1: -0.02, 2: 0.0}, {0: 0.02, 1: 0.6, 2: -0.01}]
        >>> [(flag.contributor, flag.label) for flag in flagged(scores)]
        [(1, 1)]
    """
    if not threshold > 0:
        raise RangeError(f"threshold must be a positive number of deviations; got {threshold!r}")
    everything = [score for row in scores for score in row.values()]
    if bad := [score for score in everything if not abs(score) < inf]:
        raise NonFiniteError(f"scores must be finite; got {bad[0]}")
    middle = median(everything) if everything else 0.0
    spread = 1.4826 * median([abs(score - middle) for score in everything]) if everything else 0.0
    if len(everything) < 5 or spread == 0:
        raise DegenerateError(
            f"scores must be at least five, and spread; got {len(everything)} scores of spread {spread:g}: there is "
            "nothing to stand out from"
        )
    flags = [Flag(i, label, (score - middle) / spread) for i, row in enumerate(scores) for label, score in row.items()]
    return sorted((flag for flag in flags if flag.deviation > threshold), key=lambda flag: -flag.deviation)


def disarm(vector: TaskVector, probes: Sequence[BackdoorVector], strength: float = inf) -> TaskVector:
    """Remove the part of a contributor that agrees with some probes, entry by entry, flipping no sign.

    With `q` the contributor's least-squares image in the probes: where `v` and `q` have the same sign,
    `v - sign(v) min(|v|, strength |q|)`, which is 0 at the default strength; elsewhere `v`. Subtracting `strength * q`
    itself would flip signs, which costs accuracy.

    Requires the probes of the class that was flagged; nothing of the attack, no data. Cost: one pass.

    Args:
        vector: the flagged contributor's task vector.
        probes: the probes of that class.
        strength: the multiple of `q` that is removed; 0 leaves the vector. Infinity, the default, is a mask of signs:
            it drops every entry that agrees in sign, whatever its size, about half of them where the probe is
            unrelated. In docs/primary.md the probe of a wrong class does as well. After that `v . q <= 0`, and a
            second pass would find nothing.

    Returns:
        A task vector.

    Raises:
        DegenerateError: no probes, or a zero one.
        MismatchError: names, shapes or bases differ.
        OptionError: an argument that is not a task vector, or not a list of them.
        RangeError: a negative strength.

    Examples:
        >>> probe = BackdoorVector({"w": torch.tensor([1.0, -1.0, 1.0, 1.0])})
        >>> vector = TaskVector({"w": torch.tensor([3.0, 1.0, 1.0, 1.0])})
        >>> disarm(vector, [probe], 2.0)["w"]
        tensor([1., 1., 0., 0.])
    """
    if not strength >= 0:
        raise RangeError(f"strength must be at least 0; got {strength!r}; 0 leaves the vector untouched")
    check_vector("vector", vector)
    given = checked_vectors("probes", probes)
    along = coefficients([vector], given)[0]
    image = merge(given, weighted, weights=numbers_in(along))
    return merge([vector, image], _without, strength=strength)


@runs("element")
def _without(stack: Tensor, *, strength: float) -> Tensor:
    own, image = stack[0], stack[1]
    taken = torch.minimum(own.abs(), strength * image.abs())
    return torch.where(own * image > 0, own - own.sign() * taken, own)
