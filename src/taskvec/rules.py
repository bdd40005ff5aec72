"""What one needs to write a rule.

A rule is a function of stacked tensors, `(n, *shape) -> (*shape)`, and a sparsifier ("leaf") one of a single tensor,
`(*shape) -> (*shape)`. Any such function can be given to `merge` or `TaskVector.map`; it then gets whole tensors. A
rule that can also run on pieces says so with a mark, which makes it faster, and streamable over tensors larger than
memory:

    @runs("element")
    def halves(stack):
        return stack[0] / 2 + stack[1] / 2

    @runs("element", largest=largest_entry)     # a statistic, taken over the scope before the pieces run
    def relative(x, *, scope="tensor", largest=None):
        ...

A statistic is a function of `total` (a `Total`), and of any of the rule's options and earlier statistics, by name.
What a mark hands in, and `at` (a `Place`), are not options a caller can give.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

from ._errors import MismatchError, NonFiniteError, RangeError
from ._lazy import Lazy, block_size, read_blocks, specs_of
from ._random import fold, key_of, order_at, random_bits

__all__ = ["Mark", "Place", "Scope", "Total", "fold", "mark_of", "over", "runs"]

Scope = Literal["global", "tensor", "row"]
"""What "everything" means to a statistic: all names of the call, one tensor, or one slice along dim 0 of a tensor
(flattened; 1-D and 0-d tensors are one row)."""

Pieces = Literal["element", "row", "tensor"]

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Tensor])


class Place(NamedTuple):
    """Where a piece lies: the key of the tensor's name and the flat index of the piece's first entry."""

    key: int = 0
    start: int = 0

    def bits(self, seed: int, like: Tensor) -> Tensor:
        """32 random bits for every entry, int32, shaped as `like`: a function of (seed, name, flat index) only."""
        return random_bits(seed, self.key, self.start, like.numel(), like.device).reshape(like.shape)

    def order(self, chosen: Tensor) -> Tensor:
        """A random rank for every chosen entry, `(number chosen,)` int64: who comes first among equal magnitudes.

        Args:
            chosen: a boolean mask over the piece.
        """
        return order_at(self.key, chosen.reshape(-1).nonzero().squeeze(1) + self.start)


class Mark(NamedTuple):
    """How a rule may be run: on pieces of which kind, and with which statistics."""

    pieces: Pieces
    statistics: Mapping[str, Callable[..., Any]]


def runs(pieces: Pieces, /, **statistics: Callable[..., Any]) -> Callable[[F], F]:
    """Mark a rule as one that can run on pieces of a tensor.

    Args:
        pieces: `"element"`: on any flat run of entries, `(n, m)` for a stack and `(m,)` for a leaf;
            `"row"`: on any number of whole rows, `(n, r, ...)` or `(r, ...)`;
            `"tensor"`: on whole tensors only, as an unmarked rule, but with `at` and statistics.
            An element rule called with `scope="row"` is given whole rows too.
        **statistics: name -> `f(total, **options)`, computed over the scope before the pieces run and handed in under
            that name. Later ones may ask for earlier ones.

    Returns:
        A decorator that returns the function itself, unwrapped.

    Example:
        >>> def peak(total):
        ...     return max(total(lambda block, at: [block.abs().max()]))
        >>> @runs("element", peak=peak)
        ... def in_units_of_peak(x, *, scope="tensor", peak=None):
        ...     return x / x.abs().max() if peak is None else x / peak
        >>> from taskvec import TaskVector
        >>> TaskVector({"a": torch.tensor([1.0, -4.0])}).map(in_units_of_peak)["a"]
        tensor([ 0.2500, -1.0000])
    """
    if pieces not in ("element", "row", "tensor"):
        raise RangeError(
            f"runs() takes 'element', 'row' or 'tensor', not {pieces!r}; leave an ordinary function unmarked"
        )

    def mark(rule: F) -> F:
        rule.__taskvec_mark__ = Mark(pieces, dict(statistics))  # type: ignore[attr-defined]
        return rule

    return mark


def mark_of(rule: Callable[..., Tensor]) -> Mark | None:
    """A rule's mark, if it has one; partials are looked through."""
    while isinstance(rule, partial):
        rule = rule.func
    return getattr(rule, "__taskvec_mark__", None)


class Total:
    """Sums over everything a call was given (its scope), one piece after another.

    `total(f)` adds up `f(block, at)` over the blocks: tensors and numbers add, lists concatenate. Blocks are what the
    rule itself is given, `(n, m)` for a stack and `(m,)` for a leaf, always cut at the same places and always added in
    the same order, names sorted, so that a float64 sum has the same bits for every sharding.

    Attributes:
        entries: how many entries each vector has in the scope.
        vectors: the same for every vector of the stack alone; their blocks are `(m,)`.
    """

    def __init__(
        self,
        sources: Sequence[dict[str, Tensor] | Lazy],
        names: Sequence[str],
        *,
        pieces: Pieces = "element",
        stacked: bool = True,
        device: torch.device | None = None,
        keys: Mapping[str, int] | None = None,
    ) -> None:
        self._sources, self._names, self._stacked = sources, sorted(names), stacked
        self._pieces: Pieces = pieces
        self._device, self._keys = device, keys
        specs = specs_of(sources[0])
        self.entries = sum(specs[name].numel() for name in names)

    @property
    def vectors(self) -> "list[Total]":
        """The same for every vector of the stack alone."""
        return [
            Total([source], self._names, pieces=self._pieces, stacked=False, device=self._device, keys=self._keys)
            for source in self._sources
        ]

    def __call__(self, f: Callable[[Tensor, Place], T], *, every: int = 1, blocks: int = 1) -> T:
        """Add up what `f` returns for each block, or for every so-many-th one as a sample.

        Sums that are exact, of integers, may be taken over so many `blocks` at a time: fewer calls.
        """
        total: Any = None
        turn = 0
        for name in self._names:
            part: Any = None
            try:
                for at, block in self._blocks(name, blocks):
                    turn += 1
                    if (turn - 1) % every:
                        continue
                    found = f(block, at)
                    part = found if part is None else part + found
            except NonFiniteError:
                raise NonFiniteError(
                    f"{name!r} holds NaN or inf: no statistic can be taken over it; check() lists such tensors"
                ) from None
            if part is not None:
                total = part if total is None else total + part
        if total is None:
            raise RangeError("nothing to take a statistic over: every tensor is empty")
        return total

    def _blocks(self, name: str, blocks: int) -> Iterator[tuple[Place, Tensor]]:
        key = key_of(name) if self._keys is None else self._keys[name]
        return cut(self._sources, name, self._pieces, key, stacked=self._stacked, device=self._device, blocks=blocks)


