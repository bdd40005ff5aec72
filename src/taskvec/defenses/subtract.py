"""Defences that subtract a vector from the merge, or add one, and the twins that say whether the vector mattered."""

from collections.abc import Iterable, Mapping
from typing import TypeVar

import torch
from torch import Tensor

from .._lazy import Lazy
from .._random import fold, normal
from ..backdoor import BackdoorVector
from ..merges import consensus, weighted
from ..merging import merge
from ..rules import Place, Total, numbers_in, over, runs, sum64
from ..similarity import coefficients
from ..vector import Scale, TaskVector

__all__ = [
    "consensus_subtraction",
    "harden",
    "injection_subtraction",
    "negate",
    "project_out",
    "random_twin",
    "shuffled_twin",
]

V = TypeVar("V", bound=TaskVector)


def injection_subtraction(
    merged: Mapping[str, Tensor], probe: BackdoorVector, scale: Scale = 0.3
) -> dict[str, Tensor] | Lazy:
    """Injection BV Subtraction (IBVS): subtract a backdoor the defender planted himself.

    `merged - scale * probe`. The hope is that an unknown backdoor lies partly along the known one.

    Given: a backdoor vector of the defender's own (a fine-tune with a simple trigger, and its own clean twin: labelled
    data of one task). Nothing of the attack. Cost: one subtraction.

    Our reading: the trigger, the coefficient and the place of the subtraction were not available to us. It is taken
    from the merged weights; the coefficient is to be chosen on clean validation data, see `selection.strength`.

    Args:
        merged: the merged model.
        probe: the defender's backdoor vector. For an honest figure it shares no data, seed, twin, trigger or class with
            the attack.
        scale: the coefficient.

    Returns:
        The model with the probe subtracted.

    Example:
        >>> probe = BackdoorVector({"w": torch.tensor([1.0, 0.0])})
        >>> injection_subtraction({"w": torch.tensor([1.0, 1.0])}, probe, scale=0.5)["w"]
        tensor([0.5000, 1.0000])

    Reference:
        Pawlak et al., Backdoor Vectors, 2025, https://arxiv.org/abs/2510.08016
    """
    return probe.remove(merged, scale)


def consensus_subtraction(
    merged: Mapping[str, Tensor], probes: Iterable[BackdoorVector], scale: Scale = 0.3, *, agree: float = 1.0
) -> dict[str, Tensor] | Lazy:
    """IBVS with several probes: subtract the mean of their entries where they agree in sign.

    `merged - scale * 1[signs agree] * mean_k probe_k`. What one probe's trigger, class or twin alone put into it is to
    drop out.

    Given: several backdoor vectors of the defender's own, that differ in trigger, class or seed, each with its own
    clean twin. Nothing of the attack. Cost: one subtraction.

    Args:
        merged: the merged model.
        probes: the defender's backdoor vectors.
        scale: the coefficient; the consensus of several vectors is shorter than one of them.
        agree: the fraction of the probes that must have the same sign, in (0, 1].

    Returns:
        The model with the consensus subtracted.

    Raises:
        DegenerateError: no probes.
        MismatchError: names, shapes or bases differ.

    Example:
        >>> probes = [BackdoorVector({"w": torch.tensor(p)}) for p in ([1.0, 1.0], [3.0, -1.0])]
        >>> consensus_subtraction({"w": torch.tensor([1.0, 1.0])}, probes, scale=0.5)["w"]
        tensor([0., 1.])

    Reference:
        Pawlak et al., Backdoor Vectors, 2025, https://arxiv.org/abs/2510.08016, for the subtraction; Kim et al.,
        NegMerge, 2024, https://arxiv.org/abs/2410.05583, for the consensus. The combination is ours.
    """
    return BackdoorVector(merge(list(probes), consensus, agree=agree)).remove(merged, scale)


def project_out(
    merged: Mapping[str, Tensor], base: Mapping[str, Tensor], probes: Iterable[BackdoorVector], scale: float = 1.0
) -> dict[str, Tensor] | Lazy:
    """Take away what a merge has along known backdoors, and no more than it has.

    `merged - scale * P (merged - base)`, with P the projection onto the span of the probes. Subtraction takes the same
    amount whether or not it is there; at scale 1 this leaves a vector at right angles to every probe.

    Given: the base, and one or several backdoor vectors of the defender's own. Nothing of the attack. Cost: the dot
    products of all vectors, and one subtraction.

    Args:
        merged: the merged model.
        base: the pre-trained model.
        probes: the defender's backdoor vectors.
        scale: 1 projects; more goes on to the other side.

    Returns:
        The model with the projection subtracted.

    Raises:
        DegenerateError: no probes, or a zero one.
        MismatchError: names, shapes or bases differ.

    Example:
        >>> base, merged = {"w": torch.zeros(2)}, {"w": torch.tensor([3.0, 4.0])}
        >>> project_out(merged, base, [BackdoorVector({"w": torch.tensor([2.0, 0.0])})])["w"]
        tensor([0., 4.])
    """
    given = list(probes)
    along = coefficients([TaskVector.between(base, merged)], given)[0]
    return (-merge(given, weighted, weights=numbers_in(along))).apply(merged, scale)


