"""Mappings that are read in blocks.

A `Lazy` knows the shape and dtype of every tensor and how to read a flat run of it. Checkpoints on disk are lazy, and
so is everything computed from them; nothing is read before a tensor, or a part of one, is asked for.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor
from typing_extensions import override

from ._errors import MissingError, listed

BLOCK = 1 << 15
"""Entries in one block on the CPU: the length up to which torch does not split an operation over threads, so that
every sum has the same bits whatever the number of threads. Four arrays of it fit in a second-level cache."""

DEVICE_BLOCK = 1 << 24
"""Entries in one block on other devices, where a launch costs more than the cache gains."""


def block_size(device: torch.device) -> int:
    """The length of a block on a device. Results are cut into blocks at multiples of it, always."""
    return BLOCK if device.type in ("cpu", "meta") else DEVICE_BLOCK


READ = 1 << 20
"""Entries read from a lazy mapping at once, at least: many blocks, so that a read's own cost does not count."""


class Lazy(Mapping[str, Tensor]):
    """A mapping of tensors that are read when asked for, whole or in flat runs.

    It holds functions and data, never closures: where its parts can be pickled, it can be sent to another process.

    Args:
        specs: name -> meta tensor, the shape and dtype of each tensor.
        reader: `reader(name, start, stop)` returns flat entries `[start, stop)` of a tensor.
        grain: `grain(name)`: reads at multiples of it compute nothing twice. A plain file has grain 1.
        device: where what is read lies.
        metadata: what a file says of itself (strings), kept by `save`.
        tied: name -> earlier name with the same storage (from a pickle; files of safetensors have none).
    """

    def __init__(
        self,
        specs: Mapping[str, Tensor],
        reader: Callable[[str, int, int], Tensor],
        grain: Callable[[str], int] | None = None,
        *,
        device: torch.device | None = None,
        metadata: Mapping[str, str] | None = None,
        tied: Mapping[str, str] | None = None,
    ) -> None:
        self.specs = dict(specs)
        self.device = device or torch.device("cpu")
        self.metadata = dict(metadata or {})
        self.tied = dict(tied or {})
        self._reader = reader
        self._grain = grain

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """The flat entries `[start, stop)` of a tensor, `(stop - start,)`."""
        return self._reader(name, start, stop)

    def grain(self, name: str) -> int:
        """Reads that begin and end at multiples of this (or at the end) compute nothing twice."""
        return 1 if self._grain is None else self._grain(name)

    @override
    def __getitem__(self, name: str) -> Tensor:
        if name not in self.specs:
            raise MissingError(f"no tensor {name!r} here; there are {listed(list(self.specs))}")
        spec = self.specs[name]
        return self.read(name, 0, spec.numel()).reshape(spec.shape)

    @override
    def __contains__(self, name: object) -> bool:  # Mapping's own would read the tensor
        return name in self.specs

    @override
    def __iter__(self) -> Iterator[str]:
        return iter(self.specs)

    @override
    def __len__(self) -> int:
        return len(self.specs)

    @override
    def __repr__(self) -> str:
        entries = sum(spec.numel() for spec in self.specs.values())
        return f"Lazy({len(self)} tensors, {entries:,} entries)"


def held(mapping: Mapping[str, Tensor]) -> dict[str, Tensor] | Lazy:
    """The mapping as one of the two kinds the library works with: a dict is in memory, anything else is lazy."""
    if isinstance(mapping, dict | Lazy):
        return mapping
    specs = {name: mapping[name].to("meta") for name in mapping}
    return Lazy(specs, partial(_read_foreign, mapping), partial(_entries_of, specs))


def _read_foreign(mapping: Mapping[str, Tensor], name: str, start: int, stop: int) -> Tensor:
    return mapping[name].reshape(-1)[start:stop]


def _entries_of(specs: Mapping[str, Tensor], name: str) -> int:
    return max(1, specs[name].numel())


def specs_of(mapping: dict[str, Tensor] | Lazy) -> dict[str, Tensor]:
    """Tensors with each one's shape and dtype; nothing is read if the mapping is lazy."""
    return mapping if isinstance(mapping, dict) else mapping.specs


def read(mapping: dict[str, Tensor] | Lazy, name: str, start: int, stop: int) -> Tensor:
    """The flat entries `[start, stop)` of one tensor."""
    return mapping.read(name, start, stop) if isinstance(mapping, Lazy) else mapping[name].reshape(-1)[start:stop]


def grain_of(mapping: dict[str, Tensor] | Lazy, name: str) -> int:
    """Reads at multiples of this compute nothing twice."""
    return mapping.grain(name) if isinstance(mapping, Lazy) else 1


