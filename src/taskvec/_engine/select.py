"""The exact k-th magnitude, over several tensors or in rows.

Every entry has a key: the bits of its magnitude, whose order is the order of the values, then its turn, a number that
differs for all entries of a tensor and settles equal magnitudes, then the key of its tensor's name. A sample brackets
the key that is wanted, one pass counts what lies above the bracket and collects what lies inside; the count makes it
exact, whatever the sample said. Where too much is inside, or the key is not, the pass has narrowed down all the same
where it lies, and more passes count what is in parts of that, until little enough is left to be collected.
"""

from collections.abc import Generator, Iterable, Sequence
from functools import lru_cache
from typing import Any, Literal, NamedTuple, TypeAlias, cast

import numpy as np
import torch
from torch import Tensor

from ..errors import NonFiniteError, RangeError
from .pieces import Look, Place, wide

__all__ = ["Count", "Cuts", "as_tensor", "check_density", "kept", "largest", "magnitude_of", "masked"]

Count: TypeAlias = Literal["round", "floor", "at_least_one", "reference"]
"""How a density becomes a number of entries: see `kept`."""

Passes: TypeAlias = Generator[Look, list[Any], Any]

TURN = 0x9E3779B1  # 2**32 over the golden ratio, made odd: multiples of it are spread evenly and all differ
LOW = (1 << 32) - 1
TOP = (1 << 63) - 1
SMALL = 1 << 16  # so many keys are collected without a bracket
SAMPLE = 1 << 20  # keys of a vector in a sample, at most
HELD = 1 << 21  # so many keys of a vector are collected, twice as many by a guess; of more, bins are counted
FEW = 64  # keys of a block, which any bracket collects
BINS = 64  # parts of a bracket, about
PACKED = 56  # keys in one string of bytes: Python's own allocator takes those of at most 512 bytes, header included


class Key(NamedTuple):
    """The smallest key that is kept, compared in this order."""

    bits: int
    turn: int = 0
    name: int = 0


EVERYTHING = Key(0)
NOTHING = Key(TOP)


class Cuts(NamedTuple):
    """For each vector of a stack, which magnitudes are kept."""

    keys: tuple[Key, ...]

    def keep(self, stack: Tensor, at: Place) -> Tensor:
        """`(n, *shape)` with zeros in place of what is not kept; a new tensor."""
        if all(key == EVERYTHING for key in self.keys):
            return stack.clone()
        if stack.dtype not in (torch.float32, torch.float64):
            return self.keep(wide(stack), at).to(stack.dtype)  # exact: only zeros are new
        flat = stack.reshape(len(stack), -1)
        rows = None if flat.requires_grad else flat.new_empty(flat.shape)
        shrunk = [
            _shrunk(x, key, None if rows is None else rows[i])
            for i, (x, key) in enumerate(zip(flat, self.keys, strict=True))
        ]
        found = torch.stack(shrunk) if rows is None else rows
        late = self._late(flat.detach(), at)
        if late is not None:
            found.view(-1)[late] = 0
        return found.reshape(stack.shape)

    def _late(self, flat: Tensor, at: Place) -> Tensor | None:
        """Where a magnitude equals the threshold and its turn comes too late, flat indices; None if that is nowhere."""
        last = [key.turn - (at.key >= key.name) for key in self.keys]  # the last turn that is too late
        if max(last) < 0:
            return None
        mags = magnitudes(flat)
        # where no turn is too late, a magnitude that there is not
        bits = [key.bits if t >= 0 else TOP for key, t in zip(self.keys, last, strict=True)]
        places = _nonzero(mags == _column(bits, mags))
        if not len(places):
            return None
        row, column = places // flat.shape[1], places % flat.shape[1]
        turns = _turns_at(at, column)
        late = places[turns <= _column([max(t, 0) for t in last], turns)[row, 0]]
        return late if isinstance(late, Tensor) else as_tensor(late)


def _shrunk(row: Tensor, key: Key, out: Tensor | None) -> Tensor:
    """Magnitudes below the key's set to zero: one pass without a mask."""
    if key == NOTHING:
        return torch.zeros_like(row) if out is None else out.zero_()
    below = magnitude_of(key.bits - 1, row.dtype) if key.bits else -1.0
    return torch.hardshrink(row, below, out=out)  # keeps what is strictly larger


