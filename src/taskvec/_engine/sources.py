"""Sources: where tensors come from, in memory, on disk, or computed from others, read in flat blocks.

A source knows the shape and dtype of each of its tensors and how to give any flat run of one. It is data and
module-level functions, never closures, so it pickles; two sources made of equal parts are equal, so that a `Pull`
computes what several vectors share only once.
"""

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from functools import reduce, wraps
from math import prod
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor
from typing_extensions import override

from ..errors import MismatchError, RuleError
from .transfers import copy_into

__all__ = [
    "Derived",
    "Foreign",
    "Joined",
    "Memory",
    "Pull",
    "Renamed",
    "Source",
    "Spec",
    "elementwise",
    "joined",
    "remembered",
    "renamed",
]

T = TypeVar("T")
S = TypeVar("S", bound="Source")


class Spec(NamedTuple):
    """The shape and dtype of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def entries(self) -> int:
        """The number of entries."""
        return prod(self.shape)

    @property
    def bytes(self) -> int:
        """The bytes of all entries."""
        return self.entries * self.dtype.itemsize

    @property
    def row(self) -> int:
        """Entries in one row: a slice along dim 0, or all of a tensor with fewer than two dimensions."""
        return max(1, prod(self.shape[1:]) if len(self.shape) > 1 else prod(self.shape))


def spec_of(x: Tensor) -> Spec:
    """A tensor's shape and dtype."""
    return Spec(tuple(x.shape), x.dtype)


def remembered(method: Callable[[S, str], T]) -> Callable[[S, str], T]:
    """Ask a source once for what it says of each name: blocks are many, and the way to the files is long."""

    @wraps(method)
    def asked(self: S, name: str) -> T:
        known = self.__dict__.setdefault("_known", {})
        place = method.__qualname__, name
        if place not in known:
            known[place] = method(self, name)
        return known[place]

    return asked


class Source:
    """Tensors that can be read in flat blocks.

    Attributes:
        specs: name -> shape and dtype; nothing is read for it.
        sources: what it is made of.
    """

    specs: Mapping[str, Spec]
    sources: tuple["Source", ...] = ()

    def block(self, pull: "Pull") -> Tensor:
        """The flat entries `[pull.start, pull.stop)` of the tensor `pull.name`."""
        raise NotImplementedError

    def into(self, pull: "Pull", out: Tensor) -> None:
        """Write the block into given memory, `(pull.stop - pull.start,)` of any dtype."""
        block, dtype = self.block(pull), self.specs[pull.name].dtype
        if block.dtype != dtype or block.shape != out.shape:
            raise RuleError(
                f"{pull.name!r} must be {out.numel()} entries of {dtype} at {pull.start}; got {tuple(block.shape)} of "
                f"{block.dtype}"
            )
        copy_into(out, block.detach())

    def parts(self, name: str) -> Sequence[tuple["Source", str]]:
        """The tensors, of its sources, that one tensor is made of."""
        return [(source, name) for source in self.sources]

    @remembered
    def device(self, name: str) -> torch.device:
        """The device on which a tensor lies.

        Raises:
            MismatchError: its parts lie on several.
        """
        found = {source.device(own) for source, own in self.parts(name)}
        if len(found) > 1:
            places = ", ".join(sorted(str(device) for device in found))
            raise MismatchError(f"{name!r} lies on {places}; say where to compute with device=, or move them with to()")
        return found.pop()

    @remembered
    def grain(self, name: str) -> int:
        """Blocks that begin and end at multiples of this (or at the end) compute nothing twice."""
        return max([1, *(source.grain(own) for source, own in self.parts(name))])

    def key(self) -> Hashable:
        """What it is, by value, beside its type."""
        raise NotImplementedError

    @override
    def __hash__(self) -> int:
        found = self.__dict__.get("_hash")
        if found is None:
            found = self.__dict__["_hash"] = hash((type(self), self.key()))
        return found

    @override
    def __eq__(self, other: object) -> bool:
        return self is other or (
            isinstance(other, Source)
            and type(self) is type(other)
            and hash(self) == hash(other)
            and self.key() == other.key()
        )

    def __getstate__(self) -> dict[str, Any]:
        return {k: value for k, value in self.__dict__.items() if k not in ("_hash", "_known")}  # hashes differ there


