"""The exact k-th magnitude: in memory, and from blocks.

Magnitudes are compared as bit patterns: for finite floats of one sign the order of the bits is the order of the values.
A bracket around the wanted one is guessed from a sample, then everything is counted against it and what lies inside is
collected and sorted; two passes and no copy of the vector. The count makes it exact, whatever the sample said.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from ._errors import NonFiniteError, RangeError
from ._lazy import BLOCK
from ._random import order_at
from .rules import Place, Total, row_length

Count: TypeAlias = Literal["round", "floor", "reference"]
"""How a density becomes a number of entries: see `kept`."""

_TOP = (1 << 63) - 1

_Keys: TypeAlias = Callable[[Tensor, Place, int], Tensor]

SAMPLE = 1 << 17  # keys in the sample that a bracket is guessed from, about
BLOCKS_COUNTED = 16  # at a time: counts are exact, whatever the length
BLOCKS_SAMPLED = 256  # out of so many blocks
HELD = 1 << 21  # keys and indices collected inside a bracket at most: 24 MB


class Cut(NamedTuple):
    """Which magnitudes are kept: those above a threshold, and of those equal to it the first in a random order."""

    threshold: float
    below: float = 0.0  # the next smaller number in the vector's precision
    limit: int | None = None  # on `Place.order`, of those equal; None: all of them are kept
    nothing: bool = False

    @property
    def is_everything(self) -> bool:
        return self.threshold == 0 and self.limit is None and not self.nothing

    def keep(self, x: Tensor, at: Place) -> Tensor:
        """`x` with zeros in place of what is not kept; a new tensor."""
        if self.is_everything:
            return x.clone()
        if self.nothing:
            return torch.zeros_like(x)
        if x.dtype not in (torch.float32, torch.float64):
            return self.keep(x.to(torch.float32), at).to(x.dtype)  # exact: only zeros are new
        # hardshrink keeps what is strictly larger; one pass without a mask, which costs several times more
        result = torch.nn.functional.hardshrink(x, self.below) if self.threshold > 0 else x.clone()
        if self.limit is not None and x.numel() and float((x.abs() - self.threshold).abs().min()) == 0:
            equal = x.abs() == self.threshold
            result[equal] *= at.order(equal) < self.limit
        return result


EVERYTHING = Cut(0.0)
NOTHING = Cut(0.0, nothing=True)


def check_density(density: float, name: str = "density") -> float:
    """The density as a float, refused outside [0, 1]."""
    if not 0 <= density <= 1:
        hint = f"; for {density:g} per cent say {density / 100:g}" if 1 < density <= 100 else ""
        raise RangeError(f"{name} is the fraction of entries, in [0, 1], not {density!r}{hint}")
    return float(density)


def kept(density: float, entries: int, count: Count = "round") -> int:
    """How many of so many entries a density keeps.

    Args:
        density: the fraction, in [0, 1].
        entries: how many there are.
        count: `"round"`: Python's round; `"floor"`: towards zero (mergekit, PEFT); `"reference"`: one more than floor,
            as in the original TIES code, whose threshold also keeps all that are equal to it.
    """
    check_density(density)
    if count == "round":
        return round(density * entries)
    if count == "floor":
        return int(density * entries)
    if count == "reference":
        return min(int(density * entries) + 1, entries)
    raise RangeError(f"count is 'round', 'floor' or 'reference', not {count!r}")


def magnitude_bits(x: Tensor) -> Tensor:
    """Magnitudes as integers in the same order: int32, or int64 for float64."""
    if x.dtype == torch.float64:
        bits, mask = x.detach().contiguous().view(torch.int64), 0x7FFFFFFFFFFFFFFF
    else:
        bits, mask = x.detach().to(torch.float32).contiguous().view(torch.int32), 0x7FFFFFFF
    # numpy starts no threads, which for so little work wait longer for each other than they work
    return _held(np.asarray(bits.numpy() & mask)) if bits.device.type == "cpu" else bits & mask


def cut_largest(total: Total, keep: int, *, with_equals: bool = False) -> Cut:
    """The cut that keeps exactly so many entries of largest magnitude, over the scope of a leaf's `total`.

    Args:
        total: of one vector.
        keep: how many.
        with_equals: keep all that are equal to the smallest kept too, so perhaps more.

    Raises:
        NonFiniteError: if the vector holds NaN or inf.
    """
    if keep >= total.entries:
        return EVERYTHING
    if keep <= 0:
        return NOTHING
    found = _kth_largest(total, _magnitudes, keep, total.entries)
    threshold, below = _magnitude(found.value, found.dtype), _magnitude(max(0, found.value - 1), found.dtype)
    missing = keep - found.above
    if with_equals or missing == found.equal:
        return Cut(threshold, below)
    if found.held is None:  # very many are equal

        def orders(block: Tensor, at: Place, step: int) -> Tensor:
            return at.order(magnitude_bits(block) == found.value)[::step]

        return Cut(threshold, below, _kth_largest(total, orders, found.equal - missing, found.equal).value)
    ranks = [order_at(key, places) for key, places in _equal(found).items()]
    return Cut(threshold, below, int(torch.cat(ranks).sort().values[missing]))


class _Found(NamedTuple):
    """The key of a rank, how many keys are larger and equal, and what was held: (name's key, indices, keys)."""

    value: int
    above: int
    equal: int
    dtype: torch.dtype
    held: list[tuple[int, Tensor, Tensor]] | None


def _equal(found: _Found) -> dict[int, Tensor]:
    """The indices of the entries equal to the key that was found, for each name's key that has any."""
    places: dict[int, list[Tensor]] = {}
    for key, own, bits in found.held or ():
        places.setdefault(key, []).append(own[bits == found.value])
    return {key: torch.cat(parts) for key, parts in places.items()}


def _magnitudes(block: Tensor, at: Place, step: int) -> Tensor:
    del at
    return magnitude_bits(block.reshape(-1)[::step])


def _magnitude(bits: int, dtype: torch.dtype) -> float:
    wide = dtype == torch.int64
    return torch.tensor(bits, dtype=dtype, device="cpu").view(torch.float64 if wide else torch.float32).item()


def _kth_largest(total: Total, keys: _Keys, rank: int, count: int) -> _Found:
    """Find the rank-th largest key (from 1).

    Args:
        total: of one vector.
        keys: `keys(block, at, step)`: every step-th of a block's keys, `(m,)`, non-negative integers.
        rank: in `[1, count]`.
        count: how many keys there are in all.
    """
    low, high, above, inside = 0, _TOP, 0, count
    while True:
        inner_low, inner_high = low, high
        if inside > HELD and low < high:
            inner_low, inner_high = _guess(total, keys, low, high, (rank - above) / inside, inside)
        larger, middle, dtype, held = _count(total, keys, inner_low, inner_high)
        if rank <= larger:
            low, inside = inner_high + 1, larger - above
        elif rank > larger + middle:
            high, inside, above = inner_low - 1, inside + above - larger - middle, larger + middle
        elif held is not None:
            value, before, equal = _ranked(torch.cat([own for _, _, own in held]), rank - larger)
            return _Found(value, larger + before, equal, dtype, held)
        elif inner_low == inner_high:
            return _Found(inner_low, larger, middle, dtype, None)
        else:
            low, high, above, inside = inner_low, inner_high, larger, middle


def _ranked(keys: Tensor, rank: int) -> tuple[int, int, int]:
    """The rank-th largest of keys in memory, how many are larger, how many are equal."""
    if keys.device.type == "cpu":
        array = keys.numpy()
        value = int(np.partition(array, len(array) - rank)[len(array) - rank])
        return value, int(np.count_nonzero(array > value)), int(np.count_nonzero(array == value))
    value = int(keys.sort(descending=True).values[rank - 1])
    return value, int((keys > value).sum()), int((keys == value).sum())


def _guess(total: Total, keys: _Keys, low: int, high: int, fraction: float, inside: int) -> tuple[int, int]:
    """A bracket that very probably holds the key that `fraction` of the keys in [low, high] reach."""
    every = max(1, total.entries // BLOCKS_SAMPLED // BLOCK)
    step = max(1, inside // every // SAMPLE)
    sample = torch.cat(total(lambda block, at: [keys(block, at, step)], every=every)).to(torch.int64)
    sample = sample[(sample >= low) & (sample <= high)].sort(descending=True).values
    if len(sample) == 0:
        return low, (low + high) // 2
    if sample[0] == sample[-1]:  # one value nearly everywhere: count it by itself
        return int(sample[0]), int(sample[0])
    place = fraction * len(sample)
    margin = 8 + 5 * (len(sample) * fraction * (1 - fraction)) ** 0.5
    first, last = int(place - margin), int(place + margin)
    inner_high = int(sample[first]) if first > 0 else high
    inner_low = int(sample[last]) if last < len(sample) else low
    if (inner_low, inner_high) == (low, high):  # no narrower: halve it
        inner_low = low + (high - low) // 2 + 1
    return inner_low, inner_high


def _count(
    total: Total, keys: _Keys, low: int, high: int
) -> tuple[int, int, torch.dtype, list[tuple[int, Tensor, Tensor]] | None]:
    """How many keys are above high, how many in [low, high], their dtype, and the latter unless they are too many."""
    held: list[tuple[int, Tensor, Tensor]] = []
    dtype = torch.int64
    middle = 0

    def count(block: Tensor, at: Place) -> int:
        nonlocal dtype, middle
        found = keys(block, at, 1)
        _check_finite(found, block)
        dtype = found.dtype
        larger, places, chosen = _compare(found, low, min(high, torch.iinfo(dtype).max))
        middle += len(places)
        if middle <= HELD:
            held.append((at.key, places + at.start, chosen))
        return larger

    larger = total(count, blocks=BLOCKS_COUNTED)
    return larger, middle, dtype, held if middle <= HELD else None


def _compare(keys: Tensor, low: int, high: int) -> tuple[int, Tensor, Tensor]:
    """How many keys are above high, and the positions of those in [low, high] and they themselves."""
    if keys.device.type == "cpu":  # numpy compares several times faster, and starts no threads for a block
        array = keys.numpy()
        at_least, larger = array >= low, array > high
        places = (at_least ^ larger).nonzero()[0]
        return int(np.count_nonzero(larger)), _held(places), _held(array[places])
    at_least, larger = keys >= low, keys > high
    places = (at_least ^ larger).nonzero().squeeze(1)
    return int(larger.count_nonzero()), places, keys[places]


def _held(array: Any) -> Tensor:
    return torch.from_numpy(array)  # pyright: ignore[reportUnknownMemberType]


def _check_finite(keys: Tensor, block: Tensor) -> None:
    if keys.dtype == torch.int32 and keys.numel() and _largest(keys) >= 0x7F800000:
        raise NonFiniteError("NaN or inf")
    if keys.dtype == torch.int64 and block.dtype == torch.float64 and not bool(block.isfinite().all()):
        raise NonFiniteError("NaN or inf")


def _largest(keys: Tensor) -> int:
    return int(keys.numpy().max() if keys.device.type == "cpu" else keys.max())


def sorted_rows(x: Tensor, at: Place) -> Tensor:
    """For each row, its entries' indices from the largest magnitude to the smallest, `(rows, length)` int64.

    Equal magnitudes come in the random order of `Place.order`.
    """
    rows = x.reshape(-1, row_length(x))
    bits = magnitude_bits(rows)
    if not bool(rows.isfinite().all()):
        raise NonFiniteError("cannot rank a row that holds NaN or inf; check() lists such tensors")
    order = at.order(torch.ones_like(rows, dtype=torch.bool)).reshape(rows.shape)
    if bits.dtype == torch.int32:  # one sort: bits and 32 bits of the order in one key, the rest by position
        keys = (bits.to(torch.int64) << 31) | (0x7FFFFFFF - (order >> 32))
        return keys.argsort(dim=1, descending=True, stable=True)
    by_order = order.argsort(dim=1)
    return by_order.gather(1, bits.gather(1, by_order).argsort(dim=1, descending=True, stable=True))