def cut(
    sources: Sequence[dict[str, Tensor] | Lazy],
    name: str,
    pieces: Pieces,
    key: int,
    *,
    stacked: bool,
    device: torch.device | None = None,
    start: int = 0,
    stop: int | None = None,
    blocks: int = 1,
) -> Iterator[tuple[Place, Tensor]]:
    """One tensor of every source, piece by piece, as a rule is given it: in float32, or float64 where it is.

    Args:
        sources: mappings with the same names and shapes.
        name: the tensor.
        pieces: flat runs of entries, or whole rows.
        key: the key of the name.
        stacked: whether the sources are stacked, `(n, ...)`, or the only one given as it is.
        device: where the pieces are to be; by default where they are.
        start: flat index of the first entry, a multiple of `piece_size`.
        stop: flat index behind the last one.
        blocks: so many pieces at a time.
    """
    spec = specs_of(sources[0])[name]
    place = device or device_of(sources, name)
    # elsewhere than on the CPU blocks are long already, and several would take the memory that blocks are to save
    size = piece_size(spec, pieces, place) * (blocks if place.type in ("cpu", "meta") else 1)
    shape = (-1,) if pieces == "element" else (-1, *spec.shape[1:]) if spec.ndim > 1 else spec.shape
    wide = any(specs_of(source)[name].dtype == torch.float64 for source in sources)
    dtype = torch.float64 if wide else torch.float32
    # nothing to convert: calls that change nothing would cost more than the arithmetic
    plain = pieces == "element" and device is None and all(specs_of(s)[name].dtype == dtype for s in sources)
    for first, flats in read_blocks(sources, name, start, spec.numel() if stop is None else stop, size):
        own = flats if plain else [flat.to(device=device, dtype=dtype).reshape(shape) for flat in flats]
        yield Place(key, first), torch.stack(own) if stacked else own[0]


def device_of(sources: Sequence[dict[str, Tensor] | Lazy], name: str) -> torch.device:
    """Where one tensor of the sources lies.

    Raises:
        MismatchError: not all in one place.
    """
    devices = {source.device if isinstance(source, Lazy) else source[name].device for source in sources}
    if len(devices) > 1:
        places = ", ".join(sorted(str(device) for device in devices))
        raise MismatchError(f"{name!r} lies on {places}; say where to compute with device=, or move them with to()")
    return devices.pop()


def piece_size(spec: Tensor, pieces: Pieces, device: torch.device) -> int:
    """The number of entries in one piece: a block, or as many whole rows as fit in one (at least one), or all."""
    size = block_size(device)
    if pieces == "element":
        return size
    if pieces == "tensor":
        return max(1, spec.numel())
    row = row_length(spec)
    return max(1, size // row) * row


def row_length(x: Tensor) -> int:
    """Entries in one row: one slice along dim 0, or all of a tensor with fewer than two dimensions."""
    return max(1, x[0].numel() if x.ndim > 1 and x.shape[0] else x.numel())


def over(tensor: Tensor, at: Place = Place(), *, stacked: bool = True, pieces: Pieces = "element") -> Total:  # noqa: B008
    """The `Total` of a plain tensor, for a rule that was not handed its statistic: the tensor is its own globe.

    Args:
        tensor: `(n, *shape)`, or `(*shape)` if not stacked.
        at: the tensor's place.
        stacked: whether dim 0 counts vectors.
        pieces: the kind of blocks, as in `runs`.

    Example:
        >>> over(torch.ones(2, 3))(lambda block, at: block.sum(1))
        tensor([3., 3.])
    """
    sources: list[dict[str, Tensor] | Lazy] = [{"": x} for x in (tensor if stacked else [tensor])]
    return Total(sources, [""], pieces=pieces, stacked=stacked, keys={"": at.key})


def numbers_in(x: Tensor) -> list[float]:
    """The entries of a small `(m,)` tensor as Python numbers."""
    return [x[i].item() for i in range(len(x))]


def sum64(x: Tensor) -> Tensor:
    """The sum in float64, 0-d, over runs short enough that torch does not split them among threads.

    Raises:
        NonFiniteError: if it is NaN or inf; a `Total` adds the tensor's name.
    """
    flat = x.reshape(-1)
    total = flat.new_zeros((), dtype=torch.float64)
    step = block_size(flat.device)
    for start in range(0, len(flat), step):
        total += flat[start : start + step].sum(dtype=torch.float64)
    if not bool(total.isfinite()):
        raise NonFiniteError("NaN or inf: no statistic can be taken")
    return total


def signature_of(rule: Callable[..., Tensor]) -> inspect.Signature | None:
    """The signature of a rule, through partials; None for a callable that has none."""
    try:
        return inspect.signature(rule)
    except (TypeError, ValueError):
        return None
