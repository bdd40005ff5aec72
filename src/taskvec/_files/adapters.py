"""LoRA adapters as PEFT saves them, opened as task vectors: `scale * B @ A`, computed block by block.

What is no difference of weights, or not known to be one, is refused by name with its reason.
"""

import json
import math
import os
import re
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from typing_extensions import override

from .._engine.lazy import Lazy, mapping_of, source_of
from .._engine.names import listed
from .._engine.run import entries_of
from .._engine.sources import Pull, Renamed, Source, Spec, joined
from .._vectors.fingerprint import fingerprint
from .._vectors.model import as_model
from .._vectors.vector import TaskVector, check_weights
from ..errors import DtypeError, FormatError, MismatchError, MissingError
from .paths import member, small
from .safetensors import open_file

__all__ = ["CONFIG", "WEIGHTS", "load_adapter"]

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
FACTORS = {"lora_A.weight": "A", "lora_B.weight": "B", "lora_embedding_A": "A", "lora_embedding_B": "B"}

PLAIN = {
    *("alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "corda_config", "ensure_weight_tying"),
    *("eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern"),
    *("layers_to_transform", "loftq_config", "lora_alpha", "lora_dropout", "lora_ga_config", "megatron_config"),
    *("megatron_core", "modules_to_save", "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern"),
    *("revision", "runtime_config", "target_modules", "task_type", "use_rslora"),
}
"""Settings that leave the update what it is, `scale * B @ A`, or that are read here."""

REASONS = {
    "use_dora": "DoRA scales the whole weight, so its update is no difference of weights without the base",
    "lora_bias": "its biases are updated too, and that is not supported",
    "target_parameters": "it updates parameters without a module of their own, such as stacked experts",
    "trainable_token_indices": "it replaces single rows of the embedding",
    "layer_replication": "its model has layers that the base does not have",
    "alora_invocation_tokens": "an activated LoRA acts on some tokens only",
    "use_qalora": "QALoRA pools its inputs",
    "kasa_config": "KaSA changes the base weights by a singular value decomposition",
}
RESIDUAL = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Initializations that take the first factors out of the base's weights."""


class Factor(NamedTuple):
    """Where the two factors of one weight's update are, `scale * left @ right`, and how they lie."""

    left: str
    right: str
    scale: float
    transposed: bool


class LowRank(Source):
    """Updates of low rank, from their factors.

    Args:
        factors: the source of the factors.
        updates: name -> its factors.
        shapes: name -> the shape of the weight.
    """

    def __init__(self, factors: Source, updates: Mapping[str, Factor], shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.sources, self.updates = (factors,), dict(updates)
        self.specs = {name: Spec(shape, self._dtype(name)) for name, shape in shapes.items()}

    def _dtype(self, name: str) -> torch.dtype:
        wide = any(self.sources[0].specs[own].dtype == torch.float64 for own in self.updates[name][:2])
        return torch.float64 if wide else torch.float32

    @override
    def parts(self, name: str) -> Sequence[tuple[Source, str]]:
        left, right, *_ = self.updates[name]
        return [(self.sources[0], left), (self.sources[0], right)]

    @override
    def block(self, pull: Pull) -> Tensor:
        update, spec = self.updates[pull.name], self.specs[pull.name]
        left, right = (self._factor(pull, own).to(spec.dtype) for own in update[:2])
        if update.transposed:
            left, right = right.T, left.T
        first, last = pull.start // spec.row, -(-pull.stop // spec.row)
        rows = torch.zeros(last - first, spec.row, dtype=spec.dtype, device=left.device)
        for column, line in zip(left[first:last].T, right, strict=True):  # a product of matrices would change bits
            rows += column[:, None] * line  # with the length of the block
        return rows.mul_(update.scale).reshape(-1)[pull.start - first * spec.row : pull.stop - first * spec.row]

    def _factor(self, pull: Pull, name: str) -> Tensor:
        """A factor as a matrix, read once for a chunk: kernels of convolutions are flattened."""
        place = id(self), name
        if place not in pull.raw:
            spec = self.sources[0].specs[name]
            pull.raw[place] = entries_of(self.sources[0], name, 0, spec.entries).reshape(spec.shape[0], -1)
        return pull.raw[place]

    @override
    def grain(self, name: str) -> int:
        return self.specs[name].row

    @override
    def key(self) -> Hashable:
        return self.sources, tuple(self.updates.items())


def load_adapter(path: Path, base: Mapping[str, Tensor] | None) -> TaskVector:
    """A folder with an adapter, as a lazy vector with the names of the base's weights.

    Args:
        path: the folder.
        base: the model it was trained on, for adapters with whole modules (`modules_to_save`) or biases.

    Raises:
        DtypeError: an adapter that is no difference of weights, or of a kind that is not known.
        FormatError: damaged, or without its weights.
        MissingError, MismatchError: it does not fit the base, or needs one.
    """
    config = _config(member(path, CONFIG))
    if not (path / WEIGHTS).exists():
        raise FormatError(f"{os.fspath(path)!r} holds {CONFIG} but no {WEIGHTS}; download or save the adapter again")
    factors = source_of(open_file(member(path, WEIGHTS)))
    pairs, whole = _sorted_out(factors.specs)
    updates = {name: _update(name, pair, config, factors.specs) for name, pair in pairs.items()}
    shapes = {name: _shape(factors.specs, name, update) for name, update in updates.items()}
    source: Source = LowRank(factors, updates, shapes)
    meta = {"adapter": "LoRA", "base_model": str(config.get("base_model_name_or_path") or "")}
    if base is None and whole:
        raise MissingError(
            f"the adapter holds whole weights beside its updates ({listed(list(whole))}), which are no differences; "
            "give the model it was trained on: load(folder, base=load(...))"
        )
    if base is None:
        return TaskVector(mapping_of(source), meta=meta)
    check_weights("base", base)
    _check_base(shapes | {name: factors.specs[own].shape for name, own in whole.items()}, base)
    if whole:
        replaced = TaskVector.between({name: base[name] for name in whole}, Lazy(Renamed(factors, whole)))
        source = joined(dict.fromkeys(updates, source) | dict.fromkeys(replaced, replaced.source))
    return TaskVector(mapping_of(source), meta=meta | fingerprint(as_model("base", base)))


def _config(path: Path) -> dict[str, Any]:
    text = small(path)
    try:
        config: Any = json.loads(str(text, "utf-8"))
        kind = config["peft_type"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise FormatError(f"{os.fspath(path)!r} is not a configuration of PEFT: {error!r}") from error
    if kind != "LORA":
        raise DtypeError(f"the adapter is {kind}; only LoRA adapters are differences of weights here")
    for key, value in config.items():
        if key not in PLAIN and value:
            reason = REASONS.get(key, "that is not known here")
            raise DtypeError(
                f"the adapter has {key}={value!r}: {reason}; merge it into its model first (PEFT's merge_and_unload) "
                "and take the difference of the models"
            )
    start = str(config.get("init_lora_weights", True)).lower()
    if start.startswith(RESIDUAL):
        raise DtypeError(
            f"the adapter was begun by {start!r}, which takes a part out of the base's weights: it is an update of "
            "what is left of them; convert it when saving (PEFT's path_initial_model_for_weight_conversion)"
        )
    return config


def _sorted_out(specs: Mapping[str, Spec]) -> tuple[dict[str, dict[str, str]], dict[str, str]]:
    """Name of a weight -> its factors by letter, and name -> key of weights that are saved whole."""
    pairs: dict[str, dict[str, str]] = {}
    whole: dict[str, str] = {}
    for key in specs:
        name = key.removeprefix(PREFIX)
        suffix = next((suffix for suffix in FACTORS if name.endswith(f".{suffix}")), None)
        if suffix is not None:
            module = name.removesuffix(f".{suffix}")
            pairs.setdefault(f"{module}.weight", {})[FACTORS[suffix]] = key
        elif "lora_" in name:
            raise DtypeError(f"the adapter holds {key!r}, which is no factor of a plain LoRA")
        else:
            whole[name.replace(".modules_to_save.default.", ".").replace(".base_layer.", ".")] = key
    return pairs, whole


def _update(name: str, pair: Mapping[str, str], config: Mapping[str, Any], specs: Mapping[str, Spec]) -> Factor:
    if set(pair) != {"A", "B"}:
        raise FormatError(f"the adapter lacks a factor of {name!r}: there is {listed(list(pair.values()))} only")
    rank = _number(config, "rank_pattern", "r", name)
    alpha = _number(config, "alpha_pattern", "lora_alpha", name)
    if specs[pair["A"]].shape[:1] != (rank,):
        raise FormatError(f"{pair['A']!r} must have the {rank:g} rows of its rank; it is {specs[pair['A']].shape}")
    transposed = "lora_embedding" in pair["A"] or bool(config.get("fan_in_fan_out"))
    return Factor(pair["B"], pair["A"], alpha / (math.sqrt(rank) if config.get("use_rslora") else rank), transposed)


def _number(config: Mapping[str, Any], patterns: str, default: str, name: str) -> float:
    """A module's own rank or alpha: that of the first pattern that its name, or the end of it, matches."""
    module = name.removesuffix(".weight")
    try:
        own: dict[str, Any] = config.get(patterns) or {}
        found: Any = next(
            (value for key, value in own.items() if re.match(rf"(.*\.)?({key})$", module)), config[default]
        )
        number = float(found)
    except (re.error, AttributeError, KeyError, TypeError, ValueError) as error:
        raise FormatError(f"the adapter's {default} and {patterns} must be numbers: {error}") from error
    if not number > 0:
        raise FormatError(f"the adapter's {default} must be positive; got {number:g} for {name!r}")
    return number


def _shape(specs: Mapping[str, Spec], name: str, update: Factor) -> tuple[int, ...]:
    """The shape of a weight, from those of its factors."""
    left, right = specs[update.left].shape, specs[update.right].shape
    if len(left) < 2 or len(left) != len(right) or left[1] != right[0]:
        raise FormatError(f"the factors of {name!r} do not fit: {left} and {right}")
    if any(size != 1 for size in left[2:]):
        raise DtypeError(f"{name!r} is updated by factors {left} and {right}, which no convolution of PEFT has")
    return (right[1], left[0]) if update.transposed else (left[0], *right[1:])


def _check_base(shapes: Mapping[str, tuple[int, ...]], base: Mapping[str, Tensor]) -> None:
    specs = source_of(base).specs
    absent = [name for name in shapes if name not in specs]
    if absent:
        raise MissingError(
            f"the adapter updates {listed(absent)}, which the base does not have; is it the model that the adapter was "
            f"trained on? It has {listed(list(specs))}"
        )
    for name, shape in shapes.items():
        if specs[name].shape != tuple(shape):
            raise MismatchError(f"{name!r} is {specs[name].shape} in the base and {tuple(shape)} in the adapter")