class Pull:
    """One block of one tensor: each source is computed once for it, and each file read once for the chunk it is in.

    Args:
        same: id of a source -> the first source that equals it.
        name: the tensor.
        chunk: flat indices within which files are read at once.
    """

    def __init__(
        self,
        same: Mapping[int, Source],
        name: str,
        chunk: tuple[int, int],
        raw: dict[tuple[int, str], Tensor] | None = None,
    ) -> None:
        self.same, self.name, self.chunk = same, name, chunk
        self.raw = {} if raw is None else raw
        self.start, self.stop = chunk
        self._seen: dict[int, Tensor] = {}
        self._others: dict[str, Pull] = {}
        self._around: Pull | None = None

    def at(self, start: int, stop: int) -> "Pull":
        """The pull itself, moved on to another block."""
        self.start, self.stop = start, stop
        self._seen.clear()
        self._others.clear()
        return self

    def apart(self, start: int, stop: int) -> "Pull":
        """A pull of another block of the same tensor, mostly of a part of this one."""
        pull = Pull(self.same, self.name, self.chunk, self.raw).at(start, stop)
        pull._around = self  # noqa: SLF001 - one of its own kind
        return pull

    def under(self, name: str) -> "Pull":
        """A pull of the same block of the tensor of another name."""
        if name == self.name:
            return self
        if name not in self._others:
            self._others[name] = Pull(self.same, name, self.chunk, self.raw).at(self.start, self.stop)
        return self._others[name]

    def __call__(self, source: Source) -> Tensor:
        """The block of a source. It may be a view of what others see too: never write into it."""
        source = self.same[id(source)]
        found = self._seen.get(id(source))
        if found is None:
            found = self._seen[id(source)] = source.block(self) if self._computes(source) else self._cut(source)
        return found

    def into(self, source: Source, out: Tensor) -> None:
        """Write the block of a source, which nothing else needs, into given memory, `(stop - start,)` of any dtype."""
        source = self.same[id(source)]
        if id(source) not in self._seen and self._computes(source):
            source.into(self, out)
        else:
            copy_into(out, self(source).detach())

    def _computes(self, source: Source) -> bool:
        """Whether the block is computed, not cut from the one that this is a part of: where that computes no more."""
        around = self._around
        return (
            around is None
            or not around.start <= self.start <= self.stop <= around.stop
            or source.grain(self.name) <= self.stop - self.start
        )

    def _cut(self, source: Source) -> Tensor:
        around = cast("Pull", self._around)
        return around(source)[self.start - around.start : self.stop - around.start]


class Memory(Source):
    """Tensors in memory."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = dict(tensors)
        self.specs = {name: spec_of(x) for name, x in self.tensors.items()}

    @override
    def block(self, pull: Pull) -> Tensor:
        return flat_run(self.tensors[pull.name], pull.start, pull.stop)

    @override
    def device(self, name: str) -> torch.device:
        return self.tensors[name].device

    @override
    def key(self) -> Hashable:
        return tuple((name, id(x)) for name, x in self.tensors.items())


def flat_run(x: Tensor, start: int, stop: int) -> Tensor:
    """The flat entries `[start, stop)` of a tensor; of one that is not contiguous, no more is copied than is needed."""
    while x.ndim > 1 and x.shape[0] == 1:
        x = x[0]
    if x.is_contiguous() or x.ndim < 2:
        return x.reshape(-1)[start:stop]
    row = x[0].numel()
    first = start // row
    return x[first : -(-stop // row)].reshape(-1)[start - first * row : stop - first * row]


class Foreign(Source):
    """A mapping of somebody else's, which is asked for whole tensors."""

    def __init__(self, mapping: Mapping[str, Tensor]) -> None:
        self.mapping = mapping
        first = {name: mapping[name] for name in mapping}
        self.specs = {name: spec_of(x) for name, x in first.items()}
        self._devices = {name: x.device for name, x in first.items()}

    @override
    def block(self, pull: Pull) -> Tensor:
        return self.mapping[pull.name].reshape(-1)[pull.start : pull.stop]

    @override
    def device(self, name: str) -> torch.device:
        return self._devices[name]

    @override
    def grain(self, name: str) -> int:
        return max(1, self.specs[name].entries)

    @override
    def key(self) -> Hashable:
        return id(self.mapping)


