"""Torch pickles as sources, opened with `weights_only=True`; nothing else is ever unpickled."""

import os
import pickle
import warnings
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from typing_extensions import override

from .._engine.lazy import Lazy
from .._engine.names import listed
from .._engine.sources import Pull, Source, flat_run, spec_of
from .._vectors.model import tied_names
from ..errors import FormatError
from .safetensors import regular

__all__ = ["SUFFIXES", "open_pickle"]

SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".pkl")


class Pickled(Source):
    """The tensors of a torch pickle, memory-mapped where its format allows; what is handed out is a copy.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = os.fspath(path)
        self._stamp = _stamp(self.path)
        self._state: dict[str, Tensor] | None = _state_dict(self.path)
        self.specs = {name: spec_of(x) for name, x in self._state.items()}
        self.tied = tied_names(self._state)

    @override
    def block(self, pull: Pull) -> Tensor:
        # a mapped file that became shorter would end the interpreter
        if _stamp(self.path) != self._stamp:
            raise FormatError(f"{self.path!r} was changed after it was opened; load() it again")
        if self._state is None:  # in another process
            self._state = _state_dict(self.path)
        return flat_run(self._state[pull.name], pull.start, pull.stop).clone()

    @override
    def device(self, name: str) -> torch.device:
        return torch.device("cpu")

    @override
    def key(self) -> Hashable:
        return self.path, self._stamp

    @override
    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_state": None}


def open_pickle(path: Path) -> Lazy:
    """A pickle of a state dict, or of a mapping that holds one under `"state_dict"` or `"model"`, lazy.

    Raises:
        FormatError: damaged, with code in it, or holding other things than tensors.
    """
    source = Pickled(regular(path))
    return Lazy(source, tied=source.tied)


def _stamp(path: str) -> tuple[int, int, int]:
    stat = Path(path).stat()
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


def _state_dict(path: str) -> dict[str, Tensor]:
    try:
        found = _torch_load(path)
    except pickle.UnpicklingError as error:
        raise FormatError(
            f"{path!r} holds more than tensors, and what it holds would run as code: it is not loaded. Ask for "
            "safetensors, or convert it where its code may run"
        ) from error
    except Exception as error:
        raise FormatError(f"{path!r} is not an intact torch checkpoint: {type(error).__name__}: {error}") from error
    return _tensors(path, found)


def _torch_load(path: str) -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Detected pickle protocol", UserWarning)  # an error follows where it matters
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap" not in str(error):
                raise
            return torch.load(path, map_location="cpu", weights_only=True)  # the format before torch 1.6


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
    return {name: tensor.detach() for name, tensor in state.items()}
