"""save_adapter: a task vector as a LoRA adapter that PEFT opens."""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from .._engine.sources import Memory
from .._vectors.vector import TaskVector, check_vector
from ..errors import DegenerateError, DtypeError, NonFiniteError, RangeError
from .adapters import CONFIG, PREFIX, WEIGHTS
from .save import How, check_target, write

__all__ = ["save_adapter"]


def save_adapter(
    vector: TaskVector,
    path: str | os.PathLike[str],
    *,
    rank: float = 16,
    base_model: str | None = None,
    overwrite: bool = False,
) -> dict[str, float]:
    """Write a task vector as a LoRA adapter: the nearest factors of low rank, in PEFT's format.

    Each matrix is cut at a rank by its singular value decomposition, `U_r S_r V_r^T = B @ A` with
    `B = U_r sqrt(S_r)` and `A = sqrt(S_r) V_r^T`, and alpha equal to the rank, so that the scaling is 1. Kernels of
    convolutions are flattened to `(out, in * height * width)`.

    Args:
        vector: its matrices are those of linear layers and convolutions; `select()` them. Tensors of zeros are left
            out.
        path: a folder.
        rank: the rank, or, as a float in (0, 1], the share of each matrix's squared norm that is kept.
        base_model: the name of the base, for the adapter's configuration.
        overwrite: replace an adapter that is there; all else in the folder stays.

    Returns:
        For each tensor the share of its norm that the truncation lost, `|v - B @ A| / |v|`.

    Raises:
        DtypeError: a tensor that is no weight of a linear layer or a convolution: a vector, or an embedding.
        DegenerateError: nothing but zeros.
        NonFiniteError: NaN or inf.
        RangeError: a rank that is not positive.
        ExistsError: something is there, and overwrite is false.

    Examples:
        >>> import tempfile
        >>> from taskvec import load
        >>> v = TaskVector({"layer.weight": torch.ones(4, 3)})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     lost = save_adapter(v, f"{folder}/adapter", rank=1)
        ...     back = load(f"{folder}/adapter")
        ...     torch.allclose(back["layer.weight"], torch.ones(4, 3)), lost["layer.weight"] < 1e-6
        (True, True)

    References:
        [Hu et al., LoRA, 2021](https://arxiv.org/abs/2106.09685)
    """
    check_vector("vector", vector)
    if isinstance(rank, bool) or not (rank >= 1 if isinstance(rank, int) else 0 < rank <= 1):
        raise RangeError(f"rank must be a positive integer, or a share of the energy in (0, 1]; got {rank!r}")
    target = Path(path)
    check_target(target, one_file=False, overwrite=overwrite)
    factors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    lost: dict[str, float] = {}
    for name, x in vector.items():
        if not bool(x.any()):
            continue
        _check_weight(name, x)
        module = name.removesuffix(".weight")
        left, right, lost[name] = _factors(x, rank)
        ranks[module] = right.shape[0]
        factors |= {f"{PREFIX}{module}.lora_A.weight": right, f"{PREFIX}{module}.lora_B.weight": left}
    if not factors:
        raise DegenerateError("there is nothing to save: the vector is zero")
    config = json.dumps(_config(ranks, base_model), indent=2, sort_keys=True)
    files = {WEIGHTS: list(factors)}
    write(target, Memory(factors), files, {CONFIG: config.encode()}, {"format": "pt"}, How(overwrite, workers=1))
    return lost


def _check_weight(name: str, x: Tensor) -> None:
    module = name.removesuffix(".weight").rsplit(".", 1)[-1]
    what = None
    if not name.endswith(".weight") or x.ndim not in (2, 4):
        what = f"is {tuple(x.shape)}: LoRA updates the weights of linear layers and convolutions only"
    elif "embed" in module or module in ("wte", "wpe"):
        what = "looks like an embedding, which PEFT updates by factors of another kind"
    if what is not None:
        raise DtypeError(f"{name!r} {what}; select() the other names, and keep this one in a full checkpoint")
    if not bool(x.isfinite().all()):
        raise NonFiniteError(f"{name!r} holds NaN or inf; vector.check() tells where")


def _factors(x: Tensor, rank: float) -> tuple[Tensor, Tensor, float]:
    """B, A, and the share of the norm that is lost."""
    matrix = x.detach().to(torch.float64).reshape(x.shape[0], -1)
    u, s, v = cast("Any", torch.linalg).svd(matrix, full_matrices=False)
    energy = s.square().cumsum(0)
    share = 1 - torch.finfo(torch.float64).eps
    r = rank if isinstance(rank, int) else int((energy < min(rank, share) * energy[-1]).sum()) + 1
    r = min(r, len(s))
    left, right = u[:, :r] * s[:r].sqrt(), s[:r, None].sqrt() * v[:r]
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    rest = float((s[r:].square().sum() / energy[-1]).sqrt())
    shape = (r, *x.shape[1:])
    return _as(left, wide, (len(left), r, *(1 for _ in shape[2:]))), _as(right, wide, shape), rest


def _as(x: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    return x.to(dtype).reshape(shape).contiguous()


def _config(ranks: Mapping[str, int], base_model: str | None) -> dict[str, Any]:
    """PEFT's configuration: the ranks that differ from the largest by name, and alpha equal to the rank."""
    largest = max(ranks.values())
    own = {re.escape(module): r for module, r in ranks.items() if r != largest}
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": largest,
        "lora_alpha": largest,
        "rank_pattern": own,
        "alpha_pattern": own,
        "use_rslora": False,
        "fan_in_fan_out": False,
        "bias": "none",
        "lora_dropout": 0.0,
        "target_modules": sorted(ranks),
        "modules_to_save": None,
    }
