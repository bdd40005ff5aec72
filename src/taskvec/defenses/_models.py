"""Defenses for which the defender needs other models of the same base and task."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from .._engine.names import check_aligned, listed, matching
from .._engine.run import mapping_of
from .._engine.sources import joined
from .._vectors.arithmetic import Scale
from .._vectors.merge import merge
from .._vectors.model import Params, as_model, check_mapping
from .._vectors.vector import TaskVector
from ..errors import DegenerateError, MissingError, RangeError
from ..merges import mean

__all__ = ["Substitution", "greedy_substitution", "harden", "substitute", "switch", "weight_average"]

Model = Mapping[str, Tensor]


def weight_average(models: Iterable[Params], weights: Sequence[float] | None = None) -> Params:
    """Weight averaging (WAG): the mean of a suspect model and others of the same task, head included.

    Given: other models, fine-tuned from the same base for the same labels, which may be unsafe themselves as long as
    they are so in other ways. No data. Cost: one pass. Second-hand: two models are few, three to six are advised.

    Args:
        models: mappings of weights with the same names and shapes; entries that are not floating-point must agree.
        weights: one number a model; equal by default.

    Returns:
        A model.

    Raises:
        MismatchError: names or shapes differ, or entries that are not weights do.

    Examples:
        >>> import torch
        >>> weight_average([{"w": torch.tensor([1.0])}, {"w": torch.tensor([2.0])}])["w"]
        tensor([1.5000])

    References:
        [Arora et al., Here's a Free Lunch, 2024](https://arxiv.org/abs/2402.19334). Their code averages integer buffers
        too; here those must agree.
    """
    return merge(models, mean, weights=weights)


def substitute(model: Model, donor: Model, *patterns: str) -> Mapping[str, Tensor]:
    """A model with some of its tensors taken from another.

    Given: another fine-tune of the same base, a proxy task's or a clean one's. No data. Cost: none.

    Args:
        model: the suspect model.
        donor: where the tensors come from.
        *patterns: glob patterns of the names to take from the donor, such as `"*.attn.*"`.

    Returns:
        A mapping with the model's names; the tensors are not copied.

    Raises:
        MismatchError: names or shapes differ.
        MissingError: a pattern that matches nothing.

    Examples:
        >>> import torch
        >>> model, donor = ({"a.w": torch.tensor([x]), "b.w": torch.tensor([x])} for x in (1.0, 2.0))
        >>> substitute(model, donor, "b.*")
        {'a.w': tensor([1.]), 'b.w': tensor([2.])}

    References:
        [Tong et al., Cut the Deadwood Out: Guided Module Substitution, 2024](https://arxiv.org/abs/2412.20476)
    """
    check_mapping("model", model)
    taken = set(matching(list(model), patterns))
    return switch([model, donor], {name: int(name in taken) for name in model})


def switch(models: Sequence[Model], assignment: Mapping[str, int]) -> Mapping[str, Tensor]:
    """A model each of whose tensors comes from one of several (module switching).

    Given: several fine-tunes of one base and task, which may be unsafe themselves as long as they are so in other ways.
    No data, unless the assignment was found with some. Cost: none.

    Args:
        models: with the same names and shapes.
        assignment: glob pattern -> index of the model. The first pattern that matches a name counts; each name needs
            one.

    Returns:
        A mapping; the tensors are not copied.

    Raises:
        DegenerateError: no models.
        MismatchError: names or shapes differ.
        MissingError: a name without a model, or a pattern that matches nothing.
        RangeError: an index that is no model's.

    Examples:
        >>> import torch
        >>> models = [{"a.w": torch.tensor([x]), "b.w": torch.tensor([x])} for x in (1.0, 2.0)]
        >>> switch(models, {"a.*": 1, "*": 0})
        {'a.w': tensor([2.]), 'b.w': tensor([1.])}

    References:
        [Module Switching Defense, 2025](https://arxiv.org/abs/2504.05902) (read in part). Theirs is an evolutionary
        search for an assignment in which neighbouring modules come from different models; this is what carries one out.
    """
    if not models:
        raise DegenerateError("no models to switch between")
    held = [as_model(f"model {i}", model).source for i, model in enumerate(models)]
    check_aligned({f"model {i}": model.specs for i, model in enumerate(held)}, "switch")
    for pattern, i in assignment.items():
        if not 0 <= i < len(held):
            raise RangeError(f"{pattern!r} is to come from model {i}; there are {len(held)}, numbered from 0")
    source: dict[str, int] = {}
    names = list(held[0].specs)
    for pattern, i in assignment.items():
        for name in matching(names, [pattern]):
            source.setdefault(name, i)
    if homeless := [name for name in names if name not in source]:
        raise MissingError(f"no model is named for {listed(homeless)}; end the assignment with '*'")
    return mapping_of(joined({name: held[source[name]] for name in names}))


class Substitution(NamedTuple):
    """What a greedy search for modules found.

    Attributes:
        model: the best model met on the way.
        kept: the groups that are the suspect model's own again, in the order in which they were given back.
        score: of that model.
    """

    model: Mapping[str, Tensor]
    kept: tuple[str, ...]
    score: float


def greedy_substitution(
    model: Model,
    proxy: Model,
    groups: Mapping[str, Sequence[str]],
    score: Callable[[Mapping[str, Tensor]], float],
    *,
    patience: int = 5,
) -> Substitution:
    """Find the modules to take from a proxy (Guided Module Substitution): all of them, then fewer, greedily.

    At first every group comes from the proxy. In each round one group is given back to the suspect model: the one after
    which the score is greatest. It ends when nothing is left to give back, or the best score has not risen for
    `patience` rounds.

    Given: a proxy model, and whatever the score needs: the paper's is made of accuracy and of a pseudo-ASR on
    suspicious training samples. Cost: a score for each group and round.

    Args:
        model: the suspect model.
        proxy: a fine-tune of the same base.
        groups: name -> glob patterns; they may overlap, as layers and kinds of module do. Tensors in no group are the
            suspect model's.
        score: a model's, the higher the better. The paper's: `0.6 * fall of ASR + 0.4 * (1 - fall of accuracy)`, both
            relative to the suspect model.
        patience: rounds without a better score.

    Returns:
        The best model, the groups given back, and its score.

    Raises:
        DegenerateError: no groups.
        MismatchError: names or shapes differ.
        MissingError: a pattern that matches nothing.
        RangeError: patience below 1.

    Examples:
        >>> import torch
        >>> model, proxy = ({"a.w": torch.tensor([x]), "b.w": torch.tensor([-x])} for x in (1.0, 0.0))
        >>> found = greedy_substitution(
        ...     model, proxy, {"a": ["a.*"], "b": ["b.*"]}, lambda m: float(m["a.w"] + m["b.w"])
        ... )
        >>> found.kept, found.score
        (('a',), 1.0)

    References:
        [Tong et al., Cut the Deadwood Out: Guided Module Substitution, 2024](https://arxiv.org/abs/2412.20476), as its
        code does it
    """
    if not groups:
        raise DegenerateError("no groups of modules to choose from")
    if patience < 1:
        raise RangeError(f"patience is at least 1 round, not {patience!r}")
    names = {group: set(matching(list(model), patterns)) for group, patterns in groups.items()}
    everything = {name for group in names.values() for name in group}

    def scored(kept: tuple[str, ...]) -> Substitution:
        taken = everything - {name for group in kept for name in names[group]}
        candidate = switch([model, proxy], {name: int(name in taken) for name in model})
        return Substitution(candidate, kept, score(candidate))

    kept: tuple[str, ...] = ()
    best, stale = scored(kept), 0
    while len(kept) < len(groups) and stale < patience:
        now = max((scored((*kept, group)) for group in groups if group not in kept), key=lambda found: found.score)
        kept = now.kept
        best, stale = (now, 0) if now.score > best.score else (best, stale + 1)
    return best


def harden(
    merged: Mapping[str, Tensor], clean: Mapping[str, Tensor], robust: Mapping[str, Tensor], strength: Scale = 0.3
) -> Mapping[str, Tensor]:
    """Add a robustness vector: what adversarial training changes in a model.

    `merged + strength * (robust - clean)`. It can only lower what a trigger does as an adversarial patch, without any
    backdoor: the inherent part.

    Given: a clean and an adversarially trained fine-tune of one task and base: labelled data, and training by projected
    gradient descent, which takes several times as long as an ordinary fine-tune. Nothing of the attack. Cost: one pass.

    Args:
        merged: the merged model.
        clean: a fine-tune.
        robust: its adversarially trained twin.
        strength: the coefficient; 0 changes nothing.

    Returns:
        The hardened model.

    Raises:
        MismatchError: names or shapes differ.

    Examples:
        >>> import torch
        >>> merged, clean, robust = ({"w": torch.tensor([x])} for x in (1.0, 2.0, 4.0))
        >>> harden(merged, clean, robust, strength=0.5)["w"]
        tensor([2.])

    References:
        Rogozinski, robustness vectors for secure model merging, 2026,
        https://github.com/karolrogozinski/robustness-vectors-for-secure-model-merging (code; second-hand)
    """
    return TaskVector.between(clean, robust).apply(merged, strength)
