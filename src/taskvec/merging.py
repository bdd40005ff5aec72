"""merge: one rule, several vectors, one result."""

from collections.abc import Iterable, Mapping
from typing import Any, overload

import torch
from torch import Tensor

from ._engine import lift
from ._errors import DegenerateError, DtypeError, MismatchError, check_aligned
from ._fingerprint import common_meta
from ._lazy import Lazy, elementwise, held, joined, renamed, specs_of
from ._types import Params, Rule
from .vector import TaskVector

__all__ = ["merge"]


@overload
def merge(
    inputs: Iterable[TaskVector], rule: Rule, /, *, device: torch.device | str | None = None, **options: Any
) -> TaskVector: ...
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
        rule: `(n, *shape) -> (*shape)`: any function of stacked tensors; see `taskvec.merges`, `taskvec.sphere`.
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

    Example:
        >>> from taskvec.merges import ties
        >>> vectors = [TaskVector({"w": torch.tensor([1.0, -2.0])}), TaskVector({"w": torch.tensor([3.0, 1.0])})]
        >>> merge(vectors, ties)["w"]
        tensor([ 2., -2.])
        >>> merge(vectors, lambda stack: stack.amax(0))["w"]
        tensor([3., 1.])
    """
    given = list(inputs)
    if not given:
        raise DegenerateError("nothing to merge: give at least one vector")
    place = None if device is None else torch.device(device)
    vectors = [x for x in given if isinstance(x, TaskVector)]
    if vectors and len(vectors) < len(given):
        raise DtypeError("cannot merge task vectors with plain weights; take differences with TaskVector.between first")
    if vectors:
        sources = [vector.tensors for vector in vectors]
        check_aligned({f"vector {i}": specs_of(source) for i, source in enumerate(sources)}, "merge")
        meta = common_meta([vector.meta for vector in vectors], "merge")
        return TaskVector(lift(sources, rule, options, device=place), meta=meta)
    return _merge_weights(given, rule, options, place)


def _merge_weights(
    given: list[Params], rule: Rule, options: Mapping[str, Any], device: torch.device | None
) -> dict[str, Tensor] | Lazy:
    for i, model in enumerate(given):
        if not isinstance(model, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise DtypeError(f"cannot merge: input {i} is a {type(model).__name__}; load(...) gives a mapping")
    models = [held(model) for model in given]
    specs = [specs_of(model) for model in models]
    check_aligned({f"model {i}": own for i, own in enumerate(specs)}, "merge")
    learned = [name for name, spec in specs[0].items() if spec.is_floating_point()]
    for name in specs[0]:
        if name not in learned:
            _check_agree(models, name)
    own = {name: name for name in learned}
    merged = lift([renamed(model, own) for model in models], rule, options, device=device)
    rest = elementwise(torch.clone, renamed(models[0], {name: name for name in specs[0] if name not in own}))
    return joined({name: merged if name in own else rest for name in specs[0]})


def _check_agree(models: list[dict[str, Tensor] | Lazy], name: str) -> None:
    first = models[0][name]
    for i, model in enumerate(models[1:], 1):
        if not torch.equal(first, model[name]):
            raise MismatchError(
                f"cannot merge: {name!r} is {first.dtype}, not weights, and differs between model 0 and model {i}; "
                "leave it out of the inputs and take it from one of them"
            )
