"""save: any mapping of tensors into safetensors, block by block, atomically: readers never see partial files.

A file's header follows from names, shapes and dtypes alone, so files are laid out first and each block goes straight to
its place, from several threads. Files are made under a temporary name beside the target and renamed when they are
complete and on disk.
"""

import errno
import json
import os
import shutil
import tempfile
import threading
from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._engine.run import Lazy, source_of, stream
from .._engine.sources import Source, Spec
from .._vectors.model import check_mapping
from .._vectors.vector import TaskVector
from ..errors import DegenerateError, DtypeError, ExistsError, LocationError, RangeError, RuleError
from .cards import Like, carried, model_card
from .format import DTYPES, INDEX, record
from .pickles import SUFFIXES
from .safetensors import weight_files

__all__ = ["check_target", "save", "write_folder"]

CODES = {dtype: code for code, dtype in DTYPES.items()}
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def save(
    mapping: Mapping[str, Tensor],
    path: str | os.PathLike[str],
    *,
    max_shard_size: int | str | None = None,
    overwrite: bool = False,
    metadata: Mapping[str, str] | None = None,
    workers: int = 2,
    like: Like | None = None,
) -> None:
    """Write a mapping of tensors as safetensors: one file, or a folder of shards with an index.

    A lazy mapping is computed block by block while it is written. Everything is written beside the target and renamed
    when complete, so that readers never see partial files; after a full disk or a kill what was there before is still
    there.

    Args:
        mapping: a state dict, a lazy mapping, a `TaskVector` or a `BackdoorVector` (which `load` gives back as such).
        path: ends in `.safetensors` for one file; anything else is a folder.
        max_shard_size: bytes per shard, as a number or such as `"5GB"`; only for a folder, whose default is one shard.
            A larger tensor gets a shard of its own.
        overwrite: replace a file, or a folder's weight files and their index; all else in the folder stays.
        metadata: strings to keep in the files, beside those that came with the mapping.
        workers: threads that compute and write; a rule that is not marked runs in one.
        like: a folder of a Hugging Face model, or what `load` gave of one, here or on the Hub: its configuration and
            its tokenizer's files are copied beside the weights, and a model card says what was merged and how, so that
            `from_pretrained` opens the folder.

    Raises:
        ExistsError: something is there, and overwrite is false.
        LocationError: the parent folder does not exist.
        RangeError: a path with the suffix of a pickle, a shard size or a number of workers that is not positive.
        DegenerateError: nothing to save.
        DtypeError: a dtype that safetensors cannot hold.
        OSError: a full disk, or any other failure to write; the message names the file.

    Examples:
        >>> import tempfile
        >>> from taskvec import load
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save({"w": torch.ones(2)}, f"{folder}/model.safetensors")
        ...     load(f"{folder}/model.safetensors")["w"]
        tensor([1., 1.])
    """
    target = Path(path)
    one_file = target.suffix == ".safetensors"
    check_target(target, one_file, overwrite)
    if one_file and max_shard_size is not None:
        raise RangeError(f"{os.fspath(path)!r} is one file; for shards give the name of a folder")
    if workers < 1:
        raise RangeError(f"workers must be at least 1; got {workers!r}")
    if one_file and like is not None:
        raise RangeError(f"{os.fspath(path)!r} is one file; like= carries files into a folder: give the name of one")
    limit = _bytes(max_shard_size)
    source, said = _contents(mapping)
    said = said | dict(metadata or {})
    others: dict[str, bytes] = {}
    if like is not None:
        others = carried(like) | {"README.md": model_card(source, like, target.name, dict(metadata or {})).encode()}
    if one_file:
        with _beside(target) as temporary:
            _write(source, {target.name: list(source.specs)}, temporary, said, workers)
            (temporary / target.name).replace(target)
        _sync_folder(target.parent)
        return
    write_folder(target, source, _shard_files(_shards(source.specs, limit)), others, said, workers)


def write_folder(
    target: Path,
    source: Source,
    files: Mapping[str, list[str]],
    others: Mapping[str, bytes],
    said: dict[str, str],
    workers: int,
) -> None:
    """Write a folder of safetensors and other files, or put them into one that is there, atomically.

    Args:
        target: the folder.
        source: the tensors.
        files: the name of each file -> the names of its tensors; several get an index.
        others: name -> contents of further files.
        said: metadata of the safetensors.
        workers: threads.
    """
    with _beside(target) as temporary:
        complete = temporary / "complete"
        complete.mkdir()
        _write_files(source, files, complete, said, workers)
        for name, contents in others.items():
            _write_bytes(complete / name, contents)
        if target.exists():  # two renames; between them the old folder lies beside its place, whole
            _keep_others(target, complete)
            target.replace(temporary / "old")
        complete.replace(target)
    _sync_folder(target.parent)


def _write_bytes(path: Path, contents: bytes) -> None:
    with path.open("wb") as file:
        file.write(contents)
        file.flush()
        os.fsync(file.fileno())


def check_target(target: Path, one_file: bool, overwrite: bool) -> None:
    """Refuse a place that nothing can be written to."""
    if target.suffix in SUFFIXES:
        raise RangeError(
            f"{os.fspath(target)!r} has the suffix of a pickle; save() writes safetensors: use "
            f"{os.fspath(target.with_suffix('.safetensors'))!r}, or the name of a folder"
        )
    if (target.exists() or target.is_symlink()) and not overwrite:
        replaced = "it" if one_file else "its weight files and their index; all else in the folder stays"
        raise ExistsError(f"{os.fspath(target)!r} is already there; use overwrite=True to replace {replaced}")
    if target.exists() and target.is_dir() == one_file:
        raise ExistsError(
            f"{os.fspath(target)!r} is a {'folder' if one_file else 'file'}: it is not replaced by the other kind"
        )
    if not target.parent.is_dir():
        raise LocationError(f"there is no folder {os.fspath(target.parent)!r} to write into; make it first")