def harden(
    merged: Mapping[str, Tensor], clean: Mapping[str, Tensor], robust: Mapping[str, Tensor], scale: Scale = 0.3
) -> dict[str, Tensor] | Lazy:
    """Add a robustness vector: what adversarial training changes in a model.

    `merged + scale * (robust - clean)`. It can only lower what a trigger does as an adversarial patch, without any
    backdoor: the inherent part.

    Given: a clean and an adversarially trained fine-tune of one task and base: labelled data, and training by projected
    gradient descent, which takes several times as long as an ordinary fine-tune. Nothing of the attack. Cost: one pass.

    Args:
        merged: the merged model.
        clean: a fine-tune.
        robust: its adversarially trained twin.
        scale: the coefficient.

    Returns:
        The hardened model.

    Raises:
        MismatchError: names or shapes differ.

    Example:
        >>> merged, clean, robust = ({"w": torch.tensor([x])} for x in (1.0, 2.0, 4.0))
        >>> harden(merged, clean, robust, scale=0.5)["w"]
        tensor([2.])

    Reference:
        Rogozinski, robustness vectors for secure model merging, 2026,
        https://github.com/karolrogozinski/robustness-vectors-for-secure-model-merging (code; second-hand)
    """
    return TaskVector.between(clean, robust).apply(merged, scale)


def negate(
    model: Mapping[str, Tensor], triggered: Mapping[str, Tensor], scale: Scale = 1.0
) -> dict[str, Tensor] | Lazy:
    """Negate a triggered fine-tune (TBAR): train the backdoor a little further, and go the other way.

    `model - scale * (triggered - model)`.

    An oracle: whoever makes the fine-tune must have the trigger. A bound for others, not a defence against the unknown.

    Given: the same model after some steps on a few triggered images with the target's label. Cost: one pass.

    Args:
        model: the backdoored model, or the merge that holds it.
        triggered: the same model, fine-tuned on triggered images.
        scale: the coefficient.

    Returns:
        The model with the backdoor negated.

    Raises:
        AliasError: the two share storage.
        MismatchError: names or shapes differ.

    Example:
        >>> negate({"w": torch.tensor([1.0])}, {"w": torch.tensor([1.5])})["w"]
        tensor([0.5000])

    Reference:
        Backdoor Unlearning by Linear Task Decomposition, 2025, https://arxiv.org/abs/2510.14845 (read as an abstract
        and its reviews)
    """
    return (-TaskVector.between(model, triggered)).apply(model, scale)


def random_twin(vector: V, *, seed: int) -> V:
    """A random vector with the norm of each tensor: the control for any vector that is subtracted.

    Entries are independent and nearly normal (sums of four uniforms), the same for a seed on every device.

    Args:
        vector: the vector to be matched.
        seed: any integer; give each draw its own.

    Returns:
        A vector of the same type, names, shapes and norms per tensor.

    Raises:
        NonFiniteError: NaN or inf.

    Example:
        >>> v = TaskVector({"w": torch.tensor([3.0, 4.0])})
        >>> round(float(random_twin(v, seed=0).norm()), 4)
        5.0
    """
    return vector.map(_random_like, seed=seed)


def shuffled_twin(vector: V, *, seed: int) -> V:
    """The same entries in another order, inside each tensor: norm and distribution kept, direction lost.

    Args:
        vector: the vector to be shuffled.
        seed: any integer.

    Returns:
        A vector of the same type, names and shapes.

    Example:
        >>> v = TaskVector({"w": torch.tensor([1.0, 2.0, 3.0])})
        >>> sorted(shuffled_twin(v, seed=0)["w"].tolist())
        [1.0, 2.0, 3.0]
    """
    return vector.map(_shuffled, seed=seed)


@runs("tensor")
def _shuffled(x: Tensor, *, seed: int, at: Place) -> Tensor:
    order = at.bits(seed, x).reshape(-1).argsort(stable=True)
    return x.reshape(-1)[order].reshape(x.shape)


def _norms(total: Total, seed: int) -> tuple[float, float]:
    """The norm of a tensor, and of the noise that will replace it."""

    def squares(x: Tensor, at: Place) -> Tensor:
        return torch.stack([sum64(x.double().square()), sum64(_noise(x, at, seed).double().square())])

    own, noise = numbers_in(total(squares).sqrt())
    return own, noise


@runs("element", norms=_norms)
def _random_like(
    x: Tensor,
    *,
    seed: int,
    norms: tuple[float, float] | None = None,
    at: Place = Place(),  # noqa: B008
) -> Tensor:
    own, noise = _norms(over(x, at, stacked=False), seed) if norms is None else norms
    return (_noise(x, at, seed) * (own / noise if noise else 0.0)).to(x.dtype)


def _noise(x: Tensor, at: Place, seed: int) -> Tensor:
    return normal((fold(seed, 0), fold(seed, 1)), at.key, at.start, x.numel(), x.device).reshape(x.shape)
