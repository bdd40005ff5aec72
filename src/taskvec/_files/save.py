"""save: any mapping of tensors into safetensors, block by block, atomically: readers never see partial files.

Files are laid out first, under a temporary name beside the target, and every chunk goes straight to its place, from any
worker. A journal tells what is there already, so that a killed run can continue. The finished output takes the target's
place in one step.
"""

import errno
import json
import os
import shutil
import warnings
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from .._engine.lazy import Lazy, source_of
from .._engine.memory import peak_bytes
from .._engine.run import stream
from .._engine.sources import Source
from .._vectors.model import check_mapping
from .._vectors.vector import TaskVector
from ..errors import DegenerateError, ExistsError, LocationError, RangeError
from .cards import Like, carried, model_card
from .format import INDEX, record
from .layout import Layout, Writer, Written, lay_out, put, read_back, shard_files
from .partial import Partial, begun, keep_owner, sync, sync_folder, take_place
from .pickles import SUFFIXES
from .progress import Progress
from .provenance import PROVENANCE, RESULT, digest, provenance
from .safetensors import weight_files

__all__ = ["How", "check_target", "peak_memory", "save", "write"]

UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}

SYNCED = 1 << 27
"""Bytes written from one time that a file is brought to the disk to the next, at least."""


def save(
    mapping: Mapping[str, Tensor],
    path: str | os.PathLike[str],
    *,
    max_shard_size: int | str | None = None,
    overwrite: bool = False,
    resume: bool = False,
    metadata: Mapping[str, str] | None = None,
    workers: int = 2,
    executor: Executor | None = None,
    memory: int | str | None = None,
    like: Like | None = None,
) -> None:
    """Write a mapping of tensors as safetensors: one file, or a folder of shards with an index.

    A lazy mapping is computed block by block while it is written. Everything is written beside the target, and takes
    its place in one step when it is complete, so that readers never see partial files; after a full disk or a kill
    what was there before is still there. The bits do not depend on shards, workers, executors or interruptions.

    Args:
        mapping: a state dict, a lazy mapping, a `TaskVector` or a `BackdoorVector` (which `load` gives back as such).
        path: ends in `.safetensors` for one file; anything else is a folder.
        max_shard_size: bytes per shard, as a number or such as `"5GB"`; only for a folder, whose default is one shard.
            A larger tensor gets a shard of its own.
        overwrite: replace a file, or a folder's weight files and their index; all else in the folder stays.
        resume: continue a run that was killed, if there is one and it was of the same result; and keep what is
            written if this one fails. A target that holds this very result already is left as it is.
        metadata: strings to keep in the files, beside those that came with the mapping.
        workers: threads that compute and write; a rule that is not marked runs in one.
        executor: computes and writes instead, in its own processes: any `concurrent.futures.Executor`, such as that of
            a Dask cluster whose workers see the same files. Inputs must be on disk.
        memory: bytes that may be taken, as a number or such as `"2GB"`; see `peak_memory`.
        like: a folder of a Hugging Face model, or what `load` gave of one, here or on the Hub: its configuration and
            its tokenizer's files are copied beside the weights, and a model card says what was merged and how, so that
            `from_pretrained` opens the folder.

    Raises:
        ExistsError: something is there, and overwrite is false; or an unfinished output is there, and resume is false
            or it is of another result; or another process writes there now.
        LocationError: the parent folder does not exist.
        RangeError: a path with the suffix of a pickle, a shard size or a number of workers that is not positive, less
            memory than is needed, names or metadata that readers would refuse.
        DegenerateError: nothing to save.
        DtypeError: a dtype that safetensors cannot hold.
        OptionError: an executor of other processes, and inputs or rules that cannot be sent to them.
        FormatError: an input that was changed after it was opened.
        OSError: a full disk, or any other failure to write; the message names the file.

    Examples:
        >>> import tempfile
        >>> import torch
        >>> from taskvec import load
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save({"w": torch.ones(2)}, f"{folder}/model.safetensors")
        ...     load(f"{folder}/model.safetensors")["w"]
        tensor([1., 1.])
    """
    target = Path(path)
    one_file = target.suffix == ".safetensors"
    _check_place(target, one_file)
    if one_file and max_shard_size is not None:
        raise RangeError(f"{os.fspath(path)!r} is one file; for shards give the name of a folder")
    if workers < 1:
        raise RangeError(f"workers must be at least 1; got {workers!r}")
    if one_file and like is not None:
        raise RangeError(f"{os.fspath(path)!r} is one file; like= carries files into a folder: give the name of one")
    limit = None if max_shard_size is None else _bytes("max_shard_size", max_shard_size)
    source, said = _contents(mapping)
    said = said | provenance(source) | dict(metadata or {})
    others: dict[str, bytes] = {}
    if like is not None:
        others = carried(like) | {"README.md": model_card(source, like, target.name, dict(metadata or {})).encode()}
    files = {target.name: list(source.specs)} if one_file else shard_files(source.specs, limit)
    how = How(overwrite, resume, workers, executor, None if memory is None else _bytes("memory", memory))
    write(target, source, files, others, said, how)


