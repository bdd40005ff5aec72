"""A model as a task vector sees it: which entries are learned, which are tied, and what is refused."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from os import PathLike, fspath
from typing import Any, NamedTuple, TypeAlias

from torch import Tensor, nn

from .._engine.lazy import Lazy, mapping_of, source_of
from .._engine.names import Patterns, as_patterns, listed, matching, unmatched
from .._engine.sources import Memory, Source, Spec, renamed
from ..errors import AliasError, DtypeError, MismatchError, MissingError, OptionError

Params: TypeAlias = Mapping[str, Tensor]
"""A model's parameters: a `state_dict()`, a checkpoint on disk, a task vector."""

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
"""Suffixes of BatchNorm's statistics: measured, not learned, so no part of a task vector."""

ADAPTERS = (
    "lora_",
    "hada_",
    "lokr_",
    "vera_",
    "oft_",
    "boft_",
    "ia3_",
    "adalora_",
    "randlora_",
    "shira_",
    "c3a_",
    "road_",
)
"""What begins the names that PEFT gives to the factors of an adapter, or to its scales."""


class Model(NamedTuple):
    """Where a model's tensors come from, and name -> the first name with the same storage."""

    source: Source
    tied: Mapping[str, str]

    @property
    def specs(self) -> Mapping[str, Spec]:
        """Name -> shape and dtype."""
        return self.source.specs


def as_model(label: str, model: Params) -> Model:
    """A model as it is worked with; anything else is refused, saying what to do.

    Raises:
        OptionError: a module, a path, or no mapping at all.
    """
    check_mapping(label, model)
    return Model(source_of(model), tied_names(model))


def check_mapping(label: str, model: object) -> None:
    """Refuse what is no mapping of names to tensors.

    Raises:
        OptionError: naming what came and what to use.
    """
    if isinstance(model, nn.Module):
        raise OptionError(
            f"{label} must be a mapping of tensors; got a module ({type(model).__name__}); use load(module)"
        )
    if isinstance(model, str | PathLike):
        raise OptionError(
            f"{label} must be a mapping of tensors; got the text {fspath(model)!r}; use load({fspath(model)!r})"
        )
    if not isinstance(model, Mapping):
        raise OptionError(
            f"{label} must be a mapping of tensors; got {type(model).__name__}; use a state dict, or load()"
        )
    if isinstance(model, dict):
        for name, tensor in model.items():  # pyright: ignore[reportUnknownVariableType]
            if not isinstance(tensor, Tensor):
                raise OptionError(f"{label} must be a mapping of tensors; got {type(tensor).__name__} under {name!r}")  # pyright: ignore[reportUnknownArgumentType]


