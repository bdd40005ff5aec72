"""What a mapping is made of: its files, its rules and their options, told to people, and compared by `save`."""

import hashlib
import json
import os
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache, partial
from importlib.metadata import version
from pathlib import Path
from types import CodeType, FunctionType, MethodType
from typing import Any, cast

import torch
from torch import Tensor

from .._engine.lazy import Lazy
from .._engine.lift import Ruled
from .._engine.sources import Foreign, Memory, Source
from .._vectors.vector import TaskVector
from .hub import Remote, is_hub_name
from .paths import Stamp, small, stamp_of
from .pickles import Pickled
from .safetensors import File

__all__ = ["PROVENANCE", "RESULT", "digest", "model_name", "names_of", "provenance", "rules_of", "within"]

PROVENANCE = "provenance"  # the metadata key under which a file says how it was made

RESULT = "result"  # the part of it that two equal results share

PAGE, PAGES = 1 << 12, 64


def within(source: Source) -> Iterator[Source]:
    """A source and what it is made of, inner ones first; each once."""
    seen: set[int] = set()

    def visit(part: Source) -> Iterator[Source]:
        if id(part) not in seen:
            seen.add(id(part))
            for inner in part.sources:
                yield from visit(inner)
            yield part

    return visit(source)


def model_name(origin: Path | Remote) -> str:
    """What a model is called: its name on the Hub, or in its configuration, or that of its folder; never a path."""
    if isinstance(origin, Remote):
        return origin.repository.name
    try:
        config: Any = json.loads(str(small(origin / "config.json"), "utf-8"))
        name = str(config.get("_name_or_path") or origin.resolve())
        return name if is_hub_name(name) and not Path(name).is_absolute() else Path(name).name
    except (OSError, ValueError, AttributeError, TypeError, RecursionError):
        return origin.resolve().name


def names_of(source: Source) -> Iterator[str]:
    """The models on disk and on the Hub that something is made of."""
    for part in within(source):
        if isinstance(part, Remote):
            yield part.repository.name
        elif isinstance(part, File):
            yield model_name(Path(next(iter(part.files.values()))).parent)


def rules_of(source: Source) -> Iterator[str]:
    """The rules that are run, with their options, inner ones first."""
    for part in within(source):
        if isinstance(part, Ruled):
            rule: Any = part.rule
            given = dict(part.options.given)
            while isinstance(rule, partial):
                given = rule.keywords | given
                rule = cast("Any", rule.func)
            options = ", ".join(f"{key}={_short(value)}" for key, value in given.items())
            yield f"{getattr(rule, '__name__', repr(rule))}({options})"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 and " at 0x" not in text else f"<{type(value).__name__}>"


def provenance(source: Source) -> dict[str, str]:
    """Metadata that says which files, by which rules, with which version; nothing of what was in memory.

    Of a file on disk: its name, its bytes, and a SHA-256 of pages spread over it (to read all of a large checkpoint
    once more would take as long as the merge). Of a model on the Hub: its name and commit. Where
    nothing comes from memory, also a hash of all that the result depends on, the same on every machine.
    """
    parts = list(within(source))
    files = [json.dumps(file) for part in parts for file in _files(part)]
    if not files:
        return {}
    told: dict[str, Any] = {"taskvec": version("taskvec"), "rules": list(dict.fromkeys(rules_of(source)))}
    told["sources"] = [json.loads(text) for text in dict.fromkeys(files)]
    if not any(isinstance(part, Memory | Foreign) for part in parts):
        told[RESULT] = digest(source, contents=True, anywhere=True)
    return {PROVENANCE: json.dumps(told)}


def _files(source: Source) -> list[dict[str, Any]]:
    """The files that are read, without where they lie."""
    if isinstance(source, Remote):
        return [{"model": source.repository.name, "revision": source.repository.commit}]
    if isinstance(source, File):
        return [_file(path) for path in sorted(set(source.files.values()))]
    return [_file(source.path)] if isinstance(source, Pickled) else []