def peak_memory(mapping: Mapping[str, Tensor], *, workers: int = 2) -> int:
    """Bound the memory that `save` takes for a lazy mapping, beside what the process holds already.

    `FIXED + workers * (chunks of all inputs + blocks of everything computed from them) + samples of statistics`, for
    the tensor that needs most; it does not grow with the number of tensors. A rule that is not marked is given whole
    tensors, and takes several of the largest.

    Args:
        mapping: what would be saved; nothing is read.
        workers: as in `save`.

    Returns:
        Bytes.

    Examples:
        >>> import torch
        >>> peak_memory({"w": torch.ones(1000)}) < 100_000_000
        True
    """
    source = source_of(mapping)
    return peak_bytes(source, list(source.specs), workers)


class How(NamedTuple):
    """How an output is written: see `save`."""

    overwrite: bool = False
    resume: bool = False
    workers: int = 2
    executor: Executor | None = None
    memory: int | None = None


def write(
    target: Path,
    source: Source,
    files: Mapping[str, Sequence[str]],
    others: Mapping[str, bytes],
    said: Mapping[str, str],
    how: How,
) -> None:
    """Write safetensors and other files as one folder, or one file, atomically.

    Args:
        target: a folder, or a file if its name is that of the only one of `files`.
        source: the tensors.
        files: the name of each file -> the names of its tensors; several get an index.
        others: name -> contents of further files.
        said: metadata of the safetensors.
        how: the options of `save`.
    """
    one_file = list(files) == [target.name]
    layout = lay_out(source.specs, files, said)
    same = digest(source, contents=how.resume)
    _check_memory(source, how)
    with begun(target, same, resume=how.resume) as partial:
        if how.resume and (_taken(target, partial) or _holds(target, one_file, layout, said)):
            return  # killed after it took its place, or not at all
        check_target(target, one_file, how.overwrite)
        _check_space(partial, layout)
        _write_files(partial, source, layout, how)
        index = {INDEX: _index(source, files)} if len(files) > 1 else {}
        for name, contents in {**others, **index}.items():
            _write_bytes(partial.complete / name, contents)
        sync_folder(partial.complete)
        new = partial.complete / target.name if one_file else partial.complete
        if target.exists():
            _keep_what_stays(target, new, one_file)
        partial.ready(new)
        take_place(new, target, partial.folder / "old", overwrite=how.overwrite)
        sync_folder(target.parent)


