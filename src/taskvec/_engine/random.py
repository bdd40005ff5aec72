"""Random bits that depend on (seed, name, flat index) and on nothing else.

`torch.Generator` gives other numbers on other devices and for other block lengths; these bits are the same for every
device, sharding and order of work. They are the words of splitmix64 (Steele, Lea and Flood, Fast splittable
pseudorandom number generators, 2014), whose n-th state is a multiple of n: a counter, of which each step gives two
32-bit words. They are for masks and ties, not for cryptography.
"""

import hashlib
from collections.abc import Sequence
from functools import cache, lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["bernoulli", "fold", "key_of", "normal", "random_bits", "random_words"]

_STEP = 0x9E3779B97F4A7C15
_ROUNDS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
_LAST = 31
_HALF = 1 << 31
_WORD = 1 << 32
_PIECE = 1 << 15  # steps at a time: they stay in the cache, which makes it twice as fast


def fold(seed: int, position: int) -> int:
    """Derive a seed from a seed and a position, such as the index of a vector in a stack.

    Args:
        seed: any integer.
        position: any integer.

    Returns:
        A seed in `[0, 2**63)`.

    Examples:
        >>> fold(0, 1) == fold(0, 1), fold(0, 1) == fold(0, 2)
        (True, False)
    """
    digest = hashlib.blake2b(f"{seed}/{position}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@lru_cache(maxsize=1 << 16)
def key_of(name: str) -> int:
    """The 64-bit key of a tensor's name."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


def random_words(seed: int, key: int, start: int, count: int) -> Any:
    """32 random bits for each of `count` flat indices from `start` on, as a `(count,)` uint32 array on the CPU."""
    first, last = start // 2, -(-(start + count) // 2)
    words = np.empty(last - first, dtype=np.uint64)
    spare = np.empty(min(len(words), _PIECE), dtype=np.uint64)
    for begin in range(0, len(words), _PIECE):
        piece = words[begin : begin + _PIECE]
        other = spare[: len(piece)]
        np.add(_steps(_PIECE)[: len(piece)], np.uint64(_state(seed, key, first + begin)), out=piece)
        for shift, factor in _ROUNDS:
            np.right_shift(piece, np.uint64(shift), out=other)
            np.bitwise_xor(piece, other, out=piece)
            np.multiply(piece, np.uint64(factor), out=piece)
        np.right_shift(piece, np.uint64(_LAST), out=other)
        np.bitwise_xor(piece, other, out=piece)
    return words.view(np.uint32)[start - 2 * first : start - 2 * first + count]


def random_bits(seed: int, key: int, start: int, count: int, device: torch.device) -> Tensor:
    """The same words on any device, as `(count,)` int32."""
    if device.type == "cpu":
        return torch.from_numpy(random_words(seed, key, start, count).view(np.int32))  # pyright: ignore[reportUnknownMemberType]
    return _random_bits_anywhere(seed, key, start, count, device)


def _random_bits_anywhere(seed: int, key: int, start: int, count: int, device: torch.device) -> Tensor:
    """`random_bits` in torch's int64 arithmetic, which wraps around as uint64 does."""
    first, last = start // 2, -(-(start + count) // 2)
    words = torch.arange(last - first, device=device) * _signed(_STEP) + _signed(_state(seed, key, first))
    for shift, factor in _ROUNDS:
        words ^= (words >> shift) & ((1 << (64 - shift)) - 1)  # shifts of int64 copy the sign: mask it
        words *= _signed(factor)
    words ^= (words >> _LAST) & ((1 << (64 - _LAST)) - 1)
    return words.view(torch.int32)[start - 2 * first : start - 2 * first + count]


def _state(seed: int, key: int, step: int) -> int:
    """The generator's state at a step: any number for a seed and a name, and a multiple of the step further on."""
    return (_begin(seed, key) + (step + 1) * _STEP) % (1 << 64)


@lru_cache(maxsize=1 << 14)
def _begin(seed: int, key: int) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed}/{key}".encode(), digest_size=8).digest(), "little")


@cache
def _steps(count: int) -> Any:
    return np.arange(count, dtype=np.uint64) * np.uint64(_STEP)


def _signed(word: int) -> int:
    """The int64 with the same 64 bits."""
    return word - (1 << 64) if word >= 1 << 63 else word


def bernoulli(bits: Tensor, probability: float | Tensor) -> Tensor:
    """True with the given probability, from random int32 bits: an integer comparison, the same everywhere.

    Args:
        bits: any shape, int32.
        probability: one for all, or float64 that broadcasts to `bits`.
    """
    if isinstance(probability, Tensor):
        limits = (probability * _WORD).ceil().to(torch.int64) - _HALF
        always = limits >= _HALF
        found = _below(bits, limits.clamp(max=_HALF - 1).to(torch.int32))
        return found.logical_or_(always) if bool(always.any()) else found
    limit = round(probability * _WORD) - _HALF
    return torch.ones_like(bits, dtype=torch.bool) if limit >= _HALF else _below(bits, limit)


def _below(bits: Tensor, limits: Tensor | int) -> Tensor:
    if bits.device.type != "cpu":
        return bits < limits
    known = limits.numpy() if isinstance(limits, Tensor) else np.int32(limits)
    return torch.from_numpy(np.less(bits.numpy(), known))  # pyright: ignore[reportUnknownMemberType] - numpy is faster


def normal(seeds: Sequence[int], key: int, start: int, count: int, device: torch.device) -> Tensor:
    """Nearly normal float32 numbers of variance 1: sums of 16-bit uniforms (Irwin-Hall), two per seed.

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
