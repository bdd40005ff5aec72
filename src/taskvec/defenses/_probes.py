"""Defenses that need backdoor vectors of the defender's own, and the oracle that needs the trigger."""

from collections.abc import Iterable

from .._engine.totals import numbers_in
from .._vectors.arithmetic import Scale
from .._vectors.backdoor import BackdoorVector
from .._vectors.checks import check_mapping, check_models, check_vector, checked_vectors
from .._vectors.merge import merge
from .._vectors.model import Params
from .._vectors.vector import TaskVector
from ..merges import consensus, weighted
from ..metrics import coefficients

__all__ = ["consensus_subtraction", "injection_subtraction", "negate", "project_out"]


def injection_subtraction(merged: Params, probe: BackdoorVector, strength: Scale = 0.3) -> Params:
    """Subtract a backdoor that the defender planted: Injection BV Subtraction (IBVS).

    `merged - strength * probe`. It works as far as an unknown backdoor lies along the known one.

    Requires a backdoor vector of the defender's own (a fine-tune with a simple trigger, and its clean twin: labeled
    data of one task); nothing of the attack. Cost: one subtraction.

    Our reading: the paper's trigger, its coefficient and the place of the subtraction were not available to us. Here
    the probe is subtracted from the merged weights, and the coefficient is to be chosen on clean validation data, see
    `choose_strength`.

    Args:
        merged: the merged model.
        probe: the defender's backdoor vector. For an honest figure it shares no data, seed, twin, trigger or class with
            the attack.
        strength: the paper's coefficient; 0 leaves the model.

    Returns:
        The model with the probe subtracted.

    Raises:
        MismatchError: shapes differ.
        MissingError: a name of the probe that the model does not have.
        OptionError: a probe that is not a backdoor vector.

    Examples:
        >>> import torch
        >>> probe = BackdoorVector({"w": torch.tensor([1.0, 0.0])})
        >>> injection_subtraction({"w": torch.tensor([1.0, 1.0])}, probe, 0.5)["w"]
        tensor([0.5000, 1.0000])

    Reference:
        [Pawlak et al., Backdoor Vectors, 2025](https://arxiv.org/abs/2510.08016)
    """
    check_mapping("merged", merged)
    check_vector("probe", probe, BackdoorVector)
    return probe.remove(merged, strength)


def consensus_subtraction(
    merged: Params, probes: Iterable[BackdoorVector], strength: Scale = 0.3, *, agree: float = 1.0
) -> Params:
    """Subtract the mean of several probes, in the entries where the probes agree in sign.

    `merged - strength * 1[signs agree] * mean_k probe_k`. The consensus drops what a single probe owes to its own
    trigger, class or clean twin.

    Requires several backdoor vectors of the defender's own, which differ in trigger, class or seed, each with its own
    clean twin; nothing of the attack. Cost: one subtraction.

    Args:
        merged: the merged model.
        probes: the defender's backdoor vectors.
        strength: the coefficient; 0 leaves the model. The consensus of several vectors is shorter than one of them, so
            the same effect takes a larger strength.
        agree: the fraction of the probes that must have the same sign, in (0, 1].

    Returns:
        The model with the consensus subtracted.

    Raises:
        DegenerateError: no probes.
        MismatchError: names, shapes or bases differ.
        OptionError: an argument that is not a list of task vectors.

    Examples:
        >>> import torch
        >>> values = [1.0, 1.0], [3.0, -1.0]
        >>> probes = [BackdoorVector({"w": torch.tensor(x)}) for x in values]
        >>> consensus_subtraction({"w": torch.tensor([1.0, 1.0])}, probes, 0.5)["w"]
        tensor([0., 1.])

    Reference:
        [Pawlak et al., Backdoor Vectors, 2025](https://arxiv.org/abs/2510.08016) for the subtraction;
        [Kim et al., NegMerge, 2024](https://arxiv.org/abs/2410.05583) for the consensus. The combination is ours.
    """
    check_mapping("merged", merged)
    given = checked_vectors("probes", probes)
    return BackdoorVector(merge(given, consensus, agree=agree)).remove(merged, strength)


def project_out(merged: Params, base: Params, probes: Iterable[BackdoorVector], strength: float = 1.0) -> Params:
    """Remove the part of a merge that lies along known backdoors, and no more than is there.

    `merged - strength * P (merged - base)`, with P the projection onto the span of the probes. Subtraction removes the
    same amount whether or not it is there; at strength 1 this leaves an update orthogonal to every probe.

    Requires the base, and one or several backdoor vectors of the defender's own; nothing of the attack. Cost: the dot
    products of all vectors, and one subtraction.

    Args:
        merged: the merged model.
        base: the pre-trained model.
        probes: the defender's backdoor vectors.
        strength: 0 leaves the model, 1 projects, 2 reflects.

    Returns:
        The model with the projection subtracted.

    Raises:
        DegenerateError: no probes, or a zero one.
        MismatchError: names, shapes or bases differ.
        OptionError: an argument that is not a model's weights, or not a list of task vectors.

    Examples:
        >>> import torch
        >>> base, merged = {"w": torch.zeros(2)}, {"w": torch.tensor([3.0, 4.0])}
        >>> probe = BackdoorVector({"w": torch.tensor([2.0, 0.0])})
        >>> project_out(merged, base, [probe])["w"]
        tensor([0., 4.])
    """
    check_models(merged=merged, base=base)
    given = checked_vectors("probes", probes)
    along = coefficients([TaskVector.between(base, merged)], given)[0]
    return (-merge(given, weighted, weights=numbers_in(along))).apply(merged, strength)


def negate(model: Params, triggered: Params, strength: Scale = 1.0) -> Params:
    """Negate a triggered fine-tune (TBAR): train the backdoor a little further, and step in the opposite direction.

    `model - strength * (triggered - model)`.

    An oracle: to make the fine-tune, one must have the trigger. It is a bound for other defenses, not a defense against
    an unknown backdoor.

    Requires the same model after some steps on a few triggered images with the target's label. Cost: one pass.

    Args:
        model: the backdoored model, or the merge that contains it.
        triggered: the same model, fine-tuned on triggered images.
        strength: the paper's coefficient; 0 leaves the model.

    Returns:
        The model with the backdoor negated.

    Raises:
        AliasError: the two models share storage.
        MismatchError: names or shapes differ.
        OptionError: an argument that is not a model's weights.

    Examples:
        >>> import torch
        >>> negate({"w": torch.tensor([1.0])}, {"w": torch.tensor([1.5])})["w"]
        tensor([0.5000])

    Reference:
        [Backdoor Unlearning by Linear Task Decomposition, 2025](https://arxiv.org/abs/2510.14845) (read as an abstract
        and its reviews)
    """
    check_models(model=model, triggered=triggered)
    return (-TaskVector.between(model, triggered)).apply(model, strength)
