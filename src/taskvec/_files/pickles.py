"""Torch pickles as sources, opened with `weights_only=True`; nothing else is ever unpickled."""

import os
import pickle
import warnings
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from typing_extensions import override

from .._engine.lazy import Lazy
from .._engine.names import listed
from .._engine.sources import Pull, Source, flat_run, joined, spec_of
from .._vectors.model import tied_names
from ..errors import FormatError, TaskvecError
from .paths import check_same, regular, stamp_of
from .precheck import check_archive, check_bare, refused
from .safetensors import check_shard, shard_names, shard_path, weight_map

__all__ = ["SUFFIXES", "open_pickle", "open_pickles"]

SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".pkl")

FREE = 1_000_000
"""Bytes that expanded tensors may cover although the file does not hold them."""


class Pickled(Source):
    """The tensors of a torch pickle, memory-mapped where its format allows; what is handed out is a copy.

    Args:
        path: of the file, which must stay as it was when it was opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = os.fspath(path)
        self._stamp = stamp_of(path.stat())
        self._state: dict[str, Tensor] | None = _state_dict(self.path)
        self._check_same()
        self.specs = {name: spec_of(x) for name, x in self._state.items()}
        self.tied = tied_names(self._state)

    def _check_same(self) -> None:
        check_same(self.path, self._stamp, stamp_of(Path(self.path).stat()))

    @override
    def block(self, pull: Pull) -> Tensor:
        self._check_same()  # a mapped file that became shorter would end the interpreter
        if self._state is None:  # in another process
            self._state = _state_dict(self.path)
        block = flat_run(self._state[pull.name], pull.start, pull.stop).clone()
        self._check_same()
        return block

    @override
    def device(self, name: str) -> torch.device:
        return torch.device("cpu")

    @override
    def key(self) -> Hashable:
        return self.path, self._stamp

    @override
    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_state": None, "_stamp": self._stamp.anywhere()}


def open_pickle(path: Path) -> Lazy:
    """A pickle of a state dict, or of a mapping that holds one under `"state_dict"` or `"model"`, lazy.

    Raises:
        FormatError: damaged, with code in it, or holding other things than tensors.
        DtypeError: sparse, quantized or nested tensors.
    """
    source = Pickled(regular(path))
    return Lazy(source, tied=source.tied)


def open_pickles(index: Path) -> Lazy:
    """Shards of pickles that an index lists, lazy.

    Raises:
        FormatError: an index that lies, or a shard as in `open_pickle`.
        LocationError: a shard that is missing.
    """
    owner = weight_map(index)
    shards = {shard: Pickled(shard_path(index.parent, shard, index)) for shard in shard_names(index)}
    for shard, source in shards.items():
        check_shard(shard, source.specs, owner, index)
    tied = {name: first for source in shards.values() for name, first in source.tied.items()}
    return Lazy(joined({name: source for source in shards.values() for name in source.specs}), tied=tied)


def _state_dict(path: str) -> dict[str, Tensor]:
    try:
        found = _torch_load(path)
    except TaskvecError:
        raise
    except pickle.UnpicklingError as error:
        raise refused(path, "torch does not load it with weights_only=True") from error
    except Exception as error:
        raise FormatError(f"{path!r} is not an intact torch checkpoint: {type(error).__name__}: {error}") from error
    return _tensors(path, found)


def _torch_load(path: str) -> Any:
    with Path(path).open("rb") as file:
        zipped = file.read(4) == b"PK\x03\x04"  # else it is of the format before torch 1.6
        (check_archive if zipped else check_bare)(path, file)
        size = file.seek(0, os.SEEK_END)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Detected pickle protocol", UserWarning)  # an error follows where it matters
        return torch.load(path, map_location=_Claims(path, size), weights_only=True, mmap=zipped)


class _Claims:
    """Takes each storage as torch has made it, still untouched, and stops where they claim more than the file holds.

    Args:
        path: for the message.
        size: bytes of the file.
    """

    def __init__(self, path: str, size: int) -> None:
        self.path, self.size, self.left = path, size, size

    def __call__(self, storage: Any, location: str) -> Any:
        del location
        self.left -= storage.nbytes()
        if self.left < 0:
            raise FormatError(
                f"{self.path!r} claims tensors of more than the {self.size:,} bytes that it has; download it again"
            )
        return storage[:]  # a slice cannot grow, so a tensor cannot claim more than its storage


def _inner(found: Mapping[str, Any]) -> object:
    """What is under one of the names by which training code keeps a state dict, or the mapping itself."""
    return next((found[key] for key in ("state_dict", "model") if isinstance(found.get(key), Mapping)), found)


def _tensors(path: str, found: Any) -> dict[str, Tensor]:
    inner: object = _inner(cast("Mapping[str, Any]", found)) if isinstance(found, Mapping) else None
    if not isinstance(inner, Mapping):
        raise FormatError(f"{path!r} holds a {type(cast('object', found)).__name__}, not a state dict")
    state = cast("Mapping[str, Any]", inner)
    wrong = [
        str(name)
        for name, value in state.items()
        if not (isinstance(value, Tensor) and isinstance(cast("object", name), str))
    ]
    if wrong:
        raise FormatError(
            f"{path!r} holds things that are not tensors under names: {listed(wrong)}; save its state dict, or a "
            "mapping with one under 'state_dict' or 'model'"
        )
    empty = [name for name, value in state.items() if value.device.type == "meta"]
    if empty:
        raise FormatError(f"{path!r} holds tensors on the meta device, which have no values: {listed(empty)}")
    _check_expanded(path, state)
    return {name: tensor.detach() for name, tensor in state.items()}


def _check_expanded(path: str, state: Mapping[str, Tensor]) -> None:
    """Refuse tensors of which the file holds a small part only."""
    plain = {name: x for name, x in state.items() if type(x) in {Tensor, nn.Parameter}}
    sizes = {name: x.numel() * x.element_size() for name, x in plain.items()}
    expanded = {name: size for name, size in sizes.items() if size > state[name].untyped_storage().nbytes()}
    if sum(expanded.values()) > FREE:
        raise FormatError(
            f"{path!r} holds tensors that cover more bytes than are stored of them (they were expanded): "
            f"{listed(list(expanded))}; save them contiguous: "
            "torch.save({name: x.contiguous() for name, x in state.items()}, path)"
        )
