"""Which base a vector was taken from: two short hashes, so that vectors of different bases are not mixed unawares."""

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from ._errors import MismatchError
from ._lazy import Lazy, grain_of, read, specs_of

LAYOUT, VALUES = "base.layout", "base.values"

SAMPLES = 4  # elements read of each tensor
CHEAP = 1 << 20  # a lazy tensor that must compute more than this many entries for one element is not sampled


def fingerprint(base: dict[str, Tensor] | Lazy, *, values: bool = True) -> dict[str, str]:
    """Hashes of a base's names, shapes and dtypes, and of a few elements of each tensor.

    Args:
        base: a model's parameters, in memory or lazy.
        values: whether the elements count; not where the base is known to differ by design.
    """
    specs = specs_of(base)
    layout = hashlib.blake2b(digest_size=8)
    for name in sorted(specs):
        layout.update(f"{name} {tuple(specs[name].shape)} {specs[name].dtype}\n".encode())
    found = {LAYOUT: layout.hexdigest()}
    if values and all(grain_of(base, name) <= CHEAP for name in specs):
        sample = hashlib.blake2b(digest_size=8)
        for name in sorted(specs):
            sample.update(_elements(base, name, specs[name].numel()))
        found[VALUES] = sample.hexdigest()
    return found


def _elements(base: dict[str, Tensor] | Lazy, name: str, entries: int) -> bytes:
    places = sorted({entries * i // SAMPLES for i in range(SAMPLES)}) if entries else []
    parts = [read(base, name, i, i + 1).detach() for i in places]
    # compared across devices and dtypes' own bytes: a few numbers, read where they are
    return b"".join(repr(part.to(torch.float64).item() if not part.is_complex() else 0).encode() for part in parts)


def common_meta(metas: list[Mapping[str, str]], doing: str) -> dict[str, str]:
    """What the records of several vectors have in common; they may not tell of different bases.

    Raises:
        MismatchError: two vectors of different bases.
    """
    for key in (VALUES, LAYOUT):
        known = [(i, meta[key]) for i, meta in enumerate(metas) if key in meta]
        for i, value in known[1:]:
            if value != known[0][1]:
                raise MismatchError(
                    f"cannot {doing}: vectors {known[0][0]} and {i} are differences from different bases; if that is "
                    "meant, drop the record of one: TaskVector(dict(vector))"
                )
    first, *others = metas
    return {key: value for key, value in first.items() if all(meta.get(key) == value for meta in others)}
