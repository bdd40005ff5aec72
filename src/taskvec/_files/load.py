"""load: checkpoints as lazy mappings. Opening reads headers only; tensors are read when asked for, in blocks."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from .._engine.lazy import Lazy
from .._vectors.backdoor import BackdoorVector
from .._vectors.model import tied_names
from .._vectors.vector import TaskVector
from ..errors import FormatError, LocationError, OptionError
from .adapters import CONFIG, load_adapter
from .format import PICKLE, PICKLE_INDEX, RECORD
from .hub import is_hub_name, open_hub
from .paths import member
from .pickles import SUFFIXES, open_pickle, open_pickles
from .safetensors import open_file, open_folder

__all__ = ["load"]

KINDS: dict[str, type[TaskVector]] = {"TaskVector": TaskVector, "BackdoorVector": BackdoorVector}


def load(
    source: nn.Module | Mapping[str, Tensor] | str | os.PathLike[str], *, base: Mapping[str, Tensor] | None = None
) -> Mapping[str, Tensor]:
    """Parameters from a module, a state dict or a checkpoint on disk.

    Args:
        source: one of

            - a module or a state dict: copied, so that training the module on leaves what was loaded alone;
            - a `.safetensors` file;
            - a folder with one such file, or with shards and their index (`*.safetensors.index.json`);
            - a torch pickle (`.pt`, `.pth`, `.bin`, `.ckpt`) of a state dict, or of a mapping that holds one under
              `"state_dict"` or `"model"`, opened with `weights_only=True`; or a folder with a `pytorch_model.bin`, or
              with its shards and their index;
            - a folder with a LoRA adapter of PEFT: a lazy `TaskVector` with the names of the base's weights;
            - a name on the Hugging Face Hub, `org/name[@revision]`, an `hf://` name or a web address of one: headers
              are fetched now, a file's weights when one of its tensors is first read. What exists here as a path is
              a path.
        base: of an adapter, the model it was trained on: needed where the adapter holds whole modules, and checked.

    Returns:
        A dict of copies, or a lazy mapping: opening reads headers only, and the files must stay as they are. A saved
        `TaskVector` or `BackdoorVector` comes back as itself.

    Raises:
        LocationError: nothing is there, or a shard is missing.
        FormatError: damaged, a header that lies, a pickle with code in it, an index or a link that points out of its
            folder; later, when tensors are read: a file that was changed after it was opened.
        DtypeError: a pickle with sparse, quantized or nested tensors.
        OptionError: something that is not a checkpoint.

    Examples:
        >>> sorted(load(nn.Linear(2, 1)))
        ['bias', 'weight']
    """
    if isinstance(source, nn.Module):
        source = source.state_dict()
    if isinstance(source, Mapping):
        return _copied(source)
    if not isinstance(source, str | os.PathLike):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise OptionError(f"load() must be given a module, a state dict or a path; got {type(source).__name__}")
    text, path = os.fspath(source), Path(source)
    found = _opened(text, path, base)
    if isinstance(found, TaskVector):
        return found
    if base is not None:
        raise OptionError(f"base must be given with an adapter only; {text!r} holds none")
    return _revived(found)


def _opened(text: str, path: Path, base: Mapping[str, Tensor] | None) -> Lazy | TaskVector:
    if (path / CONFIG).exists():
        return load_adapter(path, base)
    if path.is_dir():
        return _folder(path)
    if path.exists():
        return open_pickle(path) if path.suffix in SUFFIXES else open_file(path)
    if is_hub_name(text):
        return open_hub(text, base)
    raise LocationError(
        f"{text!r} is neither a file nor a folder here, nor can it be a name on the Hub (org/name[@revision])"
    )


def _folder(path: Path) -> Lazy:
    """A folder of safetensors, or with torch pickles as transformers wrote them."""
    if not any(path.glob("*.safetensors")):
        if os.path.lexists(path / PICKLE):
            return open_pickle(member(path, PICKLE))
        if os.path.lexists(path / PICKLE_INDEX):
            return open_pickles(member(path, PICKLE_INDEX))
        if any(path.glob("pytorch_model*.bin")):
            raise FormatError(
                f"{os.fspath(path)!r} holds a pickle in several parts without their index, {PICKLE_INDEX}; download it "
                "again, or give one of the files to load() to load that part"
            )
    return open_folder(path)


def _copied(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    copies: dict[int, Tensor] = {}  # tied weights stay tied
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise OptionError(f"{name!r} is {type(tensor).__name__}, not a tensor; is this a state dict?")
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
        kind, meta = KINDS[kept["type"]], _strings(kept["meta"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise FormatError(f"the record of a task vector in the metadata is damaged: {text[:80]!r}") from error
    return kind(lazy, meta=meta)


def _strings(meta: object) -> dict[str, str]:
    """The mapping of strings that a record must hold."""
    found = cast("dict[Any, Any]", meta)
    if not isinstance(meta, dict) or not all(isinstance(x, str) for item in found.items() for x in item):
        raise TypeError("meta must map strings to strings")
    if "tied" in found:
        _strings(json.loads(found["tied"]))
    return found
