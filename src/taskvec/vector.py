"""TaskVector: a mapping of differences, with the algebra of vectors."""

import json
import operator
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, Self

import torch
from torch import Tensor
from typing_extensions import override

from ._arithmetic import (
    Scale,
    divided_by,
    grain_applied,
    is_number,
    moved,
    number,
    read_applied,
    read_difference,
    scale_of,
    times,
)
from ._display import html_table, layer_of, norm_text, share_text
from ._engine import lift
from ._errors import (
    DegenerateError,
    DtypeError,
    MismatchError,
    MissingError,
    NonFiniteError,
    check_aligned,
    listed,
)
from ._fingerprint import common_meta, fingerprint
from ._lazy import Lazy, coarsest, elementwise, held, joined, renamed, specs_of, tied_names
from ._model import Patterns, as_model, check_apart, check_dtype, learned, matching, wider
from ._types import Leaf
from .rules import Place, Total, numbers_in, sum64

__all__ = ["TaskVector", "rounding_loss"]

TIED = "tied"  # the key of `meta` that keeps which names were one tensor


class TaskVector(Mapping[str, Tensor]):
    """A mapping of differences: tuned minus base, name by name.

    It is immutable, in memory (of dicts) or lazy (of checkpoints on disk): then so is everything made from it, until a
    tensor is asked for or the result is saved. `==` and `hash` are identity; `allclose` compares.

    Args:
        tensors: name -> floating-point difference. The tensors are not copied.
        meta: what is known of it (strings), saved with it: see `TaskVector.meta`.

    Raises:
        DtypeError: a tensor that is not a plain floating-point one.

    Example:
        >>> base = {"w": torch.tensor([1.0, 2.0])}
        >>> v = TaskVector.between(base, {"w": torch.tensor([1.5, 1.0])})
        >>> v["w"], (2 * v).apply(base)["w"]
        (tensor([ 0.5000, -1.0000]), tensor([2., 0.]))

    Reference:
        Ilharco et al., Editing Models with Task Arithmetic, 2022, https://arxiv.org/abs/2212.04089
    """

    __array_ufunc__ = None  # a numpy scalar on the left leaves the multiplication to us

    def __init__(self, tensors: Mapping[str, Tensor], *, meta: Mapping[str, str] | None = None) -> None:
        if isinstance(tensors, TaskVector):
            meta = tensors.meta if meta is None else meta
            tensors = tensors.tensors
        kept = held(tensors)
        for name, spec in specs_of(kept).items():
            check_dtype(name, spec)
            if not spec.is_floating_point():
                raise DtypeError(f"{name!r} is {spec.dtype}: a task vector holds floating-point differences only")
        self._tensors = dict(kept) if isinstance(kept, dict) else kept
        self._meta = dict(meta or {})

    @classmethod
    def between(
        cls,
        base: Mapping[str, Tensor],
        tuned: Mapping[str, Tensor],
        /,
        *,
        include: Patterns | None = None,
        exclude: Patterns | None = None,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """The vector from a base to a tuned model: `tuned - base`.

        Floating-point entries only, without BatchNorm's statistics. Differences of half-precision weights are taken
        and kept in float32, those of float64 in float64. Weights tied in both count once. Gradients are detached.

        Args:
            base: the model that was fine-tuned: a state dict, or anything `load` returns.
            tuned: the fine-tuned model, with the same names and shapes.
            include: glob patterns of the names to take; they may name BatchNorm's statistics too.
            exclude: glob patterns of names to leave out.
            dtype: of the differences.

        Returns:
            A vector, lazy if either model is.

        Raises:
            MismatchError: names or shapes differ; the message names them.
            AliasError: the two share storage, so that their difference would be zero for ever.
            DtypeError: float8, complex, quantised or distributed tensors.
            MissingError: a pattern that matches nothing.
        """
        return cls._between(("base", base), ("tuned", tuned), include, exclude, dtype)

    @classmethod
    def _between(
        cls,
        left: tuple[str, Mapping[str, Tensor]],
        right: tuple[str, Mapping[str, Tensor]],
        include: Patterns | None,
        exclude: Patterns | None,
        dtype: torch.dtype | None,
    ) -> Self:
        sides = {label: as_model(label, mapping) for label, mapping in (left, right)}
        specs = {label: learned(specs_of(model), include, exclude) for label, model in sides.items()}
        check_aligned(specs, "take the difference")
        base, tuned = sides.values()
        check_apart(base, tuned, specs[left[0]], left[0], right[0])
        tied = {
            name: first
            for name, first in tied_names(base).items()
            if tied_names(tuned).get(name) == first and name in specs[left[0]] and first in specs[left[0]]
        }
        wanted = {
            name: torch.empty_like(spec, dtype=dtype or wider(spec, specs[right[0]][name]), device="meta")
            for name, spec in specs[left[0]].items()
            if name not in tied
        }
        lazy = Lazy(
            wanted,
            partial(read_difference, base, tuned, {name: spec.dtype for name, spec in wanted.items()}),
            partial(coarsest, (base, tuned)),
        )
        meta = fingerprint(base) | ({TIED: json.dumps(tied)} if tied else {})
        eager = isinstance(base, dict) and isinstance(tuned, dict)
        return cls({name: lazy[name] for name in lazy} if eager else lazy, meta=meta)

    @property
    def tensors(self) -> dict[str, Tensor] | Lazy:
        """The differences themselves: a dict in memory, or a `Lazy`."""
        return self._tensors

    @property
    def meta(self) -> Mapping[str, str]:
        """What is known of it, saved with it.

        The base's fingerprint (hashes of names, shapes, dtypes and of a few elements), and which weights were tied.
        """
        return MappingProxyType(self._meta)

    @property
    def is_lazy(self) -> bool:
        """Whether tensors are read or computed only when asked for."""
        return isinstance(self._tensors, Lazy)

    # Mapping

    @override
    def __getitem__(self, name: str) -> Tensor:
        if name not in self._tensors:
            raise MissingError(f"no tensor {name!r} in this vector; there are {listed(list(self._tensors))}")
        return self._tensors[name]

    @override
    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    @override
    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    @override
    def __len__(self) -> int:
        return len(self._tensors)

    @override
    def __eq__(self, other: object) -> bool:
        return self is other

    @override
    def __hash__(self) -> int:
        return id(self)

    # algebra

    def __add__(self, other: object) -> "TaskVector":
        return _combine(operator.add, "add", self, other) if isinstance(other, TaskVector) else NotImplemented

    def __radd__(self, other: object) -> Self:
        if isinstance(other, int) and other == 0:  # the start value of sum(), and nothing else
            return self._each(torch.clone)
        return NotImplemented

    def __sub__(self, other: object) -> "TaskVector":
        return _combine(operator.sub, "subtract", self, other) if isinstance(other, TaskVector) else NotImplemented

    def __mul__(self, factor: float | Tensor) -> Self:
        if not is_number(factor):
            return NotImplemented
        return self._each(partial(times, number(factor)))

    __rmul__ = __mul__

    def __truediv__(self, divisor: float | Tensor) -> Self:
        if not is_number(divisor):
            return NotImplemented
        if not isinstance(divisor, Tensor) and divisor == 0:
            raise ZeroDivisionError("cannot divide a task vector by zero")
        return self._each(partial(divided_by, number(divisor)))

    def __neg__(self) -> Self:
        return self._each(operator.neg)

    def __or__(self, other: object) -> "TaskVector":
        if not isinstance(other, TaskVector):
            return NotImplemented
        both = [name for name in self if name in other]
        if both:
            raise MismatchError(f"cannot join: {listed(both)} in both; select() them apart first")
        meta = common_meta([self.meta, other.meta], "join")
        kind = type(self) if type(self) is type(other) else TaskVector
        return kind(joined({name: v.tensors for v in (self, other) for name in v}), meta=meta)

    def map(self, leaf: Leaf, /, *, device: torch.device | str | None = None, **options: Any) -> Self:
        """Apply a function of one tensor to every tensor.

        Args:
            leaf: `(*shape) -> (*shape)`, such as `sparsify.topk` or any function of a tensor.
            device: where to compute and leave the result; by default where the vector is.
            **options: for the leaf, each a value for all, or a mapping of names and glob patterns to values.

        Returns:
            A vector of the same type, lazy if this one is.

        Raises:
            OptionError: an option the leaf does not have.
            RuleError: the leaf returned something else than one tensor of the shape it was given.

        Example:
            >>> from taskvec.sparsify import topk
            >>> TaskVector({"w": torch.tensor([3.0, -1.0])}).map(topk, density=0.5)["w"]
            tensor([3., 0.])
        """
        place = None if device is None else torch.device(device)
        return self._like(lift([self._tensors], leaf, options, stacked=False, device=place))

    def select(self, *patterns: str) -> Self:
        """The part whose names match any of some glob patterns.

        Args:
            *patterns: such as `"encoder.*"`; `*` matches dots too.

        Raises:
            MissingError: a pattern that matches nothing.

        Example:
            >>> list(TaskVector({"a.w": torch.ones(1), "b.w": torch.ones(1)}).select("a.*"))
            ['a.w']
        """
        return self._renamed({name: name for name in matching(list(self), patterns)})

    def rename(self, new: Callable[[str], str]) -> Self:
        """The same tensors under other names.

        Args:
            new: old name -> new name.

        Raises:
            MismatchError: two names become one.

        Example:
            >>> v = TaskVector({"module.w": torch.ones(1)})
            >>> list(v.rename(lambda name: name.removeprefix("module.")))
            ['w']
        """
        names = {new(name): name for name in self}
        if len(names) < len(self):
            raise MismatchError("cannot rename: two names become one")
        return self._renamed(names)

    def _renamed(self, names: Mapping[str, str]) -> Self:
        """The tensors under new name -> old name."""
        meta = dict(self._meta)
        if TIED in meta:
            new = {old: name for name, old in names.items()}
            tied = {new.get(a, a): new[b] for a, b in json.loads(meta[TIED]).items() if b in new}
            meta[TIED] = json.dumps(tied)
        return type(self)(renamed(self._tensors, names), meta=meta)

    def _each(self, f: Callable[[Tensor], Tensor]) -> Self:
        return self._like(elementwise(f, self._tensors))

    def _like(self, tensors: dict[str, Tensor] | Lazy) -> Self:
        return type(self)(tensors, meta=self._meta)

    # measures

    def dot(self, other: "TaskVector") -> Tensor:
        """The dot product with another vector of the same names and shapes, 0-d float64.

        Raises:
            MismatchError: names or shapes differ, or the bases do.
            NonFiniteError: NaN or inf.
        """
        _check_pair("take the dot product", self, other)
        return self._sum(other, lambda pair, _: sum64(pair[0].double() * pair[1].double()))

    def norm(self) -> Tensor:
        """The Euclidean norm over all entries, 0-d float64.

        Raises:
            NonFiniteError: NaN or inf.
        """
        total = Total([self._tensors], list(self), stacked=False)
        return total(lambda x, _: sum64(x.double().square())).sqrt() if total.entries else _zero()

    def cosine(self, other: "TaskVector") -> Tensor:
        """The cosine of the angle to another vector, 0-d float64 in [-1, 1].

        Raises:
            DegenerateError: one of the two is zero.
            MismatchError: names or shapes differ, or the bases do.
            NonFiniteError: NaN or inf.
        """
        norms = self.norm(), other.norm()
        if not (norms[0] > 0 and norms[1] > 0):
            raise DegenerateError(f"no cosine: the {'left' if norms[0] == 0 else 'right'} vector is zero")
        return (self.dot(other) / norms[0] / norms[1]).clamp(-1, 1)

    def allclose(self, other: "TaskVector", *, rtol: float = 1e-5, atol: float = 1e-8) -> bool:
        """Whether `|self - other| <= atol + rtol * |other|` everywhere; names and shapes must be the same.

        Raises:
            MismatchError: names or shapes differ.
        """
        check_aligned({"the left": specs_of(self._tensors), "the right": specs_of(other.tensors)}, "compare")
        far = self._sum(other, lambda pair, _: (~pair[0].isclose(pair[1], rtol=rtol, atol=atol)).sum())
        return not bool(far)

    def check(self) -> Self:
        """This vector itself, if all of it is finite.

        Raises:
            NonFiniteError: naming each tensor with its numbers of NaN and inf.
        """
        found: list[str] = []
        for name in self:
            total = Total([self._tensors], [name], stacked=False)
            if total.entries:
                nan, inf = numbers_in(total(lambda x, _: torch.stack([x.isnan().sum(), x.isinf().sum()])))
                found += [f"{name!r}: {nan:.0f} NaN, {inf:.0f} inf"] * bool(nan or inf)
        if found:
            raise NonFiniteError(f"not finite: {'; '.join(found)}")
        return self

    def _sum(self, other: "TaskVector", f: Callable[[Tensor, Place], Tensor]) -> Tensor:
        total = Total([self._tensors, other.tensors], list(self))
        return total(f) if total.entries else _zero()

    # in and out

    def apply(self, base: Mapping[str, Tensor], scale: Scale = 1.0) -> dict[str, Tensor] | Lazy:
        """The model `base + scale * self`.

        Computed in float32 (float64 where either is), and rounded once, to the base's dtype. What the vector does not
        have, integers and BatchNorm's statistics among it, is copied from the base.

        Args:
            base: a model with all of the vector's names.
            scale: the scaling coefficient: a number, a 0-d tensor (gradients flow to it), or a mapping of names and
                glob patterns to either, which must cover every name.

        Returns:
            A new mapping with the base's names, in its order; lazy if base or vector is.

        Raises:
            MissingError: a name the base does not have; no scale for a name.
            MismatchError: shapes differ, or base and vector lie on different devices.

        Example:
            >>> base = {"w": torch.tensor([1.0, 2.0])}
            >>> TaskVector({"w": torch.tensor([1.0, -1.0])}).apply(base, scale=0.5)["w"]
            tensor([1.5000, 1.5000])
        """
        model = as_model("the base", base)
        specs = specs_of(model)
        absent = [name for name in self if name not in specs]
        if absent:
            raise MissingError(f"cannot apply: the base has no {listed(absent)}; select() or rename() the vector")
        check_aligned({"the vector": specs_of(self._tensors), "the base": {n: specs[n] for n in self}}, "apply")
        scales = {name: scale_of(scale, name) for name in self}
        source = {name: name for name in self}
        for name, first in json.loads(self._meta.get(TIED, "{}")).items():
            if name in specs and first in source:
                source.setdefault(name, first)
        reader = partial(read_applied, model, self._tensors, scales, source)
        lazy = Lazy(specs, reader, partial(grain_applied, model, self._tensors, source))
        if isinstance(model, dict) and isinstance(self._tensors, dict):
            return {name: lazy[name] for name in lazy}
        return Lazy({n: s.to("meta") for n, s in specs.items()}, reader, lazy.grain)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        """The same vector on another device or in another floating-point dtype.

        Args:
            device: where to.
            dtype: of every tensor; rounds if it is narrower.
        """
        place = None if device is None else torch.device(device)
        return self._each(partial(moved, place, dtype))

    @override
    def __repr__(self) -> str:
        specs = specs_of(self._tensors)
        entries = sum(spec.numel() for spec in specs.values())
        dtypes = ", ".join(sorted({str(spec.dtype).removeprefix("torch.") for spec in specs.values()})) or "no dtype"
        size = f"{len(self)} tensor{'s' * (len(self) != 1)}, {entries:,} entries"
        if isinstance(self._tensors, Lazy):
            return f"{type(self).__name__}({size}, lazy, {dtypes})"
        devices = ", ".join(sorted({str(tensor.device) for tensor in self._tensors.values()})) or "nowhere"
        return f"{type(self).__name__}({size}, norm {norm_text(self.norm)}, {dtypes} on {devices})"

    def _repr_html_(self) -> str:
        if isinstance(self._tensors, Lazy):
            return f"<code>{self!r}</code>"
        groups: dict[str, list[str]] = {}
        for name in self:
            groups.setdefault(layer_of(name), []).append(name)
        rows: list[tuple[str, ...]] = []
        for group, names in groups.items():
            part = self._renamed({name: name for name in names})
            entries = sum(self[name].numel() for name in names)
            rows.append(
                (group, str(len(names)), f"{entries:,}", norm_text(part.norm), share_text(part.norm, self.norm))
            )
        return html_table(repr(self), ("layers", "tensors", "entries", "norm", "share of norm²"), rows)


def rounding_loss(vector: TaskVector, base: Mapping[str, Tensor], scale: float = 1.0) -> float:
    """The fraction of a vector's non-zero entries that change nothing, because the base's dtype is too coarse.

    Args:
        vector: differences, in float32.
        base: the model it would be applied to, such as one in bfloat16.
        scale: the scaling coefficient.

    Returns:
        A fraction in [0, 1]; 0 for a vector of zeros.

    Example:
        >>> base = {"w": torch.ones(2, dtype=torch.bfloat16)}
        >>> rounding_loss(TaskVector({"w": torch.tensor([1e-4, 0.5])}), base)
        0.5
    """
    model = as_model("the base", base)
    changed, asked = 0, 0
    applied = vector.apply(model, scale)
    for name in vector:
        moves = vector[name] != 0
        asked += int(moves.sum())
        changed += int((moves & (applied[name] != model[name])).sum())
    return 1 - changed / asked if asked else 0.0


def _combine(f: Callable[..., Tensor], doing: str, left: TaskVector, right: TaskVector) -> TaskVector:
    meta = _check_pair(doing, left, right)
    kind = type(left) if type(left) is type(right) else TaskVector
    return kind(elementwise(f, left.tensors, right.tensors), meta=meta)


def _check_pair(doing: str, left: TaskVector, right: TaskVector) -> dict[str, str]:
    check_aligned({"the left": specs_of(left.tensors), "the right": specs_of(right.tensors)}, doing)
    return common_meta([left.meta, right.meta], doing)


def _zero() -> Tensor:
    return torch.zeros((), dtype=torch.float64)