def _keep_others(old: Path, new: Path) -> None:
    """Put everything of an old folder but its weight files into the new one, as links to the same files."""
    replaced = {*weight_files(old), *(path.name for path in new.iterdir())}

    def ignored(folder: str, names: list[str]) -> set[str]:
        return replaced & set(names) if Path(folder) == old else set()

    shutil.copytree(old, new, symlinks=True, ignore=ignored, copy_function=_link, dirs_exist_ok=True)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:  # a system without links
        shutil.copy2(source, target, follow_symlinks=False)


def _contents(mapping: Mapping[str, Tensor]) -> tuple[Source, dict[str, str]]:
    check_mapping("what is saved", mapping)
    source = source_of(mapping)
    if isinstance(mapping, TaskVector):
        said = record(type(mapping).__name__, mapping.meta)
    else:
        said = dict(mapping.metadata) if isinstance(mapping, Lazy) else {}
    if not source.specs:
        raise DegenerateError("there is nothing to save: the mapping is empty")
    for name, spec in source.specs.items():
        if spec.dtype not in CODES:
            raise DtypeError(f"{name!r} is {spec.dtype}, which safetensors cannot hold")
    return source, {"format": "pt"} | said


def _shards(specs: Mapping[str, Spec], limit: int | None) -> list[list[str]]:
    """The names of each shard, in order, none above the limit unless one tensor is."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, spec in specs.items():
        size = spec.entries * spec.dtype.itemsize
        if limit is not None and shards[-1] and filled + size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def _shard_files(shards: Sequence[list[str]]) -> dict[str, list[str]]:
    """The name of each file, and the names of its tensors."""
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": names for i, names in enumerate(shards, 1)}


def _write_files(
    source: Source, files: Mapping[str, list[str]], folder: Path, said: dict[str, str], workers: int
) -> None:
    _write(source, files, folder, said, workers)
    if len(files) > 1:
        total = sum(spec.entries * spec.dtype.itemsize for spec in source.specs.values())
        weight_map = {name: file for file, names in files.items() for name in names}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _write_bytes(folder / INDEX, json.dumps(index, indent=2).encode())
    _sync_folder(folder)


def _write(source: Source, files: Mapping[str, list[str]], folder: Path, said: dict[str, str], workers: int) -> None:
    """Lay the files out, then write each block of each tensor to its place."""
    places: dict[str, tuple[int, int]] = {}  # name -> descriptor of its file, place of its first byte
    with ExitStack() as opened:
        for file, names in files.items():
            descriptor = opened.enter_context((folder / file).open("w+b", buffering=0)).fileno()
            header, begins, size = _layout(source.specs, names, said)
            _reserve(descriptor, len(header) + size)
            _put(descriptor, memoryview(header), 0)
            places |= {name: (descriptor, len(header) + begin) for name, begin in begins.items()}

        def write(name: str, start: int, block: Tensor) -> None:
            spec = source.specs[name]
            if block.dtype != spec.dtype or start + len(block) > spec.entries:
                raise RuleError(
                    f"{name!r} must be {spec.entries} entries of {spec.dtype}; "
                    f"got {len(block)} of {block.dtype} at {start}"
                )
            descriptor, begin = places[name]
            _put(descriptor, _raw(block), begin + start * spec.dtype.itemsize)

        stream(source, write, [name for names in files.values() for name in names], workers)
        for descriptor in {descriptor for descriptor, _ in places.values()}:
            os.fsync(descriptor)


def _layout(specs: Mapping[str, Spec], names: list[str], said: dict[str, str]) -> tuple[bytes, dict[str, int], int]:
    """A file's header, where each tensor begins in the bytes behind it, and how many those are."""
    ordered = sorted(names, key=lambda name: -specs[name].dtype.itemsize)  # wide first: everything is aligned
    entries: dict[str, Any] = {"__metadata__": said}
    begins: dict[str, int] = {}
    begin = 0
    for name in ordered:
        spec = specs[name]
        end = begin + spec.entries * spec.dtype.itemsize
        entries[name] = {"dtype": CODES[spec.dtype], "shape": list(spec.shape), "data_offsets": [begin, end]}
        begins[name] = begin
        begin = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, begins, begin


def _raw(block: Tensor) -> memoryview:
    """The bytes of a block."""
    block = block.detach().cpu()
    if block.stride() != (1,):  # one entry of a tensor with gaps counts as contiguous, and has no bytes to view
        block = torch.empty(len(block), dtype=block.dtype, device="cpu").copy_(block)
    found: Any = block.view(torch.uint8).numpy()
    return memoryview(found)


def _reserve(descriptor: int, size: int) -> None:
    """Take the space of a file, so that a full disk is noticed before anything is computed."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)
    else:
        os.truncate(descriptor, size)


_SEEKING = threading.Lock()  # where there is no pwrite


def _put(descriptor: int, data: memoryview, place: int) -> None:
    """Write bytes at a place of a file."""
    while data:
        if hasattr(os, "pwrite"):
            count = os.pwrite(descriptor, data, place)
        else:
            with _SEEKING:
                os.lseek(descriptor, place, os.SEEK_SET)
                count = os.write(descriptor, data)
        data, place = data[count:], place + count


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
            raise RangeError(f"max_shard_size must be bytes or text such as '5GB'; got {size!r}") from None
    if size <= 0:
        raise RangeError(f"max_shard_size must be positive; got {size!r}")
    return size


def _sync_folder(path: Path) -> None:
    if os.name == "posix":  # a rename is on disk when its folder is
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
