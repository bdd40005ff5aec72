"""Which base a vector was taken from: two short hashes, so that vectors of different bases are not mixed unawares."""

import hashlib
from collections.abc import Mapping

import torch

from .._engine.run import entries_of
from .._engine.sources import Source
from ..errors import MismatchError
from .model import Model

LAYOUT, VALUES = "base.layout", "base.values"

SAMPLES = 4  # elements read of each tensor
CHEAP = 1 << 20  # a lazy tensor that must compute more than this many entries for one element is not sampled


def fingerprint(base: Model, *, values: bool = True) -> dict[str, str]:
    """Hashes of a base's names, shapes and dtypes, and of a few elements of each tensor.

    Weights that are tied count once, so that a model in memory and the same on disk, saved without its duplicates, have
    one fingerprint.

    Args:
        base: a model's parameters, in memory or lazy.
        values: whether the elements count; not where the base is known to differ by design.
    """
    names = sorted(name for name in base.specs if name not in base.tied)
    layout = hashlib.blake2b(digest_size=8)
    for name in names:
        layout.update(f"{name} {tuple(base.specs[name].shape)} {base.specs[name].dtype}\n".encode())
    found = {LAYOUT: layout.hexdigest()}
    if values and all(base.source.grain(name) <= CHEAP for name in names):
        sample = hashlib.blake2b(digest_size=8)
        for name in names:
            sample.update(_elements(base.source, name))
        found[VALUES] = sample.hexdigest()
    return found


def _elements(base: Source, name: str) -> bytes:
    entries = base.specs[name].entries
    dtype = base.specs[name].dtype
    if dtype.is_complex or str(dtype).startswith(("torch.qint", "torch.quint")):
        return b""  # never part of a vector
    places = sorted({entries * i // SAMPLES for i in range(SAMPLES)}) if entries else []
    parts = [entries_of(base, name, i, i + 1).detach() for i in places]
    # compared across devices and dtypes' own bytes: a few numbers, read where they are
    return b"".join(repr(part.to(torch.float64).item()).encode() for part in parts)


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
