"""Small models and backdoor vectors, and mappings that look like checkpoints on disk, for tests of vector algebra."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from taskvec import BackdoorVector
from taskvec._engine.lazy import Lazy
from taskvec._engine.sources import Pull, Source, Spec


def weights(seed: int) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {"a": torch.randn(50, 40, generator=g), "b": torch.randn(40, generator=g), "n": torch.tensor(1)}


def bv(seed: int, size: float = 1.0) -> BackdoorVector:
    return BackdoorVector({name: t * size for name, t in weights(seed).items() if t.is_floating_point()})


def same(left, right) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in left)


class Read(Source):
    """Tensors that a function reads: `reader(name, start, stop)`."""

    def __init__(self, specs: Mapping[str, Spec], reader: Callable[[str, int, int], Tensor]) -> None:
        self.specs, self.reader = dict(specs), reader

    def block(self, pull: Pull) -> Tensor:
        return self.reader(pull.name, pull.start, pull.stop)

    def device(self, name: str) -> torch.device:
        return torch.device("cpu")

    def key(self) -> int:
        return id(self)


class Held:
    """A reader of tensors that are in memory; it counts its calls."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors, self.reads = dict(tensors), 0

    def __call__(self, name: str, start: int, stop: int) -> Tensor:
        self.reads += 1
        return self.tensors[name].reshape(-1)[start:stop]


def lazy(tensors: Mapping[str, Tensor], reader: Callable[[str, int, int], Tensor] | None = None) -> Lazy:
    """What a checkpoint on disk looks like."""
    specs = {name: Spec(tuple(x.shape), x.dtype) for name, x in tensors.items()}
    return Lazy(Read(specs, reader or Held(tensors)))
