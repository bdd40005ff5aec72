"""A model as a task vector sees it: which entries are learned, and what is refused."""

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import TypeAlias

import torch
from torch import Tensor

from ._errors import AliasError, DtypeError, MismatchError, MissingError, listed
from ._lazy import Lazy, held

Patterns: TypeAlias = str | Iterable[str]
"""One glob pattern, or several."""

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
"""Suffixes of BatchNorm's statistics: measured, not learned, so no part of a task vector."""


def as_model(label: str, model: Mapping[str, Tensor]) -> dict[str, Tensor] | Lazy:
    if isinstance(model, torch.nn.Module):
        raise DtypeError(f"{label} is a module; load(module) gives its parameters, copied")
    return held(model)


def learned(specs: Mapping[str, Tensor], include: Patterns | None, exclude: Patterns | None) -> dict[str, Tensor]:
    """The entries of a model that a task vector is made of."""
    left_out = matching(list(specs), _as_patterns(exclude)) if exclude is not None else []
    chosen = (
        [name for name in specs if not name.endswith(STATISTICS)]
        if include is None
        else matching(list(specs), _as_patterns(include))
    )
    names = [name for name in chosen if name not in set(left_out)]
    for name in names:
        check_dtype(name, specs[name])
    return {name: specs[name] for name in names if specs[name].is_floating_point()}


def _as_patterns(patterns: Patterns) -> tuple[str, ...]:
    return (patterns,) if isinstance(patterns, str) else tuple(patterns)


def matching(names: list[str], patterns: Iterable[str]) -> list[str]:
    patterns = list(patterns)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise MissingError(f"the pattern {pattern!r} matches nothing; there are {listed(names)}")
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]


def check_dtype(name: str, spec: Tensor) -> None:
    if spec.is_complex():
        raise DtypeError(f"{name!r} is complex; keep real and imaginary parts apart, or exclude= it")
    if spec.is_quantized:
        raise DtypeError(f"{name!r} is quantised; dequantize() the model first, or exclude= it")
    if spec.is_floating_point() and spec.dtype.itemsize == 1:
        raise DtypeError(f"{name!r} is {spec.dtype}; convert the model to bfloat16 or float32 first, or exclude= it")
    if type(spec).__name__ == "DTensor":
        raise DtypeError(f"{name!r} is a DTensor; gather it with full_tensor() first, or exclude= it")


def wider(a: Tensor, b: Tensor) -> torch.dtype:
    return torch.float64 if torch.float64 in (a.dtype, b.dtype) else torch.float32


def check_apart(
    base: dict[str, Tensor] | Lazy, tuned: dict[str, Tensor] | Lazy, names: Iterable[str], left: str, right: str
) -> None:
    if not (isinstance(base, dict) and isinstance(tuned, dict)):
        return
    for name in names:
        a, b = base[name], tuned[name]
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
