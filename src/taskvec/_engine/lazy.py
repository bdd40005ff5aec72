"""Mappings over sources: what users hold of tensors that are read or computed when asked for."""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor
from typing_extensions import override

from ..errors import MissingError
from .names import listed
from .run import collect, settle
from .sources import Foreign, Memory, Source, Spec

__all__ = ["Lazy", "Sourced", "mapping_of", "source_of", "specs_of"]


class Sourced(Mapping[str, Tensor]):
    """A mapping of the tensors of a source: its names are known, a tensor is read or computed when asked for.

    Args:
        source: where they come from.
    """

    def __init__(self, source: Source) -> None:
        self._source = source

    @property
    def source(self) -> Source:
        """Where the tensors come from."""
        return self._source

    @override
    def __contains__(self, name: object) -> bool:  # Mapping's own would read the tensor
        return name in self._source.specs

    @override
    def __iter__(self) -> Iterator[str]:
        return iter(self._source.specs)

    @override
    def __len__(self) -> int:
        return len(self._source.specs)

    def __getstate__(self) -> dict[str, Any]:
        settle(self._source)  # before it goes to several processes, which would each take the statistics
        return self.__dict__

    def _ipython_key_completions_(self) -> list[str]:
        return list(self)


class Lazy(Sourced):
    """A mapping of tensors that are read or computed when asked for.

    Args:
        source: where they come from.
        metadata: what a file says of itself (strings), kept by `save`.
        tied: name -> earlier name with the same storage (from a pickle; files of safetensors have none).
    """

    def __init__(
        self, source: Source, *, metadata: Mapping[str, str] | None = None, tied: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(source)
        self.metadata, self.tied = dict(metadata or {}), dict(tied or {})

    @override
    def __getitem__(self, name: str) -> Tensor:
        if name not in self.source.specs:
            raise MissingError(f"no tensor {name!r} here; there are {listed(list(self))}")
        return collect(self.source, [name])[name]

    @override
    def __repr__(self) -> str:
        entries = sum(spec.entries for spec in self.source.specs.values())
        return f"Lazy({len(self)} tensors, {entries:,} entries)"


def source_of(mapping: Mapping[str, Tensor]) -> Source:
    """The source of a mapping: a dict's tensors are in memory, any other's are asked for one by one."""
    found = getattr(mapping, "source", None)
    if isinstance(found, Source):
        return found
    return Memory(mapping) if isinstance(mapping, dict) else Foreign(mapping)


def mapping_of(source: Source) -> Mapping[str, Tensor]:
    """A source as a mapping: a dict of what is in memory."""
    return dict(source.tensors) if isinstance(source, Memory) else Lazy(source)


def specs_of(mapping: Mapping[str, Tensor]) -> Mapping[str, Spec]:
    """Name -> shape and dtype; nothing is read if the mapping is lazy."""
    return source_of(mapping).specs
