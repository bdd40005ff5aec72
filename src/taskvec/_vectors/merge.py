"""merge: one rule, several vectors, one result."""

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar, cast, overload

import torch

from .._engine.lazy import mapping_of
from .._engine.lift import lift
from .._engine.marks import Rule, check_kind_of_rule
from .._engine.names import check_aligned
from .._engine.sources import elementwise, joined, renamed
from ..errors import DegenerateError, MismatchError, OptionError
from .arithmetic import copied
from .fingerprint import common_meta
from .model import Model, Params, as_model, check_kind
from .vector import TaskVector, common_type

__all__ = ["merge"]


V = TypeVar("V", bound=TaskVector)


@overload
def merge(inputs: Iterable[V], rule: Rule, /, *, device: torch.device | str | None = None, **options: Any) -> V: ...
@overload
def merge(
    inputs: Iterable[Params], rule: Rule, /, *, device: torch.device | str | None = None, **options: Any
) -> Params: ...
def merge(
    inputs: Iterable[Params], rule: Rule, /, *, device: torch.device | str | None = None, **options: Any
) -> Params:
    """Merge several vectors, or several models, by one rule.

    `result[name] = rule(stack([x[name] for x in inputs]), **options)`, for every name.

    Args:
        inputs: task vectors, or plain mappings of weights for rules on weights (slerp, souping): then computed in
            float32 and rounded once, and entries that are not floating-point must agree. Not both.
        rule: `(n, *shape) -> (*shape)`: any function of stacked tensors; see `taskvec.merges`.
        device: where to compute and leave the result; by default where the inputs are.
        **options: for the rule. Each is a value for all tensors, or a mapping of names and glob patterns to values (the
            exact name, then the first pattern that matches, then the rule's default), or a list of mappings, one for
            each input.

    Returns:
        A `TaskVector` of task vectors, a mapping of mappings; lazy if any input is.

    Raises:
        DegenerateError: nothing to merge.
        MismatchError: names, shapes, bases or devices differ.
        OptionError: an option the rule does not have, or one that it needs.
        RuleError: the rule returned something else than one tensor of the right shape.

    Examples:
        >>> from taskvec.merges import ties
        >>> vectors = [TaskVector({"w": torch.tensor([1.0, -2.0])}), TaskVector({"w": torch.tensor([3.0, 1.0])})]
        >>> merge(vectors, ties)["w"]
        tensor([ 2., -2.])
        >>> merge(vectors, lambda stack: stack.amax(0))["w"]
        tensor([3., 1.])
    """
    if isinstance(inputs, Mapping):
        hint = "use [vector]" if isinstance(inputs, TaskVector) else "use list(inputs.values())"
        kind = type(cast("object", inputs)).__name__
        raise OptionError(f"inputs must be a list of vectors or models; got one {kind}; {hint}")
    check_kind_of_rule(rule, "merge")
    given = list(inputs)
    if not given:
        raise DegenerateError("nothing to merge: give at least one vector")
    place = None if device is None else torch.device(device)
    vectors = [x for x in given if isinstance(x, TaskVector)]
    if vectors and len(vectors) < len(given):
        raise OptionError("cannot merge task vectors with plain weights; take TaskVector.between(base, model) first")
    if vectors:
        sources = [vector.source for vector in vectors]
        check_aligned({f"vector {i}": source.specs for i, source in enumerate(sources)}, "merge")
        meta = common_meta([vector.meta for vector in vectors], "merge")
        return common_type(vectors)(mapping_of(lift(sources, rule, options, device=place)), meta=meta)
    return _merge_weights(given, rule, options, place)


def _merge_weights(given: list[Params], rule: Rule, options: Mapping[str, Any], device: torch.device | None) -> Params:
    models = [as_model(f"input {i}", model) for i, model in enumerate(given)]
    check_aligned({f"model {i}": model.specs for i, model in enumerate(models)}, "merge")
    first = models[0].source
    learned = {name: name for name, spec in first.specs.items() if spec.dtype.is_floating_point}
    for name in first.specs:
        if name in learned:
            check_kind(name, first)
        else:
            _check_agree(models, name)
    merged = lift([renamed(model.source, learned) for model in models], rule, options, device=device)
    rest = elementwise(copied, renamed(first, {name: name for name in first.specs if name not in learned}))
    return mapping_of(joined({name: merged if name in learned else rest for name in first.specs}))


def _check_agree(models: list[Model], name: str) -> None:
    first, *others = [mapping_of(model.source)[name] for model in models]
    for i, other in enumerate(others, 1):
        if not torch.equal(first, other):
            raise MismatchError(
                f"cannot merge: {name!r} is {first.dtype}, not weights, and differs between model 0 and model {i}; "
                "leave it out of the inputs and take it from one of them"
            )
