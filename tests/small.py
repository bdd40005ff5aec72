"""Small models and backdoor vectors, for tests of vector algebra."""

import torch

from taskvec import BackdoorVector


def weights(seed: int) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {"a": torch.randn(50, 40, generator=g), "b": torch.randn(40, generator=g), "n": torch.tensor(1)}


def bv(seed: int, size: float = 1.0) -> BackdoorVector:
    return BackdoorVector({name: t * size for name, t in weights(seed).items() if t.is_floating_point()})


def same(left, right) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in left)