class Derived(Source):
    """`f(*blocks, *args)`, entry by entry, of sources with the same names and shapes.

    Args:
        f: a module-level function of flat tensors; it returns a new one, or `out` where that is given, if it takes it.
        sources: at least one.
        args: further arguments.
        dtypes: name -> dtype of the result; by default what the sources' promote to.
        device: where the result lies, if `f` moves it.
    """

    def __init__(
        self,
        f: Callable[..., Tensor],
        sources: Sequence[Source],
        args: tuple[Any, ...] = (),
        dtypes: Mapping[str, torch.dtype] | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.f, self.sources, self.args, self._device = f, tuple(sources), args, device
        self._takes_out = "out" in (getattr(f, "__kwdefaults__", None) or ())
        self.specs = {
            name: Spec(spec.shape, dtypes[name] if dtypes else widest(source.specs[name].dtype for source in sources))
            for name, spec in sources[0].specs.items()
        }

    @override
    def block(self, pull: Pull) -> Tensor:
        return self.f(*[pull(source) for source in self.sources], *self.args)

    @override
    def into(self, pull: Pull, out: Tensor) -> None:
        if self._takes_out and out.dtype == self.specs[pull.name].dtype and out.device == self.device(pull.name):
            self.f(*[pull(source) for source in self.sources], *self.args, out=out)
        else:
            super().into(pull, out)

    @override
    def device(self, name: str) -> torch.device:
        return self._device or super().device(name)

    @override
    def key(self) -> Hashable:
        dtypes = tuple(spec.dtype for spec in self.specs.values())
        return self.f, self.sources, frozen(self.args), dtypes, self._device


class Renamed(Source):
    """Tensors of a source under new name -> old name; old names not mentioned are left out."""

    def __init__(self, source: Source, names: Mapping[str, str]) -> None:
        self.sources, self.names = (source,), dict(names)
        self.specs = {name: source.specs[old] for name, old in names.items()}

    @override
    def block(self, pull: Pull) -> Tensor:
        return pull.under(self.names[pull.name])(self.sources[0])

    @override
    def parts(self, name: str) -> Sequence[tuple[Source, str]]:
        return [(self.sources[0], self.names[name])]

    @override
    def key(self) -> Hashable:
        return self.sources, tuple(self.names.items())


class Joined(Source):
    """One source out of several: each name with the source its tensor is in."""

    def __init__(self, owner: Mapping[str, Source]) -> None:
        self.owner = dict(owner)
        self.sources = tuple(dict.fromkeys(owner.values()))
        self.specs = {name: source.specs[name] for name, source in owner.items()}

    @override
    def block(self, pull: Pull) -> Tensor:
        return pull(self.owner[pull.name])

    @override
    def parts(self, name: str) -> Sequence[tuple[Source, str]]:
        return [(self.owner[name], name)]

    @override
    def key(self) -> Hashable:
        return tuple(self.owner.items())


def elementwise(f: Callable[..., Tensor], *sources: Source, args: tuple[Any, ...] = (), **how: Any) -> Source:
    """`f` of the tensors of each name, entry by entry: at once, with gradients, of what is in memory, else when read.

    Args:
        f: `f(*tensors, *args)`, a module-level function.
        sources: with the same names and shapes.
        args: further arguments of f.
        **how: of `Derived`.
    """
    held = [source for source in sources if isinstance(source, Memory)]
    if len(held) == len(sources):
        return Memory({name: f(*(source.tensors[name] for source in held), *args) for name in held[0].tensors})
    return Derived(f, sources, args, **how)


def renamed(source: Source, names: Mapping[str, str]) -> Source:
    """The tensors under new name -> old name; old names not mentioned are left out."""
    if isinstance(source, Memory):
        return Memory({name: source.tensors[old] for name, old in names.items()})
    return Renamed(source, names)


def joined(owner: Mapping[str, Source]) -> Source:
    """One source out of several: each name with the source its tensor is in."""
    held = {name: source for name, source in owner.items() if isinstance(source, Memory)}
    if len(held) == len(owner):
        return Memory({name: source.tensors[name] for name, source in held.items()})
    return Joined(owner)


def widest(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """The dtype that holds all of them."""
    return reduce(torch.promote_types, dtypes)


def frozen(value: Any) -> Hashable:
    """A value by which arguments are compared: numbers and strings by value, all else by identity."""
    if isinstance(value, tuple | list):
        return "sequence", tuple(frozen(item) for item in cast("Sequence[Any]", value))
    if isinstance(value, Mapping):
        return "mapping", tuple((key, frozen(item)) for key, item in cast("Mapping[Any, Any]", value).items())
    if isinstance(value, int | float | str | bytes | None | torch.dtype | torch.device):
        return type(value), repr(value)
    return id(value)
