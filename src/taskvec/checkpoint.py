"""load: checkpoints as lazy mappings.

Opening reads headers only; tensors are read when asked for, in blocks. Safetensors are opened and checked by the
`safetensors` package, pickles by `torch.load(weights_only=True)`, memory-mapped; nothing else is ever unpickled.
"""

import json
import os
import pickle
import warnings
from collections.abc import Mapping
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ._errors import DtypeError, FormatError, LocationError, listed
from ._format import DTYPES, RECORD
from ._lazy import Lazy, tied_names
from .backdoor import BackdoorVector
from .vector import TaskVector

__all__ = ["load"]

PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl")
KINDS: dict[str, type[TaskVector]] = {"TaskVector": TaskVector, "BackdoorVector": BackdoorVector}


def load(source: nn.Module | Mapping[str, Tensor] | str | os.PathLike[str]) -> Mapping[str, Tensor]:
    """Parameters from a module, a state dict or a checkpoint on disk.

    Args:
        source: one of

            - a module or a state dict: copied, so that training the module on leaves what was loaded alone;
            - a `.safetensors` file;
            - a folder with one such file, or with shards and their index (`*.safetensors.index.json`);
            - a torch pickle (`.pt`, `.pth`, `.bin`, `.ckpt`) of a state dict, or of a mapping that holds one under
              `"state_dict"` (Lightning), opened with `weights_only=True`.

    Returns:
        A dict of copies, or a lazy mapping: opening reads headers only. A saved `TaskVector` or `BackdoorVector` comes
        back as itself.

    Raises:
        LocationError: nothing is there, or a shard is missing.
        FormatError: damaged, a header that lies, a pickle with code in it, an index that points out of its folder.
        DtypeError: something that is no checkpoint.

    Example:
        >>> sorted(load(nn.Linear(2, 1)))
        ['bias', 'weight']
    """
    if isinstance(source, nn.Module):
        source = source.state_dict()
    if isinstance(source, Mapping):
        return _copied(source)
    if not isinstance(source, str | os.PathLike):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise DtypeError(f"load() takes a module, a state dict or a path, not {type(source).__name__}")
    path = Path(source)
    if path.is_dir():
        return _revived(_folder(path))
    if not path.exists():
        raise LocationError(
            f"{os.fspath(source)!r} is no file or folder here; as a name of a model on the Hub it is not read yet: "
            "download it first (huggingface_hub.snapshot_download) and give the folder"
        )
    return _revived(_pickle(path) if path.suffix in PICKLES else _safetensors(path))


