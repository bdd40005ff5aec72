"""TaskVector: a mapping of differences, with the algebra of vectors."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from types import MappingProxyType
from typing import Any, Self

import torch
from torch import Tensor, nn
from typing_extensions import override

from .._engine.lazy import Lazy, Sourced, mapping_of, source_of
from .._engine.lift import lift
from .._engine.marks import Leaf, check_kind_of_rule
from .._engine.names import Patterns, check_aligned, listed, matching
from .._engine.run import measure
from .._engine.sources import Memory, Source, elementwise, joined, renamed
from .._engine.totals import gram
from ..errors import DegenerateError, DtypeError, MismatchError, MissingError, NonFiniteError, OptionError
from .arithmetic import (
    Applied,
    Scale,
    applied_now,
    combined,
    copied,
    differences,
    divided,
    is_number,
    minus,
    moved,
    negated,
    number,
    plus,
    scales_of,
    times,
)
from .fingerprint import common_meta, fingerprint
from .measures import far, not_finite, squares
from .model import (
    Model,
    as_model,
    check_apart,
    check_kind,
    check_mapping,
    chosen_names,
    common_ties,
    learned,
    new_names,
    tied_sources,
)
from .show import by_layer_name, entries_in, html_table, norm_text, share_text, summary

__all__ = ["TaskVector", "check_vector", "check_weights", "common_type"]

TIED = "tied"  # the key of `meta` that keeps which names were one tensor


class TaskVector(Sourced):
    """A mapping of differences: tuned minus base, name by name.

    It is immutable, in memory (of dicts) or lazy (of checkpoints on disk): then so is everything made from it, until a
    tensor is asked for or the result is saved. `==` and `hash` are identity; `allclose` compares.

    Args:
        tensors: name -> floating-point difference. The tensors are not copied.
        meta: what is known of it (strings), saved with it: see `TaskVector.meta`.

    Raises:
        DtypeError: a tensor that is not a plain floating-point one.

    Examples:
        >>> base = {"w": torch.tensor([1.0, 2.0])}
        >>> v = TaskVector.between(base, {"w": torch.tensor([1.5, 1.0])})
        >>> v["w"], (2 * v).apply(base)["w"]
        (tensor([ 0.5000, -1.0000]), tensor([2., 0.]))

    References:
        [Ilharco et al., Editing Models with Task Arithmetic, 2022](https://arxiv.org/abs/2212.04089)
    """

    __array_ufunc__ = None  # a numpy scalar on the left leaves the multiplication to us

    def __init__(self, tensors: Mapping[str, Tensor], *, meta: Mapping[str, str] | None = None) -> None:
        if isinstance(tensors, TaskVector):
            meta = tensors.meta if meta is None else meta
        check_mapping("tensors", tensors)
        source = source_of(tensors)
        for name, spec in source.specs.items():
            check_kind(name, source)
            if not spec.dtype.is_floating_point:
                raise DtypeError(f"{name!r} is {spec.dtype}: a task vector holds floating-point differences only")
        super().__init__(source)
        self._meta = dict(meta or {})

    @classmethod
    def between(
        cls,
        base: Mapping[str, Tensor],
        tuned: Mapping[str, Tensor],
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
        sides = {label: _as_weights(label, mapping) for label, mapping in (left, right)}
        base, tuned = sides.values()
        left_out = chosen_names(sides, exclude) or set()
        tied = {a: b for a, b in common_ties(base, tuned).items() if not {a, b} & left_out}
        chosen = chosen_names(sides, include)
        specs = {label: learned(model, {*left_out, *tied}, chosen) for label, model in sides.items()}
        check_aligned(specs, "take the difference")
        check_apart(base.source, tuned.source, specs[left[0]], left[0], right[0])
        kept = {a: b for a, b in tied.items() if b in specs[left[0]]}
        meta = fingerprint(base) | ({TIED: json.dumps(kept)} if kept else {})
        return cls(mapping_of(differences(base.source, tuned.source, specs[left[0]], dtype)), meta=meta)

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """The differences themselves: a dict of those in memory, or a lazy mapping."""
        return mapping_of(self._source)

    @property
    def meta(self) -> Mapping[str, str]:
        """What is known of the vector, saved with it.

        The base's fingerprint (hashes of names, shapes, dtypes and of a few elements), and which weights were tied.
        """
        return MappingProxyType(self._meta)

    @property
    def is_lazy(self) -> bool:
        """Whether tensors are read or computed only when asked for."""
        return not isinstance(self._source, Memory)

    # Mapping

    @override
    def __getitem__(self, name: str) -> Tensor:
        if name not in self._source.specs:
            raise MissingError(f"no tensor {name!r} in this vector; there are {listed(list(self))}")
        if isinstance(self._source, Memory):
            return self._source.tensors[name]
        return Lazy(self._source)[name]

    @override
    def __eq__(self, other: object) -> bool:
        return self is other

    @override
    def __hash__(self) -> int:
        return id(self)

    # algebra

    def __add__(self, other: object) -> "TaskVector":
        return _combine(plus, "add", self, other) if isinstance(other, TaskVector) else NotImplemented

    def __radd__(self, other: object) -> Self:
        if isinstance(other, int) and other == 0:  # the start value of sum(), and nothing else
            return self._each(copied)
        return NotImplemented

    def __sub__(self, other: object) -> "TaskVector":
        return _combine(minus, "subtract", self, other) if isinstance(other, TaskVector) else NotImplemented

    def __mul__(self, factor: float | Tensor) -> Self:
        if not is_number(factor):
            return NotImplemented
        return self._each(times, number(factor))

    __rmul__ = __mul__

    def __truediv__(self, divisor: float | Tensor) -> Self:
        if not is_number(divisor):
            return NotImplemented
        if not isinstance(divisor, Tensor) and divisor == 0:
            raise ZeroDivisionError("cannot divide a task vector by zero")
        return self._each(divided, number(divisor))

    def __neg__(self) -> Self:
        return self._each(negated)

    def __or__(self, other: object) -> "TaskVector":
        if not isinstance(other, TaskVector):
            return NotImplemented
        both = [name for name in self if name in other]
        if both:
            raise MismatchError(f"cannot join: {listed(both)} in both; select() them apart first")
        meta = common_meta([self.meta, other.meta], "join")
        kind = type(self) if type(self) is type(other) else TaskVector
        return kind(mapping_of(joined({name: v.source for v in (self, other) for name in v})), meta=meta)

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

        Examples:
            >>> from taskvec.sparsify import topk
            >>> TaskVector({"w": torch.tensor([3.0, -1.0])}).map(topk, density=0.5)["w"]
            tensor([3., 0.])
        """
        check_kind_of_rule(leaf, "map")
        place = None if device is None else torch.device(device)
        return self._like(lift([self._source], leaf, options, stacked=False, device=place))

    def select(self, *patterns: str) -> Self:
        """The part whose names match any of some glob patterns.

        Args:
            *patterns: such as `"encoder.*"`; `*` matches dots too.

        Raises:
            MissingError: a pattern that matches nothing.

        Examples:
            >>> list(TaskVector({"a.w": torch.ones(1), "b.w": torch.ones(1)}).select("a.*"))
            ['a.w']
        """
        return self.under({name: name for name in matching(list(self), patterns)})

    def rename(self, new: Callable[[str], str]) -> Self:
        """The same tensors under other names.

        Args:
            new: old name -> new name.

        Raises:
            MismatchError: two names become one.

        Examples:
            >>> v = TaskVector({"module.w": torch.ones(1)})
            >>> list(v.rename(lambda name: name.removeprefix("module.")))
            ['w']
        """
        return self.under(new_names(list(self), new))

    def under(self, names: Mapping[str, str]) -> Self:
        """Take some of the tensors under other names.

        Args:
            names: new name -> old name; old names that are not mentioned are left out.
        """
        meta = dict(self._meta)
        if TIED in meta:
            new = {old: name for name, old in names.items()}
            tied = {new.get(a, a): new[b] for a, b in json.loads(meta[TIED]).items() if b in new}
            meta[TIED] = json.dumps(tied)
        return type(self)(mapping_of(renamed(self._source, names)), meta=meta)

    def _each(self, f: Callable[..., Tensor], *args: Any, **how: Any) -> Self:
        return self._like(elementwise(f, self._source, args=args, **how))

    def _like(self, source: Source) -> Self:
        return type(self)(mapping_of(source), meta=self._meta)

    # measures

    def dot(self, other: "TaskVector") -> Tensor:
        """The dot product with another vector of the same names and shapes, 0-d float64.

        Raises:
            MismatchError: names or shapes differ, or the bases do.
            NonFiniteError: NaN or inf.
        """
        _check_pair("take the dot product", self, other)
        return self._number(measure([self._source, other.source], list(self), gram)[0][1])

    def norm(self) -> Tensor:
        """The Euclidean norm over all entries, 0-d float64.

        Raises:
            NonFiniteError: NaN or inf.
        """
        return self._number(math.sqrt(measure([self._source], list(self), squares)))

    def cosine(self, other: "TaskVector") -> Tensor:
        """The cosine of the angle to another vector, 0-d float64 in [-1, 1].

        Raises:
            DegenerateError: one of the two is zero.
            MismatchError: names or shapes differ, or the bases do.
            NonFiniteError: NaN or inf.
        """
        _check_pair("take the cosine", self, other)
        (own, product), (_, others) = measure([self._source, other.source], list(self), gram)
        if not (own > 0 and others > 0):
            raise DegenerateError(f"no cosine: the {'left' if own == 0 else 'right'} vector is zero")
        return self._number(max(-1.0, min(1.0, product / math.sqrt(own) / math.sqrt(others))))

    def allclose(self, other: "TaskVector", *, rtol: float = 1e-5, atol: float = 1e-8) -> bool:
        """Whether `|self - other| <= atol + rtol * |other|` everywhere; names and shapes must be the same.

        Raises:
            MismatchError: names or shapes differ.
        """
        check_vector("other", other)
        check_aligned({"the left": self._source.specs, "the right": other.source.specs}, "compare")
        return not measure([self._source, other.source], list(self), far, rtol, atol)

    def check(self) -> Self:
        """This vector itself, if all of it is finite.

        Raises:
            NonFiniteError: naming each tensor with its numbers of NaN and inf.
        """
        counts = {name: measure([self._source], [name], not_finite) for name in self}
        found = [f"{name!r}: {nan} NaN, {inf} inf" for name, (nan, inf) in counts.items() if nan or inf]
        if found:
            raise NonFiniteError(f"not finite: {'; '.join(found)}")
        return self

    def _number(self, value: float) -> Tensor:
        """A number as a 0-d float64 tensor, where the vector lies."""
        name = next(iter(self), None)
        device = torch.device("cpu") if name is None else self._source.device(name)
        return torch.tensor(value, dtype=torch.float64, device=device)

    # in and out

    def apply(self, base: Mapping[str, Tensor], scale: Scale = 1.0) -> Mapping[str, Tensor]:
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

        Examples:
            >>> base = {"w": torch.tensor([1.0, 2.0])}
            >>> TaskVector({"w": torch.tensor([1.0, -1.0])}).apply(base, scale=0.5)["w"]
            tensor([1.5000, 1.5000])
        """
        model = _as_weights("the base", base)
        names = tied_sources(
            (name for name in self if name in model.specs), model, json.loads(self._meta.get(TIED, "{}"))
        )
        absent = [name for name in self if name not in model.specs and name not in names.values()]
        if absent:
            raise MissingError(f"cannot apply: the base has no {listed(absent)}; select() or rename() the vector")
        own = {name: self._source.specs[source] for name, source in names.items()}
        check_aligned({"the vector": own, "the base": {name: model.specs[name] for name in own}}, "apply")
        result = Applied(model.source, self._source, scales_of(scale, list(self)), names)
        if isinstance(model.source, Memory) and isinstance(self._source, Memory):
            return applied_now(model.source, self._source, result)
        return Lazy(result, tied=model.tied)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        """The same vector on another device or in another floating-point dtype.

        Args:
            device: where to.
            dtype: of every tensor; rounds if it is narrower.
        """
        place = None if device is None else torch.device(device)
        dtypes = None if dtype is None else dict.fromkeys(self, dtype)
        return self._each(moved, place, dtype, dtypes=dtypes, device=place)

    @override
    def __repr__(self) -> str:
        return summary(type(self).__name__, self._source, self.norm)

    def _repr_html_(self) -> str:
        if self.is_lazy:
            return f"<code>{self!r}</code>"
        layers = {
            layer: self.under({name: name for name in names}) for layer, names in by_layer_name(list(self)).items()
        }
        rows = [
            (
                layer,
                str(len(part)),
                f"{entries_in(part.source):,}",
                norm_text(part.norm),
                share_text(part.norm, self.norm),
            )
            for layer, part in layers.items()
        ]
        return html_table(repr(self), ("layers", "tensors", "entries", "norm", "share of norm²"), rows)


def check_weights(label: str, model: object) -> None:
    """Refuse what is not a mapping of weights, a task vector included: it is a difference of two."""
    if isinstance(model, TaskVector):
        got = type(model).__name__
        raise OptionError(
            f"{label} must be a model's weights; got a {got}; use vector.apply(base), or + for two vectors"
        )
    check_mapping(label, model)


def _as_weights(label: str, model: Mapping[str, Tensor]) -> Model:
    check_weights(label, model)
    return as_model(label, model)


def _combine(f: Callable[..., Tensor], doing: str, left: TaskVector, right: TaskVector) -> TaskVector:
    meta = _check_pair(doing, left, right)
    return common_type([left, right])(mapping_of(combined(f, left.source, right.source)), meta=meta)


def common_type(vectors: Sequence[TaskVector]) -> type[TaskVector]:
    """The type that vectors share, if it is one, else the plain one."""
    kinds = {type(vector) for vector in vectors}
    return kinds.pop() if len(kinds) == 1 else TaskVector


def check_vector(label: str, given: object, kind: type[TaskVector] = TaskVector) -> None:
    """Refuse what is not a task vector, saying how to make one."""
    if isinstance(given, kind):
        return
    got = f"the text {given!r}" if isinstance(given, str) else f"a {type(given).__name__}"
    if isinstance(given, TaskVector):
        way = f"{kind.__name__}(vector)"
    elif isinstance(given, nn.Module | str | PathLike):
        way = "load(...), and TaskVector.between(base, tuned)"
    else:
        way = f"{kind.__name__}.between(base, tuned), or {kind.__name__}(differences)"
    raise OptionError(f"{label} must be a {kind.__name__}; got {got}; use {way}")


def _check_pair(doing: str, left: TaskVector, right: TaskVector) -> dict[str, str]:
    check_vector("other", right)
    check_aligned({"the left": left.source.specs, "the right": right.source.specs}, doing)
    return common_meta([left.meta, right.meta], doing)
