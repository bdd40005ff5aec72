"""Where every byte of an output goes: known before anything is computed, so that any worker can write any chunk.

A file's header follows from names, shapes and dtypes alone.
"""

import json
import os
import threading
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from .._engine.buffers import give_back, take
from .._engine.run import Fill
from .._engine.sources import Spec
from ..errors import DtypeError, RangeError
from .format import DTYPES

__all__ = ["Layout", "Writer", "Written", "lay_out", "put", "read_back", "shard_files"]

CODES = {dtype: code for code, dtype in DTYPES.items()}

LONGEST_HEADER = 100_000_000
"""Bytes; readers of safetensors refuse more."""

PAGE = 1 << 12
"""Bytes that are added up in a checksum."""


class Layout(NamedTuple):
    """The files of an output.

    Attributes:
        headers: file -> its first bytes.
        sizes: file -> all its bytes.
        places: name -> the file it is in, and where its first byte lies.
    """

    headers: dict[str, bytes]
    sizes: dict[str, int]
    places: dict[str, tuple[str, int]]


def lay_out(specs: Mapping[str, Spec], files: Mapping[str, Sequence[str]], said: Mapping[str, str]) -> Layout:
    """The layout of some files.

    Args:
        specs: name -> shape and dtype.
        files: the name of each file -> the names of its tensors.
        said: metadata of each.

    Raises:
        DtypeError: a dtype that safetensors cannot hold.
        RangeError: what readers would refuse.
    """
    _check_names(specs, said)
    headers: dict[str, bytes] = {}
    sizes: dict[str, int] = {}
    places: dict[str, tuple[str, int]] = {}
    for file, names in files.items():
        header, begins, size = _header(specs, names, said)
        if len(header) > LONGEST_HEADER:
            raise RangeError(
                f"the header of {file!r} must be at most {LONGEST_HEADER:,} bytes, or nothing can read it; got "
                f"{len(header):,}: use a smaller max_shard_size, or less metadata"
            )
        headers[file], sizes[file] = header, len(header) + size
        places |= {name: (file, len(header) + begin) for name, begin in begins.items()}
    return Layout(headers, sizes, places)


def _check_names(specs: Mapping[str, Spec], said: Mapping[Any, Any]) -> None:
    for name, spec in specs.items():
        if not isinstance(name, str):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise RangeError(f"the name of a tensor must be a string; got {name!r}")
        if not _writable(name):
            raise RangeError(f"the name of a tensor must be text that UTF-8 can hold; got {name!r}")
        if name == "__metadata__":
            raise RangeError("no tensor can be called '__metadata__' in safetensors; rename() it")
        if spec.dtype not in CODES:
            raise DtypeError(f"{name!r} is {spec.dtype}, which safetensors cannot hold")
    for key, value in said.items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise RangeError(f"metadata must map strings to strings; got {key!r}: {value!r}; use json.dumps")
        if not _writable(key + value):
            raise RangeError(f"metadata must be text that UTF-8 can hold; got {key!r}: {value!r}")


def _writable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _header(
    specs: Mapping[str, Spec], names: Sequence[str], said: Mapping[str, str]
) -> tuple[bytes, dict[str, int], int]:
    """A file's header, where each tensor begins in the bytes behind it, and how many those are."""
    ordered = sorted(names, key=lambda name: -specs[name].dtype.itemsize)  # wide first: everything is aligned
    entries: dict[str, Any] = {"__metadata__": dict(said)}
    begins: dict[str, int] = {}
    begin = 0
    for name in ordered:
        spec = specs[name]
        end = begin + spec.bytes
        entries[name] = {"dtype": CODES[spec.dtype], "shape": list(spec.shape), "data_offsets": [begin, end]}
        begins[name] = begin
        begin = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, begins, begin


def shard_files(specs: Mapping[str, Spec], limit: int | None) -> dict[str, list[str]]:
    """The name of each file of a folder, and the names of its tensors in order.

    None is above the limit unless one tensor is.
    """
    shards: list[list[str]] = [[]]
    filled = 0
    for name, spec in specs.items():
        if limit is not None and shards[-1] and filled + spec.bytes > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += spec.bytes
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": names for i, names in enumerate(shards, 1)}


# --- writing ---------------------------------------------------------------------------------------------------------


class Written(NamedTuple):
    """A chunk that is in its file: its name, its flat entries, and the checksum of their bytes."""

    name: str
    start: int
    stop: int
    checksum: int


class Writer:
    """Writes chunks straight to their places; it pickles, so that other processes can write theirs.

    Args:
        folder: of the files, which are there in full length.
        layout: where everything goes.
        specs: name -> shape and dtype.
    """

    def __init__(self, folder: Path, layout: Layout, specs: Mapping[str, Spec]) -> None:
        self.folder, self.places = folder, layout.places
        self.dtypes = {name: spec.dtype for name, spec in specs.items()}

    def __call__(self, name: str, start: int, stop: int, fill: Fill) -> Written:
        file, begin = self.places[name]
        dtype = self.dtypes[name]
        raw = take((stop - start) * dtype.itemsize)
        fill(raw.view(dtype))
        data = _buffer(raw)
        descriptor = os.open(self.folder / file, os.O_WRONLY | getattr(os, "O_BINARY", 0))
        try:
            put(descriptor, data, begin + start * dtype.itemsize)
        finally:
            os.close(descriptor)
        found = checksum([raw])
        give_back([raw])
        return Written(name, start, stop, found)


_SEEKING = threading.Lock()  # where there is no pwrite


def put(descriptor: int, data: memoryview | bytes, place: int) -> None:
    """Write bytes at a place of a file."""
    data = memoryview(data)
    while data:
        if hasattr(os, "pwrite"):
            count = os.pwrite(descriptor, data, place)
        else:
            with _SEEKING:
                os.lseek(descriptor, place, os.SEEK_SET)
                count = os.write(descriptor, data)
        data, place = data[count:], place + count


def read_back(folder: Path, layout: Layout, specs: Mapping[str, Spec], written: Written) -> int:
    """The checksum of a chunk as it lies in its file; -1 where the file ends before it."""
    file, begin = layout.places[written.name]
    size = specs[written.name].dtype.itemsize
    left = (written.stop - written.start) * size

    def pieces(opened: Any) -> Iterator[Tensor]:
        nonlocal left
        while left > 0 and (data := bytearray(opened.read(min(left, 1024 * PAGE)))):
            left -= len(data)
            yield torch.frombuffer(data, dtype=torch.uint8)

    with (folder / file).open("rb") as opened:
        opened.seek(begin + written.start * size)
        found = checksum(pieces(opened))
    return found if left == 0 else -1


def checksum(pieces: Iterable[Tensor]) -> int:
    """CRC-32 of what the words of every page add up to, and of what those of all pages do, place by place.

    It costs a sixth of the CRC-32 of all bytes, and misses no change within a word, no page and no two words that
    changed places.

    Args:
        pieces: bytes, `(m,)` uint8, of whole pages but for the last.
    """
    found, columns = 0, torch.zeros(PAGE // 8, dtype=torch.int64)
    for piece in pieces:
        if missing := -len(piece) % PAGE:
            piece = torch.cat([piece, torch.zeros(missing, dtype=torch.uint8)])  # noqa: PLW2901 - the last one
        words = piece.view(torch.int64).reshape(-1, PAGE // 8)
        found = zlib.crc32(_buffer(words.sum(1)), found)
        columns += words.sum(0)
    return zlib.crc32(_buffer(columns), found)


def _buffer(x: Tensor) -> memoryview:
    return memoryview(cast("Any", x.numpy()))
