"""Results kept on disk under what they were made from, so that a second run takes seconds.

An entry's name is a hash of its settings, written as JSON, and of a version: settings that differ in anything are
other entries, and raising VERSION forgets all. Files appear whole or not at all, so a run may be stopped at any time,
and several processes may work in the same folder.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

from safetensors.torch import load_file, save
from torch import Tensor

FOLDER = Path(__file__).parents[1] / ".cache"
VERSION = 1  # raise it when training or measuring changes in a way that the settings do not show

Json = dict[str, "Json"] | list["Json"] | str | int | float | bool | None
Settings = Mapping[str, Json]


def tensors(kind: str, settings: Settings, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """The mapping made earlier with these settings, or made now: safetensors, with the settings beside it."""
    path = _path(kind, settings, "safetensors")
    if not path.exists():
        made = make()
        write(path.with_suffix(".json"), json.dumps(settings, indent=1).encode())
        write(path, save({name: t.contiguous() for name, t in made.items()}))
    return load_file(path)


def values(kind: str, settings: Settings, make: Callable[[], Json]) -> Json:
    """The same for anything that JSON can hold."""
    path = _path(kind, settings, "json")
    if not path.exists():
        write(path, json.dumps({"settings": settings, "made": make()}).encode())
    return json.loads(path.read_bytes())["made"]


def known(kind: str, settings: Settings) -> bool:
    """Whether tensors made with these settings are there."""
    return _path(kind, settings, "safetensors").exists()


def digest(params: Mapping[str, Tensor]) -> str:
    """A hash of names and bits: two models with the same digest are the same model."""
    whole = hashlib.sha256()
    for name in sorted(params):
        whole.update(name.encode() + bytes(params[name].detach().cpu().contiguous().numpy().data))
    return whole.hexdigest()[:32]


def write(path: Path, content: bytes) -> None:
    """Write a file so that it is never seen half written: under another name first, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        unfinished.write_bytes(content)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def _path(kind: str, settings: Settings, suffix: str) -> Path:
    text = json.dumps([VERSION, kind, settings], sort_keys=True)
    return FOLDER / f"{kind}-{hashlib.sha256(text.encode()).hexdigest()[:32]}.{suffix}"