def renamed(source: dict[str, Tensor] | Lazy, names: Mapping[str, str]) -> dict[str, Tensor] | Lazy:
    """The tensors under new name -> old name; old names not mentioned are left out."""
    if isinstance(source, dict):
        return {name: source[old] for name, old in names.items()}
    specs = {name: source.specs[old] for name, old in names.items()}
    own = dict(names)
    return Lazy(specs, partial(_read_renamed, source, own), partial(_grain_renamed, source, own), device=source.device)


def _read_renamed(source: Lazy, names: Mapping[str, str], name: str, start: int, stop: int) -> Tensor:
    return source.read(names[name], start, stop)


def _grain_renamed(source: Lazy, names: Mapping[str, str], name: str) -> int:
    return source.grain(names[name])


def joined(owner: Mapping[str, dict[str, Tensor] | Lazy]) -> dict[str, Tensor] | Lazy:
    """One mapping out of several: each name with the mapping its tensor is in."""
    if all(isinstance(source, dict) for source in owner.values()):
        return {name: source[name] for name, source in owner.items()}
    specs = {name: specs_of(source)[name].to("meta") for name, source in owner.items()}
    own = dict(owner)
    return Lazy(specs, partial(_read_joined, own), partial(_grain_joined, own), device=_home(owner.values()))


def _read_joined(owner: Mapping[str, dict[str, Tensor] | Lazy], name: str, start: int, stop: int) -> Tensor:
    return read(owner[name], name, start, stop)


def _grain_joined(owner: Mapping[str, dict[str, Tensor] | Lazy], name: str) -> int:
    return grain_of(owner[name], name)


def elementwise(f: Callable[..., Tensor], *sources: dict[str, Tensor] | Lazy) -> dict[str, Tensor] | Lazy:
    """`f` of the tensors of each name, entry by entry; gradients flow through what is in memory."""
    if all(isinstance(source, dict) for source in sources):
        return {name: f(*(source[name] for source in sources)) for name in sources[0]}
    specs = {name: f(*(specs_of(source)[name].to("meta") for source in sources)) for name in sources[0]}
    specs = {name: spec.to("meta") for name, spec in specs.items()}
    reader, grain = partial(_read_elementwise, f, sources), partial(coarsest, sources)
    return Lazy(specs, reader, grain, device=_home(sources))


def _read_elementwise(
    f: Callable[..., Tensor], sources: tuple[dict[str, Tensor] | Lazy, ...], name: str, start: int, stop: int
) -> Tensor:
    return f(*(read(source, name, start, stop) for source in sources))


def coarsest(sources: Sequence[dict[str, Tensor] | Lazy], name: str) -> int:
    """The largest grain among several."""
    return max(grain_of(source, name) for source in sources)


def _home(sources: Iterable[dict[str, Tensor] | Lazy]) -> torch.device:
    return next(source.device for source in sources if isinstance(source, Lazy))


def tied_names(mapping: dict[str, Tensor] | Lazy) -> dict[str, str]:
    """Name -> the first name whose whole tensor is the same storage (tied weights)."""
    if isinstance(mapping, Lazy):
        return dict(mapping.tied)
    first: dict[tuple[object, ...], str] = {}
    tied: dict[str, str] = {}
    for name, tensor in mapping.items():
        if tensor.numel() == 0 or tensor.device.type == "meta":
            continue
        place = (tensor.device, tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
        if first.setdefault(place, name) != name:
            tied[name] = first[place]
    return tied


def read_blocks(
    sources: Sequence[dict[str, Tensor] | Lazy], name: str, start: int, stop: int, size: int
) -> Iterator[tuple[int, list[Tensor]]]:
    """The flat entries `[start, stop)` of one tensor of every source, block by block.

    Args:
        sources: mappings with the same names and shapes.
        name: the tensor.
        start: flat index of the first entry, a multiple of `size`.
        stop: flat index behind the last one.
        size: entries in a block.

    Yields:
        The flat index of a block's first entry, and that block of every source, each `(<= size,)`.
    """
    wanted = max(READ, *(grain_of(source, name) for source in sources))
    in_memory = all(isinstance(source, dict) for source in sources)
    chunk = max(size, stop - start) if in_memory else -(-wanted // size) * size
    for low in range(start, stop, chunk):
        high = min(low + chunk, stop)
        flats = [read(source, name, low, high) for source in sources]
        for first in range(low, high, size):
            yield first, [flat[first - low : min(first - low + size, high - low)] for flat in flats]
