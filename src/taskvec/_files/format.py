"""What reading and writing share: the names in a file, and how a vector says in one that it is a vector."""

import json
from collections.abc import Mapping

import torch

RECORD = "taskvec"  # the metadata key under which a vector keeps its type and its `meta`
ORIGIN = "hub"  # the metadata key under which a model from the Hub keeps its name and commit
INDEX = "model.safetensors.index.json"
PICKLE, PICKLE_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"  # as transformers wrote them

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def record(kind: str, meta: Mapping[str, str]) -> dict[str, str]:
    """The metadata of a file that holds a vector."""
    return {RECORD: json.dumps({"type": kind, "meta": dict(meta)}, sort_keys=True)}