def _copied(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    copies: dict[int, Tensor] = {}  # tied weights stay tied
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise DtypeError(f"{name!r} is {type(tensor).__name__}, not a tensor; is this a state dict?")
    ties = tied_names(dict(state))
    for name, tensor in state.items():
        if name not in ties:
            copies[id(tensor)] = tensor.detach().clone()
    return {name: copies[id(state[ties.get(name, name)])] for name in state}


def _revived(lazy: Lazy) -> Lazy | TaskVector:
    """A vector, if the file says that it holds one."""
    text = lazy.metadata.get(RECORD)
    if text is None:
        return lazy
    try:
        kept = json.loads(text)
        kind, meta = KINDS[kept["type"]], kept["meta"]
    except (ValueError, KeyError, TypeError) as error:
        raise FormatError(f"the record of a task vector in the metadata is damaged: {text[:80]!r}") from error
    return kind(lazy, meta=meta)


# safetensors


def _safetensors(path: Path) -> Lazy:
    specs, metadata = _header(path)
    return Lazy(specs, partial(_read_file, os.fspath(path)), metadata=metadata)


class _File(NamedTuple):
    """A file as its header describes it: what it holds, and where each tensor's bytes begin."""

    specs: dict[str, Tensor]
    metadata: dict[str, str]
    begin: dict[str, int]


def _header(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    file = _described(os.fspath(path), *_stamp(path))
    return file.specs, file.metadata


@lru_cache(maxsize=1024)
def _described(path: str, size: int, changed: int) -> _File:
    """A file's header, read once; size and time in the key, so that a rewritten file is read anew.

    The package checks that the header is sound and that tensors fill the file without holes, so where each begins
    follows from their order and sizes.
    """
    del changed
    specs: dict[str, Tensor] = {}
    begin: dict[str, int] = {}
    try:
        opened: Any = safe_open(path, framework="np")  # mapped read-only; as "pt" it could not exceed the memory
        with opened as file:
            for name in file.offset_keys():
                part = file.get_slice(name)
                specs[name] = torch.empty(part.get_shape(), dtype=_dtype(path, name, part.get_dtype()), device="meta")
            metadata = dict(file.metadata() or {})
    except (SafetensorError, OSError, RuntimeError) as error:
        raise FormatError(f"{path!r} is no intact safetensors file: {error}") from error
    place = size - sum(_size(spec) for spec in specs.values())
    for name, spec in specs.items():
        begin[name] = place
        place += _size(spec)
    return _File(specs, metadata, begin)


def _size(spec: Tensor) -> int:
    return spec.numel() * spec.dtype.itemsize


def _dtype(path: str, name: str, code: str) -> torch.dtype:
    if code not in DTYPES:
        raise FormatError(f"{name!r} in {path!r} has the dtype {code}, which is not read here")
    return DTYPES[code]


def _stamp(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


def _read_file(path: str, name: str, start: int, stop: int) -> Tensor:
    # read, not mapped: as fast from the page cache, and what was read does not count as memory once it is dropped
    file = _described(path, *_stamp(Path(path)))
    dtype = file.specs[name].dtype
    block = torch.empty(stop - start, dtype=dtype, device="cpu")
    with Path(path).open("rb", buffering=0) as source:
        source.seek(file.begin[name] + start * dtype.itemsize)
        view = memoryview(cast("Any", block.view(torch.uint8).numpy()))
        while view:
            count = source.readinto(view)
            if not count:
                raise FormatError(f"{path!r} became shorter while it was read; copy it again")
            view = view[count:]
    return block


# folders


def _folder(path: Path) -> Lazy:
    indices = sorted(path.glob("*.safetensors.index.json"))
    if len(indices) == 1:
        return _sharded(path, indices[0])
    files = sorted(path.glob("*.safetensors"))
    if not indices and len(files) == 1:
        return _safetensors(files[0])
    found = "several indices" if indices else f"{len(files)} .safetensors files and no index" if files else "neither"
    raise FormatError(
        f"{os.fspath(path)!r} should hold one .safetensors file, or shards with one *.safetensors.index.json; it holds "
        f"{found}. Give the file itself to load one of them"
    )


def _sharded(path: Path, index: Path) -> Lazy:
    owner = _weight_map(index)
    specs: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}
    for shard in sorted(set(owner.values())):
        own, said = _header(_inside(path, shard, index))
        metadata |= said
        listed_here = [name for name, file in owner.items() if file == shard]
        for wrong, what in (
            ([name for name in listed_here if name not in own], "lacks"),
            ([name for name in own if name not in owner or owner[name] != shard], "also holds"),
        ):
            if wrong:
                raise FormatError(f"{shard!r} {what} {listed(wrong)}, against what {os.fspath(index)!r} says")
        specs |= own
    files = {name: os.fspath(path / shard) for name, shard in owner.items()}
    return Lazy({name: specs[name] for name in owner}, partial(_read_sharded, files), metadata=metadata)


def _read_sharded(files: Mapping[str, str], name: str, start: int, stop: int) -> Tensor:
    return _read_file(files[name], name, start, stop)


def _weight_map(index: Path) -> dict[str, str]:
    try:
        found = json.loads(index.read_text("utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise FormatError(f"{os.fspath(index)!r} is no index of shards: it needs a JSON object 'weight_map'") from error
    if not (
        isinstance(found, dict) and found and all(isinstance(v, str) for v in cast("dict[str, Any]", found).values())
    ):
        raise FormatError(f"'weight_map' in {os.fspath(index)!r} should name a file for each tensor")
    return cast("dict[str, str]", found)


def _inside(folder: Path, shard: str, index: Path) -> Path:
    """A shard's path, refused unless it is a plain file name in the folder."""
    if shard in ("", ".", "..") or "/" in shard or "\\" in shard or "\0" in shard:
        raise FormatError(f"{os.fspath(index)!r} names the shard {shard!r}, which is not a file of its own folder")
    path = folder / shard
    if not path.is_file():
        raise LocationError(f"{os.fspath(index)!r} names the shard {shard!r}, which is not there: download it again")
    return path


# pickles


def _pickle(path: Path) -> Lazy:
    state = _unpickled(os.fspath(path), *_stamp(path))
    specs = {name: tensor.to("meta") for name, tensor in state.items()}
    return Lazy(specs, partial(_read_pickle, os.fspath(path)), tied=tied_names(state))


def _read_pickle(path: str, name: str, start: int, stop: int) -> Tensor:
    return _unpickled(path, *_stamp(Path(path)))[name].reshape(-1)[start:stop]


@lru_cache(maxsize=32)
def _unpickled(path: str, size: int, changed: int) -> dict[str, Tensor]:
    """The tensors of a torch pickle, memory-mapped where its format allows."""
    del size, changed
    try:
        found = _torch_load(path)
    except pickle.UnpicklingError as error:
        raise FormatError(
            f"{path!r} holds more than tensors, and what it holds would run as code: it is not loaded. Ask for "
            "safetensors, or convert it where its code may run"
        ) from error
    except (RuntimeError, EOFError, ValueError, OSError, AttributeError, KeyError) as error:
        raise FormatError(f"{path!r} is no intact torch checkpoint: {error}") from error
    return _state_dict(path, found)


def _torch_load(path: str) -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Detected pickle protocol", UserWarning)  # an error follows where it matters
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap" not in str(error):
                raise
            return torch.load(path, map_location="cpu", weights_only=True)  # the format before torch 1.6


def _state_dict(path: str, found: Any) -> dict[str, Tensor]:
    inner: object = cast("Mapping[str, Any]", found).get("state_dict", found) if isinstance(found, Mapping) else None
    if not isinstance(inner, Mapping):
        raise FormatError(f"{path!r} holds a {type(cast('object', found)).__name__}, not a state dict")
    state = cast("Mapping[str, Any]", inner)
    wrong = [str(name) for name, value in state.items() if not isinstance(value, Tensor)]
    if wrong:
        raise FormatError(
            f"{path!r} holds things that are not tensors: {listed(wrong)}; save its state dict, or a mapping with one "
            "under 'state_dict'"
        )
    return {name: tensor.detach() for name, tensor in state.items()}