def magnitude_of(bits: int, dtype: torch.dtype) -> float:
    """The magnitude with some bits: what `magnitudes` makes an integer of."""
    unsigned, floats = (np.uint64, np.float64) if dtype == torch.float64 else (np.uint32, np.float32)
    return float(unsigned(bits).view(floats))


def masked(x: Tensor, keep: Any) -> Tensor:
    """`x` where a mask is true, 0.0 elsewhere; a new tensor. Far faster than `torch.where` on the CPU."""
    if x.device.type != "cpu" or x.requires_grad:
        mask = keep if isinstance(keep, Tensor) else as_tensor(keep)
        return torch.where(mask, x, x.new_zeros(()))
    # bits are multiplied, not numbers: no -0.0, and what is dropped may be NaN
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    result = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    mask = keep.numpy() if isinstance(keep, Tensor) else keep
    np.multiply(x.contiguous().view(kind).numpy(), mask, out=result.view(kind).numpy())
    return result


def check_density(density: float, name: str = "density") -> float:
    """The density as a float, refused outside [0, 1]."""
    if isinstance(density, bool) or not isinstance(density, int | float | np.floating):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise RangeError(f"{name} must be a number in [0, 1]; got {density!r}; use float(...)")
    if not 0 <= density <= 1:
        hint = f"; for {density:g} per cent say {density / 100:g}" if 1 < density <= 100 else ""
        raise RangeError(f"{name} must be the fraction of entries kept, in [0, 1]; got {density!r}{hint}")
    return float(density)


def kept(density: float, entries: int, count: Count = "round") -> int:
    """How many of so many entries a density keeps.

    Args:
        density: the fraction, in [0, 1].
        entries: how many there are.
        count: `"round"`: Python's round; `"floor"`: towards zero (PEFT); `"at_least_one"`: the same, but one where that
            is none (mergekit's TIES); `"reference"`: one more than floor, as in the original TIES code, whose threshold
            also keeps all that are equal to it.
    """
    check_density(density)
    if count == "round":
        return round(density * entries)
    if count == "floor":
        return int(density * entries)
    if count == "at_least_one":
        return max(int(density * entries), 1 if density > 0 else 0)
    if count == "reference":
        return min(int(density * entries) + 1, entries)
    raise RangeError(f"count must be 'round', 'floor', 'at_least_one' or 'reference'; got {count!r}")


# --- keys ------------------------------------------------------------------------------------------------------------


def magnitudes(x: Tensor) -> Any:
    """Magnitudes as integers in the same order: an unsigned array on the CPU, int64 elsewhere."""
    if x.device.type == "cpu":
        if x.dtype == torch.float64:
            return np.bitwise_and(x.numpy().view(np.uint64), np.uint64(TOP))
        return np.bitwise_and(x.numpy().view(np.uint32), np.uint32(0x7FFFFFFF))
    if x.dtype == torch.float64:
        return x.contiguous().view(torch.int64) & TOP
    return (x.contiguous().view(torch.int32) & 0x7FFFFFFF).to(torch.int64)


def turns_of(at: Place, count: int, device: torch.device) -> Any:
    """The turns of a run of entries, `(index * TURN + key) mod 2**32`: uint32 on the CPU, int64 elsewhere."""
    first = (at.start * TURN + at.key) & LOW
    if device.type == "cpu":
        return _multiples(1 << max(0, count - 1).bit_length())[:count] + np.uint32(first)
    return (torch.arange(count, device=device) * TURN + first) & LOW


def _turns_at(at: Place, places: Any) -> Any:
    """The turns of some entries of a block."""
    first = (at.start * TURN + at.key) & LOW
    if isinstance(places, Tensor):
        return (places * TURN + first) & LOW
    return places.astype(np.uint32) * np.uint32(TURN) + np.uint32(first)


def _nonzero(mask: Any) -> Any:
    """Where a mask is true, flat indices, int64."""
    return mask.reshape(-1).nonzero()[:, 0] if isinstance(mask, Tensor) else np.flatnonzero(mask)


@lru_cache(maxsize=8)
def _multiples(count: int) -> Any:
    return np.arange(count, dtype=np.uint32) * np.uint32(TURN)


