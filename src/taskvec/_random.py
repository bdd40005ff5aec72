"""Random bits that depend on (seed, name, flat index) and on nothing else.

`torch.Generator` gives other numbers on other devices and for other block lengths; these bits are the same for every
device, sharding and order of work. They come from two rounds of the lowbias32 integer mixer (C. Wellons,
https://nullprogram.com/blog/2018/07/31/, public domain) with the key added between the rounds, in int32 arithmetic
that wraps around (torch has no arithmetic on uint32). They are for masks and ties, not for cryptography.
"""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

CHUNK = 1 << 15  # longer runs of indices are mixed chunk by chunk: the temporaries stay in the cache

_HALF = 1 << 31
_WORD = 1 << 32


def _signed(word: int) -> int:
    """The int32 with the same 32 bits."""
    word %= _WORD
    return word - _WORD if word >= _HALF else word


_M1, _M2 = _signed(0x7FEB352D), _signed(0x846CA68B)


def fold(seed: int, position: int) -> int:
    """A new seed from a seed and a position, such as the index of a vector in a stack.

    Args:
        seed: any integer.
        position: any integer.

    Returns:
        A seed in `[0, 2**63)`.

    Example:
        >>> fold(0, 1) == fold(0, 1), fold(0, 1) == fold(0, 2)
        (True, False)
    """
    digest = hashlib.blake2b(f"{seed}/{position}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def key_of(name: str) -> int:
    """The 64-bit key of a tensor's name."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


def _mix(x: Tensor) -> Tensor:
    """One round of lowbias32, in place, on int32."""
    x ^= (x >> 16) & 0xFFFF  # int32 shifts are arithmetic: mask the copies of the sign
    x *= _M1
    x ^= (x >> 15) & 0x1FFFF
    x *= _M2
    x ^= (x >> 16) & 0xFFFF
    return x


def random_bits(seed: int, key: int, start: int, count: int, device: torch.device) -> Tensor:
    """32 random bits for each of `count` flat indices from `start` on, as `(count,)` int32."""
    step = CHUNK if device.type == "cpu" else max(1, count)
    runs = [torch.arange(i, min(i + step, start + count), device=device) for i in range(start, start + count, step)]
    parts = [bits_at(seed, key, run) for run in runs]
    return (
        parts[0] if len(parts) == 1 else torch.cat(parts) if parts else torch.empty(0, dtype=torch.int32, device=device)
    )


def bits_at(seed: int, key: int, index: Tensor) -> Tensor:
    """32 random bits for each flat index of `(m,)` int64, as `(m,)` int32."""
    word = fold(seed, key)
    bits = _mix(index.to(torch.int32) ^ _signed(word))
    # beyond 2**32 entries the upper half of the index counts too; below, it is 0 and changes nothing
    if index.numel() and int(index[-1]) >> 32:
        bits ^= (index >> 32).to(torch.int32)
    bits += _signed(word >> 32)
    return _mix(bits)


def order_at(key: int, index: Tensor) -> Tensor:
    """A 63-bit random rank for each flat index of `(m,)`, ascending, as `(m,)` int64: who comes first among equals."""
    high, low = bits_at(1, key, index).to(torch.int64), bits_at(2, key, index).to(torch.int64)
    return ((high & 0x7FFFFFFF) << 32) | (low & 0xFFFFFFFF)


def bernoulli(bits: Tensor, probability: float) -> Tensor:
    """True with the given probability, from random int32 bits: an integer comparison, the same everywhere."""
    threshold = round(probability * _WORD) - _HALF
    return torch.ones_like(bits, dtype=torch.bool) if threshold >= _HALF else bits < threshold


def normal(seeds: Sequence[int], key: int, start: int, count: int, device: torch.device) -> Tensor:
    """Nearly normal float32 numbers of variance 1: sums of 16-bit uniforms (Irwin-Hall), two to a seed.

    No logarithm and no cosine: those differ in the last bit between devices and between the ends and the middles of
    blocks.
    """
    total = torch.zeros(count, dtype=torch.int32, device=device)
    for seed in seeds:
        bits = random_bits(seed, key, start, count, device)
        total += (bits & 0xFFFF) + ((bits >> 16) & 0xFFFF)
    terms = 2 * len(seeds)
    variance = terms * (2.0**32 - 1) / 12
    return (total - terms * 65535 / 2).to(torch.float32) / variance**0.5
