"""The arithmetic of vectors on one tensor: module-level functions, so that lazy vectors pickle."""

import numbers
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import TypeAlias

import torch
from torch import Tensor

from ._errors import MismatchError, MissingError, RangeError
from ._lazy import Lazy, grain_of, read

Scale: TypeAlias = float | Tensor | Mapping[str, float | Tensor]
"""A scaling coefficient: a number, a 0-d tensor, or a mapping of names and glob patterns to either."""


def read_difference(
    base: dict[str, Tensor] | Lazy,
    tuned: dict[str, Tensor] | Lazy,
    dtypes: Mapping[str, torch.dtype],
    name: str,
    start: int,
    stop: int,
) -> Tensor:
    left, right = (read(model, name, start, stop).detach().to(dtypes[name]) for model in (base, tuned))
    return right - left


def read_applied(
    base: dict[str, Tensor] | Lazy,
    vector: dict[str, Tensor] | Lazy,
    scales: Mapping[str, float | Tensor],
    source: Mapping[str, str],
    name: str,
    start: int,
    stop: int,
) -> Tensor:
    old = read(base, name, start, stop)
    if name not in source:
        return old.clone()
    delta = read(vector, source[name], start, stop)
    if old.device != delta.device:
        raise MismatchError(f"cannot apply: {name!r} is on {old.device} in the base and {delta.device} in the vector")
    wide = torch.float64 if torch.float64 in (old.dtype, delta.dtype) else torch.float32
    return (old.to(wide) + delta.to(wide) * scales[source[name]]).to(old.dtype)


def grain_applied(
    base: dict[str, Tensor] | Lazy, vector: dict[str, Tensor] | Lazy, source: Mapping[str, str], name: str
) -> int:
    return max(grain_of(base, name), grain_of(vector, source[name]) if name in source else 1)


def times(factor: float | Tensor, x: Tensor) -> Tensor:
    return x * factor


def divided_by(divisor: float | Tensor, x: Tensor) -> Tensor:
    return x / divisor


def moved(device: torch.device | None, dtype: torch.dtype | None, x: Tensor) -> Tensor:
    return x.to(device=x.device if device is None else device, dtype=x.dtype if dtype is None else dtype, copy=True)


def is_number(value: object) -> bool:
    return isinstance(value, numbers.Real) or (isinstance(value, Tensor) and value.ndim == 0 and not value.is_complex())


def number(value: float | Tensor) -> float | Tensor:
    return value if isinstance(value, Tensor) else float(value)


def scale_of(scale: Scale, name: str) -> float | Tensor:
    if not isinstance(scale, Mapping):
        found: object = scale
    elif name in scale:
        found = scale[name]
    else:
        found = next((value for pattern, value in scale.items() if fnmatchcase(name, pattern)), None)
        if found is None:
            raise MissingError(f"no scale for {name!r}: give every name one, the rest by '*'")
    if not is_number(found):
        raise RangeError(f"scale is a number, a 0-d tensor or a mapping of patterns to either, not {found!r}")
    return number(found)  # type: ignore[arg-type]