def _column(values: Sequence[int], like: Any) -> Any:
    """Values as a column of the same kind of array."""
    if isinstance(like, Tensor):
        return torch.tensor([min(v, TOP) for v in values], dtype=torch.int64, device=like.device)[:, None]
    limit = int(np.iinfo(like.dtype).max)
    return np.array([min(v, limit) for v in values], dtype=like.dtype)[:, None]


def _keys(row: Tensor, at: Place, equal: int | None) -> Any:
    """The keys of a vector's block that are compared: of float32 with their turns, of float64 without, or turns alone.

    Args:
        row: `(m,)`.
        at: its place.
        equal: where given, the turns of the entries whose magnitude has these bits.
    """
    mags, turns = magnitudes(row), turns_of(at, len(row), row.device)
    if equal is not None:
        return turns[mags == equal]
    if row.dtype == torch.float64:
        return mags
    if isinstance(mags, Tensor):
        return (mags << 32) | turns
    return (mags.astype(np.uint64) << np.uint64(32)) | turns


def _on_host(keys: Any) -> Any:
    """Keys as a uint64 array."""
    return (keys.cpu().numpy() if isinstance(keys, Tensor) else keys).astype(np.uint64)


def _sample(stack: Tensor, at: Place, equals: Sequence[int | None]) -> list[Any]:
    """For each vector, the keys of a block."""
    return [_on_host(_keys(row, at, equal)) for row, equal in zip(stack, equals, strict=True)]


class Inside(NamedTuple):
    """Of one vector's block: how many keys are above a bracket and inside, and those, or how many are in each bin.

    Neither where the bracket is one key. Both are small strings of bytes, which Python keeps apart: arrays that stay
    would lie among the large ones of a block, and what is freed between them would be of no use to the next block.
    """

    above: int
    inside: int
    keys: list[bytes] | None
    bins: bytes
    name: int
    wide: bool


def _inside(
    stack: Tensor, at: Place, brackets: Sequence["Bracket | None"], equals: Sequence[int | None]
) -> list[Inside | None]:
    """For each vector with a bracket, what of a block is above and inside it."""
    rows = [i for i, bracket in enumerate(brackets) if bracket is not None]
    asked = [cast("Bracket", brackets[i]) for i in rows]
    own = stack if len(rows) == len(stack) else stack[rows]
    mags = magnitudes(own)
    _check_finite(mags, 0x7FF0000000000000 if own.dtype == torch.float64 else 0x7F800000)
    if own.dtype == torch.float32 and not isinstance(mags, Tensor) and all(equals[i] is None for i in rows):
        found = _bracketed_rows(mags, at, asked)
    else:
        found = [
            _counted(_keys(x, at, equals[i]), 0, at, bracket, entries=len(x), wide=own.dtype == torch.float64)
            for i, x, bracket in zip(rows, own, asked, strict=True)
        ]
    told = dict(zip(rows, found, strict=True))
    return [told.get(i) for i in range(len(stack))]


def _bracketed_rows(mags: Any, at: Place, brackets: Sequence["Bracket"]) -> list[Inside]:
    """Of float32 on the CPU: most entries are above or below by their magnitudes alone, found in few long calls."""
    larger = mags > _column([bracket.high >> 32 for bracket in brackets], mags)
    near = mags >= _column([bracket.low >> 32 for bracket in brackets], mags)
    near ^= larger
    places = np.flatnonzero(near)
    found: list[Inside] = []
    end = 0
    for i, bracket in enumerate(brackets):
        begin, end = end, end + int(np.count_nonzero(near[i]))
        columns = places[begin:end] - i * mags.shape[1]
        keys = (mags[i][columns].astype(np.uint64) << np.uint64(32)) | _turns_at(at, columns)
        above = int(np.count_nonzero(larger[i]))
        found.append(_counted(keys, above, at, bracket, entries=mags.shape[1], wide=False))
    return found


def _counted(keys: Any, above: int, at: Place, bracket: "Bracket", *, entries: int, wide: bool) -> Inside:
    """What of some keys of a block is above and inside a bracket, beside so many that are above anyway."""
    larger, least = keys > bracket.high, keys >= bracket.low
    inside = least & ~larger
    count, above = int(inside.sum()), above + int(larger.sum())
    if bracket.low == bracket.high:
        return Inside(above, count, None, b"", at.key, wide)
    chosen = _on_host(keys[inside])
    if count > bracket.share * entries + FEW:
        return Inside(above, count, None, _binned(chosen, bracket).tobytes(), at.key, wide)
    return Inside(above, count, _packed(chosen), b"", at.key, wide)


