"""The checks of arguments that all rooms share: a task vector or several, the weights of a model or of several."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypeVar

from torch import nn

from ..errors import OptionError
from .model import check_mapping
from .vector import TaskVector, check_vector, check_weights

__all__ = ["check_mapping", "check_models", "check_vector", "checked_vectors"]

V = TypeVar("V", bound=TaskVector)


def checked_vectors(label: str, given: Iterable[V], kind: type[TaskVector] = TaskVector) -> list[V]:
    """The task vectors as a list; refuse anything else, a single vector included."""
    _check_listed(label, given, kind)
    found = list(given)
    for i, vector in enumerate(found):
        check_vector(f"{label}[{i}]", vector, kind)
    return found


def _check_listed(label: str, given: object, kind: type[TaskVector]) -> None:
    got, way = type(given).__name__, "list(d.values())" if type(given) is dict else "[vector]"
    if not isinstance(given, Iterable) or isinstance(given, Mapping | nn.Module | str | Path):
        raise OptionError(f"{label} must be a list of {kind.__name__}; got a {got}; use {way}")


def check_models(**models: object) -> None:
    """Refuse what is not a mapping of weights, each under its own name."""
    for label, given in models.items():
        check_weights(label, given)
