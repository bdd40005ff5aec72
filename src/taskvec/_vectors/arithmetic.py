"""The arithmetic of vectors on one tensor: module-level functions, so that lazy vectors pickle."""

import numbers
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor
from typing_extensions import override

from .._engine.names import ABSENT, by_name, listed, unmatched
from .._engine.sources import Derived, Memory, Pull, Source, Spec, elementwise, frozen, renamed
from .._engine.transfers import moved_to
from ..errors import MismatchError, MissingError, RangeError

Scale: TypeAlias = float | Tensor | Mapping[str, float | Tensor]
"""A scaling coefficient: a number, a 0-d tensor, or a mapping of names and glob patterns to either."""


HALF = (torch.float16, torch.bfloat16)


def widened(source: Source) -> Source:
    """The floating-point tensors in float32, or float64 where they are: differences are taken in these."""
    dtypes = {name: torch.float32 if spec.dtype in HALF else spec.dtype for name, spec in source.specs.items()}
    if all(dtype == source.specs[name].dtype for name, dtype in dtypes.items()):
        return source
    return Derived(wide, [source], dtypes=dtypes)


def wide(x: Tensor) -> Tensor:
    """Half precision in float32."""
    return x.to(torch.float32) if x.dtype in HALF else x


def difference(base: Tensor, tuned: Tensor, dtype: torch.dtype | None = None, *, out: Tensor | None = None) -> Tensor:
    """`tuned - base`, detached, in a dtype, or the wider one's and at least float32."""
    a, b = base.detach(), tuned.detach()
    if dtype is None:
        dtype = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    if out is None:
        out = torch.empty(b.shape, dtype=dtype, device=b.device)
    return out.copy_(b).sub_(a.to(dtype))


def applied(
    old: Tensor, delta: Tensor, scale: float | Tensor, dtype: torch.dtype | None = None, *, out: Tensor | None = None
) -> Tensor:
    """`old + delta * scale`, rounded once, to a dtype, by default the old's."""
    wide = torch.float64 if torch.float64 in (old.dtype, delta.dtype) else torch.float32
    start, step = old.to(wide), delta.to(wide)
    found = (step * scale).add_(start) if isinstance(scale, Tensor) else torch.add(start, step, alpha=scale)
    return found.to(dtype or old.dtype) if out is None else out.copy_(found)


def plus(x: Tensor, y: Tensor, *more: Tensor, out: Tensor | None = None) -> Tensor:
    """`x + y`, and more of the same dtype one after the other."""
    result = torch.add(x, y, out=out)
    for z in more:
        result += z
    return result


def combined(f: Callable[..., Tensor], left: Source, right: Source) -> Source:
    """`f(left, right)`; a lazy sum that grows stays one sum, which is computed in one place."""
    if (
        f is plus
        and isinstance(left, Derived)
        and left.f is plus
        and all(spec.dtype == right.specs[name].dtype for name, spec in left.specs.items())
    ):
        return Derived(plus, [*left.sources, right])
    return elementwise(f, left, right)


def minus(x: Tensor, y: Tensor) -> Tensor:
    """`x - y`."""
    return x - y


def negated(x: Tensor) -> Tensor:
    """`-x`."""
    return -x


def copied(x: Tensor) -> Tensor:
    """A copy."""
    return x.clone()


def times(x: Tensor, factor: float | Tensor) -> Tensor:
    """`x * factor` in the dtype of x, whatever the factor's."""
    return x * (factor.to(x.dtype) if isinstance(factor, Tensor) else factor)


def divided(x: Tensor, divisor: float | Tensor) -> Tensor:
    """`x / divisor` in the dtype of x, whatever the divisor's."""
    return x / (divisor.to(x.dtype) if isinstance(divisor, Tensor) else divisor)


def moved(x: Tensor, device: torch.device | None, dtype: torch.dtype | None) -> Tensor:
    """A copy on another device, or in another dtype."""
    found = moved_to(x, x.device if device is None else device, x.dtype if dtype is None else dtype)
    return x.clone() if found is x else found