def _file(name: str) -> dict[str, Any]:
    path = Path(name)
    told = {"model": model_name(path.parent), "file": path.name, "bytes": path.stat().st_size}
    return told | {"sampled_sha256": _sampled(name, stamp_of(path.stat()))}


@lru_cache(maxsize=1024)
def _sampled(path: str, stamp: Stamp) -> str:
    """A hash of pages spread over a file, taken anew where it was rewritten."""
    del stamp
    found = hashlib.sha256()
    with Path(path).open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        for i in range(PAGES):
            file.seek(max(0, size - PAGE) * i // (PAGES - 1))
            found.update(file.read(PAGE))
    found.update(str(size).encode())
    return found.hexdigest()


# --- the same result? ------------------------------------------------------------------------------------------------


def digest(source: Source, *, contents: bool, anywhere: bool = False) -> str:
    """A hash of everything that a result depends on: files, rules, options, versions.

    Args:
        source: the result.
        contents: whether to read tensors in memory too; without, a result with any of them equals no other.
        anywhere: whether files are the same wherever and whenever they were copied (told by `provenance`'s samples);
            else they are told by their paths, inodes, sizes and times.
    """
    told = [version("taskvec"), torch.__version__, _Teller(contents, anywhere)(source)]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()


class _Teller:
    """Turns what a result is made of into lists of strings and numbers."""

    def __init__(self, contents: bool, anywhere: bool) -> None:
        self.contents, self.anywhere = contents, anywhere
        self.seen: dict[int, Any] = {}
        self.kept: list[object] = []  # alive, so that no id comes twice

    def __call__(self, value: Any) -> Any:
        if value is None or isinstance(value, bool | int | float | str | bytes | torch.dtype | torch.device):
            return [type(value).__name__, repr(value)]
        if id(value) not in self.seen:
            self.kept.append(value)
            self.seen[id(value)] = "within itself"
            self.seen[id(value)] = hashlib.sha256(json.dumps(self._told(value)).encode()).hexdigest()
        return self.seen[id(value)]

    def _told(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return ["tensor", str(value.dtype), list(value.shape), self._checksum(value)]
        if isinstance(value, TaskVector | Lazy | Source):
            return self._source(value if isinstance(value, Source) else value.source)
        if isinstance(value, Mapping):
            return [[self(key), self(item)] for key, item in cast("Mapping[Any, Any]", value).items()]
        if isinstance(value, Sequence):
            return [self(item) for item in cast("Sequence[Any]", value)]
        if isinstance(value, set | frozenset):
            return sorted(str(self(item)) for item in cast("set[Any]", value))
        return self._object(value)

    def _source(self, source: Source) -> Any:
        if isinstance(source, Memory) and not self.contents:
            return ["memory", os.getpid(), id(source)]
        if self.anywhere and (files := _files(source)):
            return [json.dumps(files), self._told(source.specs)]
        state = {key: own for key, own in source.__getstate__().items() if key != "known"}
        return [type(source).__qualname__, self._told(state)]

    def _object(self, value: Any) -> Any:
        if isinstance(value, partial):
            return self._told([value.func, value.args, value.keywords])
        if isinstance(value, FunctionType):
            cells = [cell.cell_contents for cell in value.__closure__ or ()]
            return [value.__module__, value.__qualname__, *_code(value.__code__), self(value.__defaults__), self(cells)]
        if isinstance(value, MethodType):
            return [self(value.__func__), self(value.__self__)]
        name, state = f"{type(value).__module__}.{type(value).__qualname__}", value.__getstate__()
        return [name, self._told(state) if isinstance(state, dict) else re.sub(r" at 0x\w+", "", repr(value))]

    def _checksum(self, x: Tensor) -> int:
        if not self.contents:
            return id(x)
        flat: Any = x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        return zlib.crc32(memoryview(flat))


def _code(code: CodeType) -> list[Any]:
    """What a function does, as far as its own code says."""
    constants = [_code(item) if isinstance(item, CodeType) else repr(item) for item in code.co_consts]
    return [code.co_code.hex(), list(code.co_names), constants]
