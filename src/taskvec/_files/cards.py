"""What a Hugging Face model has beside its weights: configuration, tokenizer, and a card that says what it is."""

import json
import os
from collections.abc import Mapping
from fnmatch import fnmatch
from importlib.metadata import version
from pathlib import Path
from typing import TypeAlias

from torch import Tensor

from .._engine.lazy import source_of
from .._engine.sources import Source
from .._vectors.model import check_mapping
from ..errors import LocationError, OptionError
from .hub import Remote, companions, is_hub_name, open_hub
from .paths import member
from .provenance import model_name, names_of, rules_of, within
from .safetensors import File

__all__ = ["Like", "carried", "model_card"]

Like: TypeAlias = Mapping[str, Tensor] | str | os.PathLike[str]

CARRIED = (
    *("config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json"),
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "sentencepiece*"),
    *("spiece.model", "chat_template*", "modules.json", "config_sentence_transformers.json"),
    "sentence_bert_config.json",
)
"""What transformers reads beside weights; no code."""


def carried(like: Like) -> dict[str, bytes]:
    """The configuration and tokenizer's files of a model: name -> contents.

    Raises:
        OptionError: a mapping that is not from a folder.
        LocationError: a folder without a config.json.
    """
    origin = _origin(like)
    if isinstance(origin, Path):
        found = {
            p.name: member(origin, p.name)
            for p in sorted(origin.glob("*"))
            if p.is_file() and any(fnmatch(p.name, c) for c in CARRIED)
        }
    else:
        found = companions(origin.repository, CARRIED)
    if "config.json" not in found:
        raise LocationError(f"like= must be a folder with a config.json; {model_name(origin)} has none")
    return {name: path.read_bytes() for name, path in found.items()}


def model_card(source: Source, like: Like, title: str, said: Mapping[str, str]) -> str:
    """A README for the Hub: which models, which rule with which options, which version.

    Args:
        source: what is saved; rules are found in what is lazy, for what is in memory keeps no record.
        like: the model whose configuration it has.
        title: of the card.
        said: what the user says of it.
    """
    bases = list(dict.fromkeys([model_name(_origin(like)), *names_of(source)]))
    lines = ["---", "base_model:", *(f"- {json.dumps(name)}" for name in bases), "library_name: transformers", "tags:"]
    lines += ["- merge", "- taskvec", "---", f"# {title}", ""]
    lines += [f"Merged with taskvec {version('taskvec')} from:", ""]
    lines += [f"- `{name}`" for name in bases]
    rules = list(dict.fromkeys(rules_of(source)))
    if rules:
        lines += ["", "Rules, inner ones first:", "", *(f"- `{rule}`" for rule in rules)]
    if said:
        lines += ["", *(f"- {key}: {value}" for key, value in said.items())]
    return "\n".join(lines) + "\n"


def _origin(like: Like) -> Path | Remote:
    """The folder of a model, or the repository."""
    if isinstance(like, str | os.PathLike):
        if Path(like).is_dir():
            return Path(like)
        if not is_hub_name(os.fspath(like)):
            raise LocationError(f"like= must be a folder, or what load() gave of one; there is no {os.fspath(like)!r}")
        like = open_hub(os.fspath(like), None)
    check_mapping("like", like)
    for source in within(source_of(like)):
        if isinstance(source, Remote):
            return source
        if isinstance(source, File):
            return Path(next(iter(source.files.values()))).parent
    raise OptionError(
        "like= must be a folder, or what load() gave of one; got a mapping in memory, which has no folder; use the path"
    )
