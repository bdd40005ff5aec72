"""Defenses that need other models: to average with, to take tensors from, or to add the difference of two."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from .._engine.lazy import mapping_of
from .._engine.names import check_aligned, listed, matching
from .._engine.sources import joined
from .._vectors.arithmetic import Scale
from .._vectors.checks import check_mapping, check_models
from .._vectors.merge import merge
from .._vectors.model import Params, as_model
from .._vectors.vector import TaskVector
from ..errors import DegenerateError, MissingError, OptionError, RangeError
from ..merges import mean

__all__ = ["Substitution", "greedy_substitution", "harden", "substitute", "switch", "weight_average"]


def weight_average(models: Iterable[Params], weights: Sequence[float] | None = None) -> Params:
    """Average a suspect model with others of the same task, head included: weight averaging (WAG).

    `sum_i w_i * model_i / sum_i w_i`.

    Requires other models, fine-tuned from the same base for the same labels; they may be backdoored themselves, as long
    as their backdoors differ. No data. Cost: one pass. Second-hand: two models are few, three to six are advised.

    Args:
        models: mappings of weights with the same names and shapes; entries that are not floating-point must agree.
        weights: one number per model; equal by default.

    Returns:
        A model.

    Raises:
        DegenerateError: no models.
        MismatchError: names or shapes differ, or entries that are not weights do.
        OptionError: an argument that is not a list of models.

    Examples:
        >>> import torch
        >>> models = [{"w": torch.tensor([x])} for x in (1.0, 2.0)]
        >>> weight_average(models)["w"]
        tensor([1.5000])

    Reference:
        [Arora et al., Here's a Free Lunch, 2024](https://arxiv.org/abs/2402.19334). Their code averages integer buffers
        too; here those must agree.
    """
    if isinstance(models, Mapping):
        raise OptionError("models must be a list of models; got one mapping; use [model, other]")
    given = list(models)
    for i, model in enumerate(given):
        check_mapping(f"models[{i}]", model)
    return merge(given, mean, weights=weights)


def substitute(model: Params, donor: Params, *patterns: str) -> Params:
    """Take some tensors of a model from another one.

    Requires another fine-tune of the same base, of a proxy task or a clean one; no data. Cost: none.

    Args:
        model: the suspect model.
        donor: the model that the tensors come from.
        *patterns: glob patterns of the names to take from the donor, such as `"*.attn.*"`.

    Returns:
        A mapping with the model's names; the tensors are not copied.

    Raises:
        MismatchError: names or shapes differ.
        MissingError: a pattern that matches nothing.
        OptionError: an argument that is not a mapping of tensors.

    Examples:
        >>> import torch
        >>> one, two = torch.tensor([1.0]), torch.tensor([2.0])
        >>> a, b = {"a.w": one, "b.w": one}, {"a.w": two, "b.w": two}
        >>> substitute(a, b, "b.*")
        {'a.w': tensor([1.]), 'b.w': tensor([2.])}

    Reference:
        [Tong et al., Cut the Deadwood Out: Guided Module Substitution, 2024](https://arxiv.org/abs/2412.20476)
    """
    return switch([model, donor], {**dict.fromkeys(patterns, 1), "*": int("*" in patterns)})


def switch(models: Sequence[Params], assignment: Mapping[str, int]) -> Params:
    """Compose a model from the tensors of several models (module switching).

    Requires several fine-tunes of one base and task; they may be backdoored themselves, as long as their backdoors
    differ. No data, unless the assignment was found with some. Cost: none.

    Args:
        models: mappings with the same names and shapes.
        assignment: glob pattern -> index of the model. The first pattern that matches a name counts; each name needs
            one.

    Returns:
        A mapping; the tensors are not copied.

    Raises:
        DegenerateError: no models.
        MismatchError: names or shapes differ.
        MissingError: a name without a model, or a pattern that matches nothing.
        OptionError: an argument that is not a list of mappings.
        RangeError: an index that is not a model's.

    Examples:
        >>> import torch
        >>> one, two = torch.tensor([1.0]), torch.tensor([2.0])
        >>> models = [{"a.w": one, "b.w": one}, {"a.w": two, "b.w": two}]
        >>> switch(models, {"a.*": 1, "*": 0})
        {'a.w': tensor([2.]), 'b.w': tensor([1.])}

    Reference:
        [Module Switching Defense, 2025](https://arxiv.org/abs/2504.05902) (read in part). Theirs is an evolutionary
        search for an assignment in which neighboring modules come from different models; this function carries one out.
    """
    if not models:
        raise DegenerateError("models must not be empty; got no models to switch between")
    for i, model in enumerate(models):
        check_mapping(f"models[{i}]", model)
    held = [as_model(f"model {i}", model).source for i, model in enumerate(models)]
    check_aligned({f"model {i}": model.specs for i, model in enumerate(held)}, "switch")
    for pattern, i in assignment.items():
        if not 0 <= i < len(held):
            raise RangeError(f"assignment must map to models 0 to {len(held) - 1}; got model {i} for {pattern!r}")
    source: dict[str, int] = {}
    names = list(held[0].specs)
    for pattern, i in assignment.items():
        for name in matching(names, [pattern]):
            source.setdefault(name, i)
    if homeless := [name for name in names if name not in source]:
        raise MissingError(
            f"assignment must cover every name; got no model for {listed(homeless)}; use '*' as its last pattern"
        )
    return mapping_of(joined({name: held[source[name]] for name in names}))


class Substitution(NamedTuple):
    """The result of a greedy search for modules.

    Attributes:
        model: the best model of the search.
        kept: the groups that are the suspect model's own again, in the order in which they were returned to it.
        score: the score of that model.
    """

    model: Params
    kept: tuple[str, ...]
    score: float


def greedy_substitution(
    model: Params,
    proxy: Params,
    groups: Mapping[str, Sequence[str]],
    score: Callable[[Params], float],
    *,
    patience: int = 5,
) -> Substitution:
    """Search greedily for the modules to take from a proxy model (Guided Module Substitution).

    At first every group comes from the proxy. Each round returns one group to the suspect model: the one with the
    greatest score. The search ends when no group is left, or when the best score has not risen for `patience` rounds.

    Requires a proxy model, and whatever the score needs: the paper's is made of accuracy and of a pseudo attack success
    rate (ASR) on suspicious training samples. Cost: one score per group and round.

    Args:
        model: the suspect model.
        proxy: a fine-tune of the same base.
        groups: name -> glob patterns; they may overlap, as layers and kinds of module do. Tensors in no group are the
            suspect model's.
        score: model -> score, the higher the better. The paper's: `0.6 * fall of ASR + 0.4 * (1 - fall of accuracy)`,
            both relative to the suspect model.
        patience: rounds without a better score, at least 1.

    Returns:
        The best model, the groups returned to the suspect model, and the score.

    Raises:
        DegenerateError: no groups.
        MismatchError: names or shapes differ.
        MissingError: a pattern that matches nothing.
        OptionError: an argument that is not a mapping of tensors.
        RangeError: patience below 1.

    Examples:
        >>> import torch
        >>> one, zero = torch.ones(1), torch.zeros(1)
        >>> a, b = {"a.w": one, "b.w": -one}, {"a.w": zero, "b.w": zero}
        >>> groups = {"a": ["a.*"], "b": ["b.*"]}
        >>> score = lambda model: float(model["a.w"] + model["b.w"])
        >>> found = greedy_substitution(a, b, groups, score)
        >>> found.kept, found.score
        (('a',), 1.0)

    Reference:
        [Tong et al., Cut the Deadwood Out: Guided Module Substitution, 2024](https://arxiv.org/abs/2412.20476),
        following its code
    """
    if not groups:
        raise DegenerateError("groups must not be empty; got no groups of modules to choose from")
    if patience < 1:
        raise RangeError(f"patience must be at least 1 round; got {patience!r}")
    check_mapping("model", model)
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


def harden(merged: Params, clean: Params, robust: Params, strength: Scale = 0.3) -> Params:
    """Add a robustness vector, the difference that adversarial training makes to a model.

    `merged + strength * (robust - clean)`. It can only lower the inherent part of an attack success rate, which a
    trigger has as an adversarial patch without any backdoor.

    Requires a clean and an adversarially trained fine-tune of one task and base: labeled data, and training by
    projected gradient descent, which takes several times as long as an ordinary fine-tune. Nothing of the attack. Cost:
    one pass.

    Args:
        merged: the merged model.
        clean: a fine-tune.
        robust: its adversarially trained twin.
        strength: the coefficient; 0 leaves the model.

    Returns:
        The hardened model.

    Raises:
        MismatchError: names or shapes differ.
        OptionError: an argument that is not a model's weights.

    Examples:
        >>> import torch
        >>> merged, clean, robust = ({"w": torch.tensor([x])} for x in (1.0, 2.0, 4.0))
        >>> harden(merged, clean, robust, 0.5)["w"]
        tensor([2.])

    Reference:
        [Rogozinski, robustness vectors for secure model merging, 2026](https://github.com/karolrogozinski/robustness-vectors-for-secure-model-merging)
        (code; second-hand)
    """
    check_models(merged=merged, clean=clean, robust=robust)
    return TaskVector.between(clean, robust).apply(merged, strength)