def tied_names(mapping: Params) -> dict[str, str]:
    """Name -> the first name whose whole tensor is the same storage (tied weights)."""
    if isinstance(mapping, Lazy):
        return dict(mapping.tied)
    first: dict[tuple[object, ...], str] = {}
    tied: dict[str, str] = {}
    for name, tensor in mapping.items() if isinstance(mapping, dict) else ():
        if tensor.numel() == 0 or tensor.device.type == "meta" or type(tensor).__name__ == "DTensor":
            continue
        place = (tensor.device, tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
        if first.setdefault(place, name) != name:
            tied[name] = first[place]
    return tied


def common_ties(left: Model, right: Model) -> dict[str, str]:
    """Name -> the name that stands for it: tied in both models, or tied in one and absent in the other."""
    found: dict[str, str] = {}
    for own, other in ((left, right), (right, left)):
        for group in _groups(own.tied):
            present = [name for name in group if name in other.specs]
            if not present:
                continue
            first = present[0]
            same = [n for n in present[1:] if other.tied.get(n, n) == other.tied.get(first, first)]
            found |= dict.fromkeys([*same, *(name for name in group if name not in other.specs)], first)
    return found


def _groups(tied: Mapping[str, str]) -> list[list[str]]:
    """The names that share one storage, each group in the order of the model."""
    groups: dict[str, list[str]] = {}
    for name, first in tied.items():
        groups.setdefault(first, [first]).append(name)
    return list(groups.values())


def tied_sources(names: Iterable[str], model: Model, recorded: Mapping[str, str]) -> dict[str, str]:
    """For each name of a model that a vector changes, the vector's name: its own, or one with the same storage."""
    found = {name: name for name in names}
    for group in [*_groups(model.tied), *_groups(recorded)]:
        owner = next((name for name in group if name in found), None)
        if owner is not None:
            found = dict.fromkeys((n for n in group if n in model.specs), found[owner]) | found
    return found


def learned(model: Model, left_out: set[str], chosen: set[str] | None) -> dict[str, Spec]:
    """The entries of a model that a task vector is made of."""
    names = [
        name
        for name in model.specs
        if name not in left_out and (not name.endswith(STATISTICS) if chosen is None else name in chosen)
    ]
    for name in names:
        check_kind(name, model.source)
    return {name: model.specs[name] for name in names if model.specs[name].dtype.is_floating_point}


def chosen_names(sides: Mapping[str, Model], patterns: Patterns | None) -> set[str] | None:
    """The names of several models that match any of some patterns; each pattern must match in one of them."""
    if patterns is None:
        return None
    names = list(dict.fromkeys(name for model in sides.values() for name in model.specs))
    if idle := unmatched(as_patterns(patterns), names):
        where = ", ".join(f"{label} has {listed(list(model.specs))}" for label, model in sides.items())
        raise MissingError(f"the pattern {idle[0]!r} matches no name of either model; {where}")
    return set(matching(names, patterns))


def check_kind(name: str, source: Source) -> None:
    """Refuse tensors that no arithmetic is done on.

    Raises:
        DtypeError: complex, quantised, float8 and distributed tensors, and the factors of adapters.
    """
    dtype = source.specs[name].dtype
    if dtype.is_complex:
        raise DtypeError(f"{name!r} is complex; keep real and imaginary parts apart, or exclude= it")
    if str(dtype).startswith(("torch.qint", "torch.quint")):
        raise DtypeError(f"{name!r} is quantised; dequantize() the model first, or exclude= it")
    if dtype.is_floating_point and dtype.itemsize == 1:
        raise DtypeError(f"{name!r} is {dtype}; convert the model to bfloat16 or float32 first, or exclude= it")
    if isinstance(source, Memory) and type(source.tensors[name]).__name__ == "DTensor":
        raise DtypeError(f"{name!r} is a DTensor; gather it with full_tensor() first, or exclude= it")
    if any(part.startswith(ADAPTERS) for part in name.split(".")):
        raise DtypeError(
            f"{name!r} is a factor of an adapter, not a weight: sums of factors are not sums of their products; "
            "load() the adapter's folder, which gives the difference itself"
        )


def check_apart(base: Source, tuned: Source, names: Iterable[str], left: str, right: str) -> None:
    """Refuse models in memory that share storage, or lie on different devices."""
    if not (isinstance(base, Memory) and isinstance(tuned, Memory)):
        return
    for name in names:
        a, b = base.tensors[name], tuned.tensors[name]
        if a.device != b.device:
            raise MismatchError(
                f"cannot take the difference: {name!r} is on {a.device} in {left} and on {b.device} in {right}; "
                "move one with .to()"
            )
        if a.numel() and a.device.type != "meta" and a.data_ptr() == b.data_ptr():
            raise AliasError(
                f"{left} and {right} share the storage of {name!r}: whatever changes one changes the other, and their "
                "difference stays zero; copy one first, load(module) does"
            )


def select(mapping: Params, /, *patterns: str) -> Params:
    """Take the part of a mapping whose names match any of some glob patterns.

    Args:
        mapping: a model, in memory or lazy, or a task vector.
        *patterns: such as `"encoder.*"`; `*` matches dots too.

    Returns:
        A mapping; of a task vector, a task vector. The tensors are not copied.

    Raises:
        MissingError: a pattern that matches nothing.

    Examples:
        >>> import torch
        >>> sorted(select({"a.w": torch.ones(1), "b.w": torch.ones(1)}, "a.*"))
        ['a.w']
    """
    check_mapping("the mapping", mapping)
    return _under(mapping, {name: name for name in matching(list(mapping), patterns)})


def rename(mapping: Params, new: Callable[[str], str], /) -> Params:
    """Give the tensors of a mapping other names.

    Args:
        mapping: a model, in memory or lazy, or a task vector.
        new: old name -> new name.

    Returns:
        A mapping; of a task vector, a task vector. The tensors are not copied.

    Raises:
        MismatchError: two names become one.

    Examples:
        >>> import torch
        >>> model = {"module.w": torch.ones(1)}
        >>> list(rename(model, lambda name: name.removeprefix("module.")))
        ['w']
    """
    check_mapping("the mapping", mapping)
    return _under(mapping, new_names(list(mapping), new))


def new_names(names: Sequence[str], new: Callable[[str], str]) -> dict[str, str]:
    """New name -> old name.

    Raises:
        MismatchError: two names become one.
    """
    found = {new(name): name for name in names}
    if len(found) < len(names):
        raise MismatchError("cannot rename: two names become one")
    return found


def _under(mapping: Params, names: Mapping[str, str]) -> Params:
    own: Any = getattr(mapping, "under", None)  # a task vector keeps its type and its record
    if own is not None:
        return own(names)
    found = mapping_of(renamed(source_of(mapping), names))
    if isinstance(mapping, Lazy) and isinstance(found, Lazy):
        new = {old: name for name, old in names.items()}
        found.metadata = dict(mapping.metadata)
        found.tied = {new[a]: new[b] for a, b in mapping.tied.items() if a in new and b in new}
    return found
