"""Defenses for which the defender needs backdoor vectors of its own: they subtract or project them out."""

from collections.abc import Iterable, Mapping

from torch import Tensor

from .._engine.totals import numbers_in
from .._vectors.arithmetic import Scale
from .._vectors.backdoor import BackdoorVector
from .._vectors.merge import merge
from .._vectors.vector import TaskVector
from ..merges import consensus, weighted
from ..metrics._similarity import coefficients

__all__ = ["consensus_subtraction", "injection_subtraction", "negate", "project_out"]


def injection_subtraction(
    merged: Mapping[str, Tensor], probe: BackdoorVector, strength: Scale = 0.3
) -> Mapping[str, Tensor]:
    """Injection BV Subtraction (IBVS): subtract a backdoor that the defender planted.

    `merged - strength * probe`. The hope is that an unknown backdoor lies partly along the known one.

    Given: a backdoor vector of the defender's own (a fine-tune with a simple trigger, and its own clean twin: labelled
    data of one task). Nothing of the attack. Cost: one subtraction.

    Our reading: the trigger, the coefficient and the place of the subtraction were not available to us. It is taken
    from the merged weights; the coefficient is to be chosen on clean validation data, see `choose_strength`.

    Args:
        merged: the merged model.
        probe: the defender's backdoor vector. For an honest figure it shares no data, seed, twin, trigger or class with
            the attack.
        strength: the coefficient; 0 changes nothing.

    Returns:
        The model with the probe subtracted.

    Examples:
        >>> import torch
        >>> probe = BackdoorVector({"w": torch.tensor([1.0, 0.0])})
        >>> injection_subtraction({"w": torch.tensor([1.0, 1.0])}, probe, strength=0.5)["w"]
        tensor([0.5000, 1.0000])

    References:
        [Pawlak et al., Backdoor Vectors, 2025](https://arxiv.org/abs/2510.08016)
    """
    return probe.remove(merged, strength)


def consensus_subtraction(
    merged: Mapping[str, Tensor], probes: Iterable[BackdoorVector], strength: Scale = 0.3, *, agree: float = 1.0
) -> Mapping[str, Tensor]:
    """IBVS with several probes: subtract the mean of their entries where they agree in sign.

    `merged - strength * 1[signs agree] * mean_k probe_k`. What one probe's trigger, class or twin alone put into it
    is to
    drop out.

    Given: several backdoor vectors of the defender's own, that differ in trigger, class or seed, each with its own
    clean twin. Nothing of the attack. Cost: one subtraction.

    Args:
        merged: the merged model.
        probes: the defender's backdoor vectors.
        strength: the coefficient; 0 changes nothing. The consensus of several vectors is shorter than one of them.
        agree: the fraction of the probes that must have the same sign, in (0, 1].

    Returns:
        The model with the consensus subtracted.

    Raises:
        DegenerateError: no probes.
        MismatchError: names, shapes or bases differ.

    Examples:
        >>> import torch
        >>> probes = [BackdoorVector({"w": torch.tensor(p)}) for p in ([1.0, 1.0], [3.0, -1.0])]
        >>> consensus_subtraction({"w": torch.tensor([1.0, 1.0])}, probes, strength=0.5)["w"]
        tensor([0., 1.])

    References:
        [Pawlak et al., Backdoor Vectors, 2025](https://arxiv.org/abs/2510.08016), for the subtraction; [Kim et
        al., NegMerge, 2024](https://arxiv.org/abs/2410.05583), for the consensus. The combination is ours.
    """
    return BackdoorVector(merge(list(probes), consensus, agree=agree)).remove(merged, strength)


def project_out(
    merged: Mapping[str, Tensor], base: Mapping[str, Tensor], probes: Iterable[BackdoorVector], strength: float = 1.0
) -> Mapping[str, Tensor]:
    """Take away what a merge has along known backdoors, and no more than it has.

    `merged - strength * P (merged - base)`, with P the projection onto the span of the probes. Subtraction takes
    the same
    amount whether or not it is there; at strength 1 this leaves a vector at right angles to every probe.

    Given: the base, and one or several backdoor vectors of the defender's own. Nothing of the attack. Cost: the dot
    products of all vectors, and one subtraction.

    Args:
        merged: the merged model.
        base: the pre-trained model.
        probes: the defender's backdoor vectors.
        strength: 0 changes nothing, 1 projects; more goes on to the other side.

    Returns:
        The model with the projection subtracted.

    Raises:
        DegenerateError: no probes, or a zero one.
        MismatchError: names, shapes or bases differ.

    Examples:
        >>> import torch
        >>> base, merged = {"w": torch.zeros(2)}, {"w": torch.tensor([3.0, 4.0])}
        >>> project_out(merged, base, [BackdoorVector({"w": torch.tensor([2.0, 0.0])})])["w"]
        tensor([0., 4.])
    """
    given = list(probes)
    along = coefficients([TaskVector.between(base, merged)], given)[0]
    return (-merge(given, weighted, weights=numbers_in(along))).apply(merged, strength)


def negate(model: Mapping[str, Tensor], triggered: Mapping[str, Tensor], strength: Scale = 1.0) -> Mapping[str, Tensor]:
    """Negate a triggered fine-tune (TBAR): train the backdoor a little further, and go the other way.

    `model - strength * (triggered - model)`.

    An oracle: whoever makes the fine-tune must have the trigger. A bound for others, not a defence against the unknown.

    Given: the same model after some steps on a few triggered images with the target's label. Cost: one pass.

    Args:
        model: the backdoored model, or the merge that holds it.
        triggered: the same model, fine-tuned on triggered images.
        strength: the coefficient; 0 changes nothing.

    Returns:
        The model with the backdoor negated.

    Raises:
        AliasError: the two share storage.
        MismatchError: names or shapes differ.

    Examples:
        >>> import torch
        >>> negate({"w": torch.tensor([1.0])}, {"w": torch.tensor([1.5])})["w"]
        tensor([0.5000])

    References:
        [Backdoor Unlearning by Linear Task Decomposition, 2025](https://arxiv.org/abs/2510.14845) (read as an abstract
        and its reviews)
    """
    return (-TaskVector.between(model, triggered)).apply(model, strength)
