"""Safetensors as sources: one file, or a folder of shards with an index.

Opening reads headers only. The `safetensors` package opens and checks them; blocks are read straight from the file.
"""

import json
import os
from collections.abc import Hashable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from typing_extensions import override

from .._engine.buffers import take
from .._engine.lazy import Lazy
from .._engine.names import listed
from .._engine.sources import Pull, Source, Spec
from ..errors import FormatError, LocationError
from .format import DTYPES
from .paths import Stamp, check_same, member, regular, small, stamp_of

__all__ = [
    "File",
    "check_shard",
    "check_whole",
    "described",
    "open_file",
    "open_folder",
    "shard_names",
    "shard_path",
    "weight_files",
    "weight_map",
]


class File(Source):
    """The tensors of one file or of several, which must stay as they were when they were opened.

    Args:
        files: name -> the path of the file it is in.
        specs: name -> shape and dtype.
        stamps: path -> what tells that the file is still the same.
    """

    def __init__(self, files: Mapping[str, str], specs: Mapping[str, Spec], stamps: Mapping[str, Stamp]) -> None:
        self.files, self.specs, self.stamps = dict(files), dict(specs), dict(stamps)

    @override
    def block(self, pull: Pull) -> Tensor:
        low, high = pull.chunk
        if not low <= pull.start <= pull.stop <= high:
            return self._read(pull.name, pull.start, pull.stop)
        place = id(self), pull.name
        if place not in pull.raw:
            pull.raw[place] = self._read(pull.name, low, high)
        return pull.raw[place][pull.start - low : pull.stop - low]

    def _read(self, name: str, start: int, stop: int) -> Tensor:
        # read, not mapped: as fast from the page cache, and what was read does not count as memory once it is dropped
        path, dtype = self.path(name), self.specs[name].dtype
        raw = take((stop - start) * dtype.itemsize)
        view = memoryview(cast("Any", raw.numpy()))
        with Path(path).open("rb", buffering=0) as file:
            now = stamp_of(os.fstat(file.fileno()))
            opened = self.stamps.setdefault(path, now)  # of a file on the Hub, downloaded by now, it is the first
            check_same(path, opened, now)
            file.seek(_described(path, now).begin[name] + start * dtype.itemsize)
            while view and (count := file.readinto(view)):
                view = view[count:]
            check_same(path, opened, stamp_of(os.fstat(file.fileno())))
        if view:
            raise FormatError(f"{path!r} became shorter while it was read; copy it again")
        return raw.view(dtype)

    def path(self, name: str) -> str:
        """The path of the file that a tensor is in."""
        return self.files[name]

    @override
    def device(self, name: str) -> torch.device:
        return torch.device("cpu")

    @override
    def key(self) -> Hashable:
        return tuple(self.files.items()), tuple(self.stamps.items())

    @override
    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"stamps": {path: stamp.anywhere() for path, stamp in self.stamps.items()}}


def open_file(path: Path) -> Lazy:
    """A file, lazy.

    Raises:
        FormatError: damaged, or no regular file.
    """
    name = os.fspath(regular(path))
    file = described(name)
    return Lazy(File(dict.fromkeys(file.specs, name), file.specs, {name: file.stamp}), metadata=file.metadata)


class _Described(NamedTuple):
    """A file as its header describes it: what it holds, where each tensor's bytes begin, and which file that was."""

    specs: dict[str, Spec]
    metadata: dict[str, str]
    begin: dict[str, int]
    stamp: Stamp


def described(path: str) -> _Described:
    """A file's header, read anew only where the file was rewritten.

    Raises:
        FormatError: damaged, or a part of a distributed checkpoint.
    """
    found = _described(path, stamp_of(Path(path).stat()))
    check_whole(path, found.metadata)
    return found


def check_whole(label: str, metadata: Mapping[str, str]) -> None:
    """Refuse a part of a distributed checkpoint, by the metadata of its header."""
    if "DCP_SHARDING_INFO" in metadata:
        raise FormatError(
            f"{label!r} is one part of a distributed checkpoint, whose tensors are cut over several files; join them "
            "first with torch.distributed.checkpoint's consolidate_safetensors_files"
        )


@lru_cache(maxsize=1024)
def _described(path: str, stamp: Stamp) -> _Described:
    """A file's header, read once; its stamp is in the key, so that a rewritten file is read anew.

    The package checks that the header is sound and that tensors fill the file without holes, so where each begins
    follows from their order and sizes.
    """
    specs: dict[str, Spec] = {}
    begin: dict[str, int] = {}
    try:
        opened: Any = safe_open(path, framework="np")  # mapped read-only; as "pt" it could not exceed the memory
        with opened as file:
            for name in file.offset_keys():
                part = file.get_slice(name)
                specs[name] = Spec(tuple(part.get_shape()), _dtype(path, name, part.get_dtype()))
            metadata = dict(file.metadata() or {})
    except (SafetensorError, OSError, RuntimeError) as error:
        raise FormatError(f"{path!r} is not an intact safetensors file: {error}") from error
    check_same(path, stamp, stamp_of(Path(path).stat()))
    place = stamp.size - sum(spec.bytes for spec in specs.values())
    for name, spec in specs.items():
        begin[name] = place
        place += spec.bytes
    return _Described(specs, metadata, begin, stamp)