def _packed(keys: Any) -> list[bytes]:
    """Keys as small strings of bytes."""
    return [keys[i : i + PACKED].tobytes() for i in range(0, len(keys), PACKED)]


def _unpacked(keys: Iterable[bytes]) -> Any:
    """The keys of such strings, a new array."""
    return np.frombuffer(bytearray().join(keys), dtype=np.uint64)


def _binned(keys: Any, bracket: "Bracket") -> Any:
    """How many keys are in each bin of a bracket, uint32."""
    edges: Any = bracket.edges
    return np.bincount(edges.searchsorted(keys, side="right") - 1, minlength=len(edges)).astype(np.uint32)


def _check_finite(mags: Any, infinity: int) -> None:
    if (mags.numel() if isinstance(mags, Tensor) else mags.size) and int(mags.max()) >= infinity:
        raise NonFiniteError("NaN or inf: no statistic can be taken")


class Found(NamedTuple):
    """A key of a rank: how many keys are larger, how many equal, and the keys of the names that those are in."""

    key: int
    above: int
    equal: int
    names: list[int]
    wide: bool


class Bracket(NamedTuple):
    """The keys from low to high. Of a block where more than a share of the entries are inside, bins are counted.

    Attributes:
        edges: the smallest key of each bin.
    """

    low: int
    high: int
    share: float
    edges: Any