def _write_files(partial: Partial, source: Source, layout: Layout, how: How) -> None:
    """Reserve the files, then write each chunk of each tensor to its place, but those that are there."""
    for file, size in layout.sizes.items():
        with (partial.complete / file).open("ab", buffering=0) as opened:
            _reserve(opened.fileno(), size)
        with (partial.complete / file).open("r+b", buffering=0) as opened:
            put(opened.fileno(), layout.headers[file], 0)
    names = list(layout.places)
    written = (_written(entry, source) for entry in partial.entries())
    done = {
        (one.name, one.start, one.stop)
        for one in written
        if one is not None and read_back(partial.complete, layout, source.specs, one) == one.checksum
    }
    with Progress(_bytes_of(source)) as progress, _syncing(partial.complete) as sync_soon:

        def heard(written: Written) -> None:
            partial.note(written)
            count = (written.stop - written.start) * source.specs[written.name].dtype.itemsize
            progress.add(count)
            sync_soon(layout.places[written.name][0], count)

        for name, start, stop in done:
            progress.add((stop - start) * source.specs[name].dtype.itemsize, now=False)
        writer = Writer(partial.complete, layout, source.specs)
        stream(source, writer, names, how.workers, executor=how.executor, done=done, heard=heard)
    for file in layout.sizes:
        sync(partial.complete / file)


@contextmanager
def _syncing(folder: Path) -> Generator[Callable[[str, int], None]]:
    """Bring files to the disk while they are written, so that little is left to be waited for at the end.

    Gives what is to be called with the name of a file and how many bytes were written to it.
    """
    count, running = 0, None
    with ThreadPoolExecutor(1, "taskvec-sync") as thread:

        def add(file: str, written: int) -> None:
            nonlocal count, running
            count += written
            if count >= SYNCED and (running is None or running.done()):
                if running is not None:
                    running.result()
                count, running = 0, thread.submit(sync, folder / file)

        yield add
        if running is not None:
            running.result()  # the system tells of a failure once only: the last sync would not see it


def _written(entry: Sequence[Any], source: Source) -> Written | None:
    """A line of the journal, if it tells of a chunk that there can be."""
    if len(entry) != 5 or entry[0] != "written" or entry[1] not in source.specs:
        return None
    if not all(type(number) is int for number in entry[2:]) or not 0 <= entry[2] <= entry[3]:
        return None
    return Written(*entry[1:]) if entry[3] <= source.specs[entry[1]].entries else None


def _taken(target: Path, partial: Partial) -> bool:
    """Whether what the journal calls ready is in the target's place already."""
    last = partial.entries()[-1:]
    if not last or last[0][0] != "ready" or not target.exists():
        return False
    found = target.stat()
    return last[0][1:] == [found.st_dev, found.st_ino]


def _holds(target: Path, one_file: bool, layout: Layout, said: Mapping[str, str]) -> bool:
    """Whether the target is this very output: its headers say so, with a hash of all that it depends on."""
    if f'"{RESULT}"' not in said.get(PROVENANCE, ""):
        return False
    for file, header in layout.headers.items():
        path = target if one_file else target / file
        if not path.is_file() or path.stat().st_size != layout.sizes[file]:
            return False
        with path.open("rb") as opened:
            if opened.read(len(header)) != header:
                return False
    return True


def _index(source: Source, files: Mapping[str, Sequence[str]]) -> bytes:
    weight_map = {name: file for file, names in files.items() for name in names}
    return json.dumps({"metadata": {"total_size": _bytes_of(source)}, "weight_map": weight_map}, indent=2).encode()


def _bytes_of(source: Source) -> int:
    return sum(spec.bytes for spec in source.specs.values())


def _write_bytes(path: Path, contents: bytes) -> None:
    with path.open("wb") as file:
        file.write(contents)
        file.flush()
        os.fsync(file.fileno())


# --- what is refused -------------------------------------------------------------------------------------------------


