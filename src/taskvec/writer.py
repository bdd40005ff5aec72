"""save: any mapping of tensors into safetensors, block by block, never half a file in sight.

A file's header follows from names, shapes and dtypes alone, so it is written first and each block goes straight to its
place. Files are made under a temporary name beside the target and renamed when they are complete and on disk.
"""

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ._errors import DegenerateError, DtypeError, ExistsError, LocationError, RangeError
from ._format import DTYPES, INDEX, record
from ._lazy import READ, Lazy, grain_of, held, read, specs_of
from .vector import TaskVector

__all__ = ["save"]

CODES = {dtype: code for code, dtype in DTYPES.items()}
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def save(
    mapping: Mapping[str, Tensor],
    path: str | os.PathLike[str],
    *,
    max_shard_size: int | str | None = None,
    overwrite: bool = False,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a mapping of tensors as safetensors: one file, or a folder of shards with an index.

    A lazy mapping is computed block by block while it is written. A reader never sees half a file: everything is
    written beside the target and renamed when complete; after a full disk or a kill what was there before is still
    there.

    Args:
        mapping: a state dict, a lazy mapping, a `TaskVector` or a `BackdoorVector` (which `load` gives back as such).
        path: ends in `.safetensors` for one file; anything else is a folder.
        max_shard_size: bytes a shard, as a number or such as `"5GB"`; only for a folder, whose default is one shard.
            A larger tensor gets a shard of its own.
        overwrite: replace what is there.
        metadata: strings to keep in the files, beside those that came with the mapping.

    Raises:
        ExistsError: something is there, and overwrite is false.
        LocationError: the parent folder does not exist.
        DegenerateError: nothing to save.
        DtypeError: a dtype that safetensors cannot hold.
        OSError: a full disk, or any other failure to write; the message names the file.

    Example:
        >>> import tempfile
        >>> from taskvec import load
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save({"w": torch.ones(2)}, f"{folder}/model.safetensors")
        ...     load(f"{folder}/model.safetensors")["w"]
        tensor([1., 1.])
    """
    target = Path(path)
    one_file = target.suffix == ".safetensors"
    if one_file and max_shard_size is not None:
        raise RangeError(f"{os.fspath(path)!r} is one file; for shards give the name of a folder")
    if (target.exists() or target.is_symlink()) and not overwrite:
        raise ExistsError(f"{os.fspath(path)!r} is there already; say overwrite=True to replace it")
    if target.exists() and target.is_dir() == one_file:
        raise ExistsError(
            f"{os.fspath(path)!r} is a {'folder' if one_file else 'file'}: it is not replaced by the other kind"
        )
    if not target.parent.is_dir():
        raise LocationError(f"there is no folder {os.fspath(target.parent)!r} to write into; make it first")
    source, said = _contents(mapping)
    said = said | dict(metadata or {})
    if one_file:
        with _beside(target) as temporary:
            _write_file(source, list(specs_of(source)), temporary / target.name, said)
            (temporary / target.name).replace(target)
        _sync_folder(target.parent)
        return
    shards = _shards(specs_of(source), _bytes(max_shard_size))
    with _beside(target) as temporary:
        complete = temporary / "complete"
        complete.mkdir()
        _write_folder(source, shards, complete, said)
        if target.exists():  # two renames; between them the old folder lies beside its place, whole
            target.replace(temporary / "old")
        complete.replace(target)
    _sync_folder(target.parent)


def _contents(mapping: Mapping[str, Tensor]) -> tuple[dict[str, Tensor] | Lazy, dict[str, str]]:
    if isinstance(mapping, TaskVector):
        source, said = mapping.tensors, record(type(mapping).__name__, mapping.meta)
    else:
        source = held(mapping)
        said = dict(source.metadata) if isinstance(source, Lazy) else {}
    specs = specs_of(source)
    if not specs:
        raise DegenerateError("nothing to save: the mapping is empty")
    for name, spec in specs.items():
        if spec.dtype not in CODES:
            raise DtypeError(f"{name!r} is {spec.dtype}, which safetensors cannot hold")
    return source, {"format": "pt"} | said


def _shards(specs: Mapping[str, Tensor], limit: int | None) -> list[list[str]]:
    """The names of each shard, in order, none above the limit unless one tensor is."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, spec in specs.items():
        size = spec.numel() * spec.dtype.itemsize
        if limit is not None and shards[-1] and filled + size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def _write_folder(
    source: dict[str, Tensor] | Lazy, shards: list[list[str]], folder: Path, said: dict[str, str]
) -> None:
    if len(shards) == 1:
        _write_file(source, shards[0], folder / "model.safetensors", said)
        return
    weight_map: dict[str, str] = {}
    for i, names in enumerate(shards, 1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        _write_file(source, names, folder / file, said)
        weight_map |= dict.fromkeys(names, file)
    specs = specs_of(source)
    total = sum(spec.numel() * spec.dtype.itemsize for spec in specs.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    with (folder / INDEX).open("w", encoding="utf-8") as file:
        json.dump(index, file, indent=2)
        file.flush()
        os.fsync(file.fileno())
    _sync_folder(folder)


def _write_file(source: dict[str, Tensor] | Lazy, names: list[str], path: Path, said: dict[str, str]) -> None:
    header, offsets = _layout(specs_of(source), names, said)
    with path.open("wb") as file:
        file.write(header)
        file.truncate(len(header) + offsets[-1][2])
        for name, begin, _ in offsets:
            file.seek(len(header) + begin)
            _write_tensor(file, source, name)
        file.flush()
        os.fsync(file.fileno())


def _layout(
    specs: Mapping[str, Tensor], names: list[str], said: dict[str, str]
) -> tuple[bytes, list[tuple[str, int, int]]]:
    """A file's header, and the name, begin and end of each tensor in the bytes behind it."""
    ordered = sorted(names, key=lambda name: -specs[name].dtype.itemsize)  # wide first: everything is aligned
    entries: dict[str, Any] = {"__metadata__": said}
    offsets: list[tuple[str, int, int]] = []
    begin = 0
    for name in ordered:
        end = begin + specs[name].numel() * specs[name].dtype.itemsize
        entries[name] = {
            "dtype": CODES[specs[name].dtype],
            "shape": list(specs[name].shape),
            "data_offsets": [begin, end],
        }
        offsets.append((name, begin, end))
        begin = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, offsets


def _write_tensor(file: BinaryIO, source: dict[str, Tensor] | Lazy, name: str) -> None:
    entries = specs_of(source)[name].numel()
    grain = grain_of(source, name)
    step = -(-READ // grain) * grain
    for start in range(0, entries, step):
        block = read(source, name, start, min(start + step, entries)).detach()
        file.write(block.cpu().contiguous().view(torch.uint8).numpy().data)


@contextmanager
def _beside(target: Path) -> Generator[Path]:
    """A temporary folder beside the target, gone afterwards whatever happens."""
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield temporary
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            error.add_note(f"the disk is full: {os.fspath(target)!r} was not written, and what was there is untouched")
        raise
    finally:
        old = temporary / "old"
        if old.exists() and not target.exists():  # the second rename failed: put it back
            old.replace(target)
        shutil.rmtree(temporary, ignore_errors=True)


def _bytes(size: int | str | None) -> int | None:
    if size is None:
        return None
    if isinstance(size, str):
        text = size.strip().upper()
        unit = next((u for u in sorted(UNITS, key=len, reverse=True) if text.endswith(u)), "")
        number = text.removesuffix(unit).strip()
        try:
            size = int(float(number) * UNITS.get(unit, 1))
        except ValueError:
            raise RangeError(f"max_shard_size is bytes or such as '5GB', not {size!r}") from None
    if size <= 0:
        raise RangeError(f"max_shard_size is more than nothing, not {size!r}")
    return size


def _sync_folder(path: Path) -> None:
    if os.name == "posix":  # a rename is on disk when its folder is
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