class Range(NamedTuple):
    """What is known of the key that is wanted: it is one of so many inside, from low to high; so many are above."""

    low: int
    high: int
    above: int
    inside: int

    def bracket(self) -> Bracket:
        """The whole range: its keys are collected where they are few, else counted in equal bins."""
        width = -((self.low - self.high - 1) // BINS)
        edges = np.array(range(self.low, self.high + 1, width), np.uint64)
        return Bracket(self.low, self.high, 1.0 if self.inside <= HELD else 0.0, edges)

    def guess(self, sample: Any, rank: int) -> Bracket:
        """A bracket that very probably holds the key of a rank: one in two thousand misses, and costs some passes.

        On both sides it reaches three and a half standard deviations of the key's place in a sorted sample, and eight
        keys more. Its bins have the same number of keys of the sample each.
        """
        m, fraction = len(sample), rank / self.inside
        margin = 8 + 3.5 * (m * fraction * (1 - fraction)) ** 0.5
        first, last = int(fraction * m - margin), int(fraction * m + margin)
        low = int(sample[m - 1 - last]) if last < m else self.low
        high = int(sample[m - 1 - first]) if first > 0 else self.high
        near = sample[max(0, m - 1 - last) : m - max(0, first)]
        edges = np.unique(np.concatenate([np.array([low], np.uint64), near[:: len(near) // BINS + 1]]))
        return Bracket(low, high, guessed_share(m, self.inside), edges)


def guessed_share(sample: int, count: int) -> float:
    """Of a block's entries so many are collected by a guess: four times what is expected, and not too many in all."""
    return min(1.0, (64 + 14 * sample**0.5) / max(1, sample), 2 * HELD / count)


def _search(ranks: Sequence[int | None], counts: Sequence[int], entries: int, equals: Sequence[int | None]) -> Passes:
    """For each vector with a rank, find the key of that rank, from 1, among `counts` keys."""
    wanted = {i: rank for i, rank in enumerate(ranks) if rank is not None}
    known = {i: Range(0, TOP if equals[i] is None else LOW, 0, counts[i]) for i in wanted}
    brackets = {i: own.bracket() for i, own in known.items()}
    if max((own.inside for own in known.values()), default=0) > SMALL:
        parts = yield Look(_sample, (equals,), sample=min(SAMPLE, int(entries ** (2 / 3))))
        for i, own in known.items():
            brackets[i] = own.guess(np.sort(np.concatenate(_taken(parts, i))), wanted[i])
        del parts
    found: list[Found | None] = [None] * len(ranks)
    while brackets:
        parts = yield Look(_inside, ([brackets.get(i) for i in range(len(ranks))], equals))
        for i, bracket in list(brackets.items()):
            result = _ranked(_taken(parts, i), wanted[i], bracket, known[i])
            if isinstance(result, Found):
                found[i] = result
                del brackets[i]
            else:
                known[i], brackets[i] = result, result.bracket()
    return found


def _taken(parts: Sequence[list[Any]], i: int) -> list[Any]:
    """Of every block what is the i-th vector's, taken out, so that its keys are freed before those of the next."""
    found = [part[i] for part in parts]
    for part in parts:
        part[i] = None
    return found


def _ranked(parts: Sequence[Inside], rank: int, bracket: Bracket, known: Range) -> Found | Range:
    """The key of a rank, or in which part of what was known it lies."""
    above, count = sum(part.above for part in parts), sum(part.inside for part in parts)
    if rank <= above:
        return Range(bracket.high + 1, known.high, known.above, above - known.above)
    if rank > above + count:
        return Range(known.low, bracket.low - 1, above + count, known.above + known.inside - above - count)
    if bracket.low == bracket.high:
        names = [part.name for part in parts for _ in range(part.inside)] if count < SMALL else []
        return Found(bracket.low, above, count, names, parts[0].wide)
    keys = _unpacked(own for part in parts for own in part.keys or ())
    if len(keys) < count:
        bins = np.frombuffer(b"".join(part.bins for part in parts), dtype=np.uint32).reshape(-1, len(bracket.edges))
        return _in_bin(bins.sum(axis=0, dtype=np.int64) + _binned(keys, bracket), rank, bracket, above)
    place = len(keys) - (rank - above)
    keys.partition(place)
    key = keys[place]
    names = [part.name for part in parts for _ in range(np.count_nonzero(_unpacked(part.keys or ()) == key))]
    return Found(int(key), above + int(np.count_nonzero(keys > key)), len(names), names, parts[0].wide)


def _in_bin(bins: Any, rank: int, bracket: Bracket, above: int) -> Range:
    """The bin that holds the key of a rank."""
    larger = above + bins[::-1].cumsum()[::-1] - bins  # keys above each bin
    at = int(np.flatnonzero((larger < rank) & (rank <= larger + bins))[0])
    ends = [*map(int, bracket.edges), bracket.high + 1]
    return Range(ends[at], ends[at + 1] - 1, int(larger[at]), int(bins[at]))


def largest(n: int, entries: int, keep: int, *, with_equals: bool = False) -> Passes:
    """A statistic: for each of n vectors, the cut that keeps exactly so many entries of largest magnitude.

    Args:
        n: vectors in the stack.
        entries: of each, over the scope.
        keep: how many.
        with_equals: keep all that are equal to the smallest kept too, so perhaps more.

    Raises:
        NonFiniteError: NaN or inf.
    """
    if keep >= entries or keep <= 0:
        return Cuts((EVERYTHING if keep >= entries else NOTHING,) * n)
    nothing: list[int | None] = [None] * n
    found: list[Found] = yield from _search([keep] * n, [entries] * n, entries, nothing)
    if not found[0].wide:
        return Cuts(tuple(_key_of(own.key >> 32, own.key & LOW, own, keep, with_equals) for own in found))
    missing = [keep - own.above for own in found]
    ranks = [None if with_equals or m == own.equal else m for m, own in zip(missing, found, strict=True)]
    turns: list[Found | None] = [None] * n
    if any(rank is not None for rank in ranks):
        turns = yield from _search(ranks, [own.equal for own in found], entries, [own.key for own in found])
    return Cuts(
        tuple(
            Key(own.key) if turn is None else _key_of(own.key, turn.key, turn, own_missing, with_equals)
            for own, turn, own_missing in zip(found, turns, missing, strict=True)
        )
    )


def _key_of(bits: int, turn: int, found: Found, rank: int, with_equals: bool) -> Key:
    """The smallest key kept. Entries of several names may have one turn: then the first names count."""
    if with_equals:
        return Key(bits)
    missing = rank - found.above
    return Key(bits, turn, 0 if missing == found.equal else sorted(found.names, reverse=True)[missing - 1])


def as_tensor(array: Any) -> Tensor:
    """An array of numpy's, sharing its memory."""
    return torch.from_numpy(array)  # pyright: ignore[reportUnknownMemberType]
