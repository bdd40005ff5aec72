"""One check of the arguments that are easily confused: a task vector, a model's weights, a module, a path."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from .._vectors.vector import TaskVector
from ..errors import OptionError

V = TypeVar("V", bound=TaskVector)


def check_vector(who: str, given: object, kind: type[TaskVector] = TaskVector) -> None:
    """Refuse what is not a task vector, saying how to make one."""
    if not isinstance(given, kind):
        raise OptionError(f"{who} must be a {kind.__name__}; got {_kind(given)}; use {_way_to(kind, given)}")


def checked_vectors(who: str, given: Iterable[V], kind: type[TaskVector] = TaskVector) -> list[V]:
    """The task vectors as a list; refuse anything else, a single vector included."""
    _check_listed(who, given, kind)
    found = list(given)
    for i, vector in enumerate(found):
        check_vector(f"{who}[{i}]", vector, kind)
    return found


def _check_listed(who: str, given: object, kind: type[TaskVector]) -> None:
    way = "list(d.values())" if type(given) is dict else "[vector]"
    single = isinstance(given, Mapping | nn.Module | str | Path)
    if single or not hasattr(given, "__iter__"):
        raise OptionError(f"{who} must be a list of {kind.__name__}; got {_kind(given)}; use {way}")


def check_models(**models: object) -> None:
    """Refuse what is not a mapping of weights, a task vector included: it is a difference of two."""
    for who, given in models.items():
        if isinstance(given, TaskVector):
            raise OptionError(f"{who} must be a model's weights; got {_kind(given)}; use vector.apply(base)")
        check_mapping(who, given)


def check_mapping(who: str, given: object) -> None:
    """Refuse what is not a mapping of tensors."""
    if not isinstance(given, Mapping):
        raise OptionError(f"{who} must be a mapping of names to tensors; got {_kind(given)}; use load(...)")


def _way_to(kind: type[TaskVector], given: object) -> str:
    if isinstance(given, nn.Module | str | Path):
        return "load(...), and TaskVector.between(base, tuned)"
    if isinstance(given, TaskVector):
        return f"{kind.__name__}(vector)"
    return f"{kind.__name__}.between(...) of two models, or {kind.__name__}(differences)"


def _kind(given: Any) -> str:
    if isinstance(given, nn.Module):
        return f"the module {type(given).__name__}"
    if isinstance(given, str):
        return f"the text {given!r}"
    return f"a {type(given).__name__}"
