"""What survives a random drop whose size is measured first: kept as bits, so that nothing is drawn twice."""

from typing import Any, NamedTuple

import numpy as np
from torch import Tensor
from typing_extensions import override

from .pieces import Place
from .select import as_tensor, masked
from .totals import sum64

__all__ = ["Measured", "Part", "part_of"]


class Measured:
    """What the first pass over a random drop tells the second: by what to multiply, and which entries survived.

    The survivors are bits, by piece, each told once. Another process is told none of them, and draws again.
    """

    def __init__(self, factor: float, bits: dict[int, tuple[int, Any]]) -> None:
        self.factor = factor
        self._bits = bits

    def mask(self, x: Tensor, at: Place) -> Tensor | None:
        """True where an entry of a piece survived; None where that is not known (any more)."""
        count, bits = self._bits.pop(at.start, (-1, None))
        return None if count != x.numel() else as_tensor(np.unpackbits(bits, count=count).view(bool)).reshape(x.shape)

    @override
    def __reduce__(self) -> Any:
        return Measured, (self.factor, {})


class Part(NamedTuple):
    """Of one piece of one vector: L1 norms before and after a random drop, and the survivors as bits."""

    before: float
    after: float
    bits: dict[int, tuple[int, Any]]

    @override
    def __reduce__(self) -> Any:
        return Part, (self.before, self.after, {})


def part_of(x: Tensor, mask: Tensor, at: Place) -> Part:
    """What a piece of a vector and the mask of its random drop give."""
    sizes = x.detach().abs()
    before, after = (float(sum64(y)) for y in (sizes, masked(sizes, mask)))
    bits = {at.start: (x.numel(), np.packbits(mask.numpy()))} if x.device.type == "cpu" else {}
    return Part(before, after, bits)