def _check_place(target: Path, one_file: bool) -> None:
    """Refuse a place that nothing can be written to, whatever is there."""
    if target.suffix in SUFFIXES:
        raise RangeError(
            f"{os.fspath(target)!r} has the suffix of a pickle; save() writes safetensors: use "
            f"{os.fspath(target.with_suffix('.safetensors'))!r}, or the name of a folder"
        )
    if target.exists() and target.is_dir() == one_file:
        raise ExistsError(
            f"{os.fspath(target)!r} is a {'folder' if one_file else 'file'}: it is not replaced by the other kind"
        )
    if not target.parent.is_dir():
        raise LocationError(f"there is no folder {os.fspath(target.parent)!r} to write into; make it first")


def check_target(target: Path, one_file: bool, overwrite: bool) -> None:
    """Refuse a place that nothing can or may be written to."""
    _check_place(target, one_file)
    if (target.exists() or target.is_symlink()) and not overwrite:
        replaced = "it" if one_file else "its weight files and their index; all else in the folder stays"
        raise ExistsError(f"{os.fspath(target)!r} is already there; use overwrite=True to replace {replaced}")


def _check_memory(source: Source, how: How) -> None:
    """Refuse or warn of what will not fit; other processes have memory of their own."""
    if how.executor is not None:
        return
    needed = peak_bytes(source, list(source.specs), how.workers)
    if how.memory is not None and needed > how.memory:
        raise RangeError(
            f"memory must be at least {needed:,} bytes for this with {how.workers} workers; got {how.memory:,}; use "
            "fewer workers, or a rule that runs on pieces (see taskvec.rules.runs)"
        )
    free = _free_memory()
    if how.memory is None and free is not None and needed > free:
        warnings.warn(
            f"save() may need {needed:,} bytes of memory, and {free:,} are free", ResourceWarning, stacklevel=4
        )


def _free_memory() -> int | None:
    """Bytes that can be had without swapping, where the system says so."""
    try:
        lines = Path("/proc/meminfo").read_text("ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        return None


def _check_space(partial: Partial, layout: Layout) -> None:
    """Refuse an output that the disk cannot hold, before anything is computed."""
    there = sum(path.stat().st_blocks * 512 for path in partial.complete.iterdir()) if os.name == "posix" else 0
    needed, free = sum(layout.sizes.values()) - there, shutil.disk_usage(partial.folder).free
    if needed > free:
        raise OSError(errno.ENOSPC, f"this takes {needed:,} bytes, and {free:,} are free", os.fspath(partial.folder))


def _reserve(descriptor: int, size: int) -> None:
    """Take the space of a file, and no more."""
    os.truncate(descriptor, size)
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)


# --- what stays ------------------------------------------------------------------------------------------------------


def _keep_what_stays(old: Path, new: Path, one_file: bool) -> None:
    """Carry over everything of an old folder but its weight files, and the modes and owners of what is replaced."""
    if not one_file:
        replaced = {*weight_files(old), *(path.name for path in new.iterdir())}
        for name in {path.name for path in new.iterdir()} & {path.name for path in old.iterdir()}:
            keep_owner(old / name, new / name)

        def ignored(folder: str, names: list[str]) -> set[str]:
            return replaced & set(names) if Path(folder) == old else set()

        shutil.copytree(old, new, symlinks=True, ignore=ignored, copy_function=_link, dirs_exist_ok=True)
    keep_owner(old, new)


def _link(source: str, target: str) -> None:
    Path(target).unlink(missing_ok=True)  # of a run that was killed
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
    return source, {"format": "pt"} | said


def _bytes(option: str, size: int | str) -> int:
    if isinstance(size, str):
        text = size.strip().upper()
        unit = next((u for u in sorted(UNITS, key=len, reverse=True) if text.endswith(u)), "")
        number = text.removesuffix(unit).strip()
        try:
            size = int(float(number) * UNITS.get(unit, 1))
        except ValueError:
            raise RangeError(f"{option} must be bytes or text such as '5GB'; got {size!r}") from None
    if size <= 0:
        raise RangeError(f"{option} must be positive; got {size!r}")
    return size
