"""Pieces of tensors: where one lies, how tensors are cut into blocks and chunks, and what a statistic asks for.

Rules and statistics are given blocks; files are read a chunk of many blocks at a time. Blocks and chunks begin at the
same places always, whatever the sharding and the number of workers, so that float64 sums over them have the same bits.
"""

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from .random import bernoulli, random_bits
from .sources import Spec

__all__ = ["HERE", "Look", "Pieces", "Place", "Statistic"]

Pieces: TypeAlias = Literal["element", "row", "tensor"]
"""What a rule or a statistic is given: flat runs of entries, whole rows, or whole tensors."""

BLOCK = 1 << 18
"""Entries in one block on the CPU: long enough that two threads hardly wait for the interpreter (half as many cost a
third of the speed), and small enough for the cache."""

CHUNK = 1 << 20
"""Entries of a tensor that are read at once."""

DEVICE_BLOCK = 1 << 24
"""Entries in one block on other devices, where a launch costs more than the cache gains."""

RUN = 1 << 12
"""Entries in one run of a sample."""


class Look(NamedTuple):
    """A pass that a statistic asks for: `f(stack_block, at, *args)` of every block, as a list in a fixed order.

    Attributes:
        f: a module-level function of a block of the stack, `(n, m)`, and its `Place`.
        args: further arguments of f.
        sample: where not 0, only about so many entries are read, in short runs spread over all names.
        pieces: the kind of blocks: `(n, m)`, or whole rows `(n, r, ...)`.
    """

    f: Callable[..., Any]
    args: tuple[Any, ...] = ()
    sample: int = 0
    pieces: Pieces = "element"


Statistic: TypeAlias = Callable[..., Generator[Look, list[Any], Any]]
"""`statistic(n, entries, **options)`: a generator of passes over n vectors of so many entries each.

It is given the rule's options, and the values of earlier statistics, under the names of its further parameters; what it
returns is the statistic.
"""


class Place(NamedTuple):
    """Where a piece lies: the key of its tensor's name, its first entry's flat index, and the statistics taken before.

    Attributes:
        key: 64 bits of the tensor's name.
        start: the flat index of the piece's first entry.
        known: statistic -> value, as the engine took it; None for a plain tensor.
    """

    key: int = 0
    start: int = 0
    known: Mapping[Any, Any] | None = None

    def take(self, statistic: Statistic, stack: Tensor, *options: Any) -> Any:
        """The value of a statistic: what the engine took over the scope; of a plain tensor, over itself.

        Args:
            statistic: one that the rule's mark lists.
            stack: `(n, *shape)`; of a leaf's tensor x, `x[None]`.
            *options: of the statistic, in order.
        """
        return take_alone(statistic, stack, self, options) if self.known is None else self.known[statistic]

    def bits(self, seed: int, like: Tensor) -> Tensor:
        """32 random bits for every entry, int32, shaped as `like`: a function of (seed, name, flat index) only."""
        return random_bits(seed, self.key, self.start, like.numel(), like.device).reshape(like.shape)

    def draw(self, seed: int, probability: float, like: Tensor) -> Tensor:
        """True with a probability, for every entry, shaped as `like`: a function of (seed, name, flat index) only."""
        return bernoulli(self.bits(seed, like.reshape(-1)), probability).reshape(like.shape)


HERE = Place()
"""The place of a plain tensor, which is its own scope."""


def take_alone(statistic: Statistic, stack: Tensor, at: Place, options: Sequence[Any]) -> Any:
    """A statistic of a plain stack, over the blocks that the engine would cut it into."""
    spec = Spec(tuple(stack.shape[1:]), stack.dtype)
    passes = statistic(len(stack), spec.entries, *options)
    flat = wide(stack).reshape(len(stack), -1)
    try:
        look = next(passes)
        while True:
            size = piece_size(spec, look.pieces, stack.device)
            found = [
                look.f(shaped(flat[:, a:b], spec, look.pieces), Place(at.key, at.start + a), *look.args)
                for a, b in spans(0, spec.entries, size)
            ]
            look = passes.send(found)
    except StopIteration as end:
        return end.value


def wide(x: Tensor) -> Tensor:
    """The tensor in float32, or float64 where it is: the two widths that are computed in."""
    return x if x.dtype in (torch.float32, torch.float64) else x.to(torch.float32)


def shaped(flat: Tensor, spec: Spec, pieces: Pieces) -> Tensor:
    """A run `(n, m)` of entries as a rule wants it: as it is, as rows, or as the whole tensor."""
    if pieces == "element":
        return flat
    if pieces == "tensor" or len(spec.shape) < 2:
        return flat.reshape(len(flat), *spec.shape)
    return flat.reshape(len(flat), -1, *spec.shape[1:])


def piece_size(spec: Spec, pieces: Pieces, device: torch.device) -> int:
    """The number of entries in one piece: a block, or as many whole rows as fit in one (at least one), or all."""
    size = BLOCK if device.type in ("cpu", "meta") else DEVICE_BLOCK
    if pieces == "element":
        return size
    return max(1, spec.entries) if pieces == "tensor" else max(1, size // spec.row) * spec.row


def chunk_size(grain: int) -> int:
    """About a chunk, and a multiple of the grain."""
    return max(1, CHUNK // grain) * grain


def spans(start: int, stop: int, size: int) -> Iterator[tuple[int, int]]:
    """Consecutive spans of a size, the last one shorter."""
    return ((a, min(a + size, stop)) for a in range(start, stop, size))


def stride_for(entries: int, sample: int) -> int:
    """From the beginning of one run of a sample to that of the next, for a sample of about so many entries."""
    return max(1, entries * RUN // sample)


def sampled(entries: int, row: int, before: int, stride: int) -> list[tuple[int, int]]:
    """Short runs at every stride-th entry of all names one behind the other, of which this one has `before` before it.

    Args:
        entries: of this tensor.
        row: runs begin and end at multiples of this.
        before: entries of the names before it.
        stride: from the beginning of one run to that of the next.
    """
    length = max(row, RUN // row * row)
    stride = max(length, stride * length // RUN)
    firsts = sorted({first // row * row for first in range(-before % stride, entries, stride)})
    return [(first, min(first + length, entries)) for first in firsts]
