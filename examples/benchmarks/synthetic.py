"""Synthetic checkpoints with the shape of a language model, of any size.

A set is a base and its fine-tunes, each a folder as transformers saves a Llama: shards of safetensors with their index,
and a config.json. Weights are random and seeded: the base N(0, 0.02) with norm weights of 1, a fine-tune the base plus
N(0, 0.001), rounded to bfloat16. One shard is in memory at a time.
"""

import json
import shutil
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

SHARD = 300_000_000  # bytes
SPREAD, CHANGE = 0.02, 0.001  # standard deviations of the base's weights, and of what a fine-tune adds
MARGIN = 1.05  # space asked for over space needed


@dataclass(frozen=True)
class Shape:
    """The numbers that give a Llama its shape; its input and output embeddings are two tensors."""

    layers: int = 20
    hidden: int = 1536
    intermediate: int = 4096
    heads: int = 12
    kv_heads: int = 4
    vocabulary: int = 32_000

    @property
    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape, in the order of the files."""
        keys = self.hidden // self.heads * self.kv_heads
        block = {
            "input_layernorm": (self.hidden,),
            "self_attn.q_proj": (self.hidden, self.hidden),
            "self_attn.k_proj": (keys, self.hidden),
            "self_attn.v_proj": (keys, self.hidden),
            "self_attn.o_proj": (self.hidden, self.hidden),
            "post_attention_layernorm": (self.hidden,),
            "mlp.gate_proj": (self.intermediate, self.hidden),
            "mlp.up_proj": (self.intermediate, self.hidden),
            "mlp.down_proj": (self.hidden, self.intermediate),
        }
        return {
            "model.embed_tokens.weight": (self.vocabulary, self.hidden),
            **{f"model.layers.{i}.{name}.weight": size for i in range(self.layers) for name, size in block.items()},
            "model.norm.weight": (self.hidden,),
            "lm_head.weight": (self.vocabulary, self.hidden),
        }

    @property
    def parameters(self) -> int:
        """How many weights one model has."""
        return sum(torch.Size(size).numel() for size in self.tensors.values())

    @property
    def bytes(self) -> int:
        """The size of one model in bfloat16."""
        return 2 * self.parameters

    @property
    def name(self) -> str:
        """The name of the folder that holds a set of this shape."""
        numbers = (self.layers, self.hidden, self.intermediate, self.vocabulary)
        return "llama-" + "x".join(map(str, numbers))

    @property
    def config(self) -> dict[str, Any]:
        """The contents of config.json."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "max_position_embeddings": 2048,
            "num_attention_heads": self.heads,
            "num_hidden_layers": self.layers,
            "num_key_value_heads": self.kv_heads,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "vocab_size": self.vocabulary,
        }


def shape_of(size: float) -> Shape:
    """The shape whose models have about so many bytes: deeper for more, narrower where one layer is too much."""
    shape = Shape(layers=0)
    while shape.bytes > size / 2 and shape.hidden > 384:  # the embeddings alone
        halves = {name: number // 2 for name, number in asdict(shape).items() if name != "layers"}
        shape = replace(shape, **halves)
    layer = replace(shape, layers=1).bytes - shape.bytes
    return replace(shape, layers=max(1, round((size - shape.bytes) / layer)))


def make_set(folder: Path, shape: Shape, fine_tunes: int = 4) -> list[Path]:
    """The folders of a base and its fine-tunes, base first; those that are not there yet are made.

    Args:
        folder: where sets are kept; one that is whole is used again.
        shape: of every model.
        fine_tunes: how many.
    """
    short = shortage(folder, shape, fine_tunes)
    if short:
        sys.exit(f"{short}; give a folder on a larger disk, or ask for smaller models")
    paths = _paths(folder, shape, fine_tunes)
    for seed, path in enumerate(paths):
        if not path.exists():
            _make(path, paths[0], shape, seed)
    return paths


def shortage(folder: Path, shape: Shape, fine_tunes: int = 4) -> str:
    """What is missing on the disk for a set and for one result of a merge, empty where nothing is."""
    folder.mkdir(parents=True, exist_ok=True)
    missing = sum(not path.exists() for path in _paths(folder, shape, fine_tunes))
    need, free = MARGIN * (missing + 1) * shape.bytes, shutil.disk_usage(folder).free
    if free >= need:
        return ""
    return f"{folder} needs {need / 1e9:.1f} GB of free space and has {free / 1e9:.1f} GB"


def _paths(folder: Path, shape: Shape, fine_tunes: int) -> list[Path]:
    place = folder / shape.name
    return [place / "base", *(place / f"tuned-{i}" for i in range(1, fine_tunes + 1))]


def _make(path: Path, base: Path, shape: Shape, seed: int) -> None:
    """One model, whole or not at all: written under another name first, then renamed."""
    unfinished = path.with_name(f".{path.name}")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    sizes, files = shape.tensors, _files(shape)
    for file, names in files.items():
        started = {} if path == base else load_file(base / file)
        tensors = {name: _weights(sizes[name], started.get(name), generator) for name in names}
        save_file(tensors, unfinished / file, metadata={"format": "pt"})
    index = {
        "metadata": {"total_size": shape.bytes},
        "weight_map": {name: file for file, names in files.items() for name in names},
    }
    (unfinished / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    (unfinished / "config.json").write_text(json.dumps(shape.config, indent=1))
    unfinished.replace(path)


def _weights(size: tuple[int, ...], base: Tensor | None, generator: torch.Generator) -> Tensor:
    """Of the base, or of a fine-tune of one of the base's tensors."""
    if base is not None:
        return torch.randn(size, generator=generator).mul_(CHANGE).add_(base).to(torch.bfloat16)
    if len(size) == 1:
        return torch.ones(size, dtype=torch.bfloat16)
    return torch.randn(size, generator=generator).mul_(SPREAD).to(torch.bfloat16)


def _files(shape: Shape) -> dict[str, list[str]]:
    """The name of each shard, and the names of its tensors."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in shape.tensors.items():
        length = 2 * torch.Size(size).numel()
        if shards[-1] and filled + length > SHARD:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += length
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": names for i, names in enumerate(shards, 1)}