def _dtype(path: str, name: str, code: str) -> torch.dtype:
    if code not in DTYPES:
        raise FormatError(f"{name!r} in {path!r} has the dtype {code}, which is not supported")
    return DTYPES[code]


# --- folders ---------------------------------------------------------------------------------------------------------


def open_folder(path: Path) -> Lazy:
    """A folder with one file, or with shards and their index, lazy.

    Raises:
        FormatError: several, or none, an index that lies, or a link that leads out of the folder.
        LocationError: a shard that is missing.
    """
    index, file = _found(path)
    return open_file(member(path, file.name)) if index is None else _sharded(path, member(path, index.name))


def weight_files(path: Path) -> list[str]:
    """The names of the files that `open_folder` would read, none if there are none.

    Raises:
        FormatError: it would not know which to read.
    """
    if not any(path.glob("*.safetensors")) and not any(path.glob("*.safetensors.index.json")):
        return []
    index, file = _found(path)
    if index is None:
        return [file.name]
    return sorted({index.name, *(_inside(path, shard, index).name for shard in shard_names(index))})


def _found(path: Path) -> tuple[Path | None, Path]:
    """A folder's index, if it has one, and its file."""
    indices = sorted(path.glob("*.safetensors.index.json"))
    files = sorted(path.glob("*.safetensors"))
    if len(indices) == 1:
        return regular(indices[0]), path
    if not indices and len(files) == 1:
        return None, regular(files[0])
    found = "several indices" if indices else f"{len(files)} .safetensors files and no index" if files else "neither"
    raise FormatError(
        f"{os.fspath(path)!r} must hold one .safetensors file, or shards with one *.safetensors.index.json; it holds "
        f"{found}; give the file itself to load one of them"
    )


def _sharded(path: Path, index: Path) -> Lazy:
    owner = weight_map(index)
    specs: dict[str, Spec] = {}
    metadata: dict[str, str] = {}
    stamps: dict[str, Stamp] = {}
    for shard in shard_names(index):
        own = described(os.fspath(shard_path(path, shard, index)))
        check_shard(shard, own.specs, owner, index)
        specs |= own.specs
        metadata |= own.metadata
        stamps[os.fspath(path / shard)] = own.stamp
    files = {name: os.fspath(path / shard) for name, shard in owner.items()}
    return Lazy(File(files, {name: specs[name] for name in owner}, stamps), metadata=metadata)


def check_shard(shard: str, specs: Mapping[str, Spec], owner: Mapping[str, str], index: Path) -> None:
    """Refuse a shard that does not hold what its index says.

    Args:
        shard: its name.
        specs: what it holds.
        owner: name -> the shard it is in, as the index has it.
        index: for the message.
    """
    promised = [name for name, other in owner.items() if other == shard]
    for wrong, what in (
        ([name for name in promised if name not in specs], "lacks"),
        ([name for name in specs if owner.get(name) != shard], "also holds"),
    ):
        if wrong:
            raise FormatError(f"{shard!r} {what} {listed(wrong)}, against what {os.fspath(index)!r} says")


def weight_map(index: Path) -> dict[str, str]:
    """The file of each tensor, as an index of shards has it.

    Raises:
        FormatError: it is no index.
    """
    text = small(index)
    try:
        found = json.loads(str(text, "utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise FormatError(
            f"{os.fspath(index)!r} is not an index of shards: it needs a JSON object 'weight_map'"
        ) from error
    if not (
        isinstance(found, dict) and found and all(isinstance(v, str) for v in cast("dict[str, Any]", found).values())
    ):
        raise FormatError(f"'weight_map' in {os.fspath(index)!r} must name a file for each tensor")
    return cast("dict[str, str]", found)


def shard_names(index: Path) -> list[str]:
    """The names of the shards of an index, each a plain file name of its own folder.

    Raises:
        FormatError: no index, or one that points elsewhere.
    """
    return [_checked(shard, index) for shard in sorted(set(weight_map(index).values()))]


def _checked(shard: str, index: Path) -> str:
    if shard in ("", ".", "..") or "/" in shard or "\\" in shard or "\0" in shard:
        raise FormatError(f"{os.fspath(index)!r} names the shard {shard!r}, which is not a file of its own folder")
    return shard


def shard_path(folder: Path, shard: str, index: Path) -> Path:
    """The path of a shard, refused unless it is a plain file of the folder, and no link out of it."""
    return member(folder, _inside(folder, shard, index).name)


def _inside(folder: Path, shard: str, index: Path) -> Path:
    """A shard's path, refused unless it is a plain file name in the folder."""
    path = folder / _checked(shard, index)
    if not path.exists():
        raise LocationError(f"{os.fspath(index)!r} names the shard {shard!r}, which is not there; download it again")
    return regular(path)