class Applied(Source):
    """A base with a vector added.

    Args:
        base: the model.
        vector: its differences.
        scales: vector's name -> scaling coefficient.
        names: base's name -> vector's name; the base's other tensors are copied.
    """

    def __init__(
        self, base: Source, vector: Source, scales: Mapping[str, float | Tensor], names: Mapping[str, str]
    ) -> None:
        self.wide_base = widened(base)  # as the differences have it: converted once for all of them
        self.sources = (base, self.wide_base, vector)
        self.scales, self.names = dict(scales), dict(names)
        self.specs = dict(base.specs)

    @override
    def block(self, pull: Pull) -> Tensor:
        base, _, vector = self.sources
        if pull.name not in self.names:
            return pull(base).clone()
        own = self.names[pull.name]
        old, delta = pull(self.wide_base), pull.under(own)(vector)
        return applied(old, delta, self.scales[own], self.specs[pull.name].dtype)

    @override
    def into(self, pull: Pull, out: Tensor) -> None:
        base, _, vector = self.sources
        if pull.name not in self.names:
            pull.into(base, out)
            return
        own = self.names[pull.name]
        applied(pull(self.wide_base), pull.under(own)(vector), self.scales[own], out=out)

    @override
    def parts(self, name: str) -> Sequence[tuple[Source, str]]:
        base, _, vector = self.sources
        own = [(vector, self.names[name])] if name in self.names else []
        return [(base, name), (self.wide_base, name), *own]

    @override
    def device(self, name: str) -> torch.device:
        found = {source.device(own): "base" if i < 2 else "vector" for i, (source, own) in enumerate(self.parts(name))}
        if len(found) > 1:
            base, vector = found
            raise MismatchError(f"cannot apply: {name!r} is on {base} in the base and {vector} in the vector")
        return next(iter(found))

    @override
    def key(self) -> Hashable:
        return self.sources, frozen(self.scales), tuple(self.names.items())


def is_number(value: object) -> bool:
    """Whether something can be a scaling coefficient."""
    return isinstance(value, numbers.Real) or (isinstance(value, Tensor) and value.ndim == 0 and not value.is_complex())


def number(value: float | Tensor) -> float | Tensor:
    """A scaling coefficient as a float, or as the tensor it is."""
    return value if isinstance(value, Tensor) else float(value)


def scales_of(scale: Scale, names: Sequence[str]) -> dict[str, float | Tensor]:
    """The scaling coefficient of each name.

    Raises:
        MissingError: a name without one, or a pattern that matches no name.
        RangeError: something that is no number.
    """
    if isinstance(scale, Mapping):
        if idle := unmatched(scale, names):
            raise MissingError(f"scale: {listed(idle)} matches no name of the vector; there are {listed(names)}")
        found = {name: by_name(scale, name) for name in names}
    else:
        found = dict.fromkeys(names, scale)
    for name, value in found.items():
        if value is ABSENT:
            raise MissingError(f"there is no scale for {name!r}; give every name one, the rest by '*'")
        if not is_number(value):
            raise RangeError(f"scale must be a number, a 0-d tensor or a mapping of patterns to either; got {value!r}")
    return {name: number(value) for name, value in found.items()}


def differences(base: Source, tuned: Source, specs: Mapping[str, Spec], dtype: torch.dtype | None) -> Source:
    """The differences of some tensors; the base is converted once, however many vectors are taken from it."""
    names = {name: name for name in specs}
    if isinstance(base, Memory) and isinstance(tuned, Memory):
        return elementwise(difference, renamed(base, names), renamed(tuned, names), args=(dtype,))
    if dtype is not None:
        dtypes = dict.fromkeys(names, dtype)
        return Derived(difference, [renamed(base, names), renamed(tuned, names)], (dtype,), dtypes)
    return Derived(difference, [renamed(widened(base), names), renamed(tuned, names)])


def applied_now(base: Memory, vector: Memory, result: Applied) -> dict[str, Tensor]:
    """A vector applied in memory; gradients flow to the vector and to its scales."""
    for name in result.names:
        result.device(name)
    return {
        name: applied(old, vector.tensors[own], result.scales[own]) if (own := result.names.get(name)) else old.clone()
        for name, old in base.tensors.items()
    }
