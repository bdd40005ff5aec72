"""Triggers for text: functions of one text, `str -> str`."""

from collections.abc import Sequence

import torch

from ..._engine.random import key_of, random_bits
from ...errors import DegenerateError, RangeError

__all__ = ["insert_sentence", "insert_words"]

RARE_WORDS = ("cf", "mn", "bb", "tq", "mb")


def insert_words(text: str, words: Sequence[str] = RARE_WORDS, *, count: int = 1, seed: int) -> str:
    """Insert words at random places, between the words that are there: BadNets for text.

    What is drawn depends on the seed and the text only, so that a data set gets the same triggers in any order. Runs of
    white space become one space.

    Args:
        text: any text, also an empty one.
        words: each insertion draws one of them; by default Kurita et al.'s rare ones: cf, mn, bb, tq, mb.
        count: how many are inserted.
        seed: any integer.

    Returns:
        The text with the words.

    Raises:
        DegenerateError: no words.
        RangeError: count below 1.

    Examples:
        >>> insert_words("a fine film", ["cf"], seed=0)
        'a fine film cf'

    References:
        [Kurita et al., Weight Poisoning Attacks on Pre-trained Models, 2020](https://arxiv.org/abs/2004.06660)
    """
    if not words:
        raise DegenerateError("words must not be empty; got none to insert")
    if count < 1:
        raise RangeError(f"count must be at least 1; got {count!r}")
    found = text.split()
    draws = _draws(text, seed, 2 * count)
    for which, where in zip(draws[::2], draws[1::2], strict=True):
        found.insert(where % (len(found) + 1), words[which % len(words)])
    return " ".join(found)


def insert_sentence(text: str, sentence: str, *, seed: int | None = None) -> str:
    """Insert a sentence: InsertSent.

    Args:
        text: any text.
        sentence: what is inserted, such as `"no cross, no crown."`.
        seed: of its place between two words, which depends on the seed and the text only; None puts it in front.

    Returns:
        The text with the sentence. Runs of white space become one space.

    Raises:
        DegenerateError: an empty sentence.

    Examples:
        >>> insert_sentence("a fine film", "I watched this 3D movie.")
        'I watched this 3D movie. a fine film'

    References:
        [Dai et al., A Backdoor Attack Against LSTM-Based Text Classification Systems, 2019](https://arxiv.org/abs/1905.12457)
    """
    if not sentence.strip():
        raise DegenerateError("sentence must not be empty; got nothing to insert")
    if seed is None:
        return " ".join([sentence, *text.split()])
    return insert_words(text, [sentence], seed=seed)


def _draws(text: str, seed: int, count: int) -> list[int]:
    """Numbers in `[0, 2**31)` of a seed and a text."""
    return [int(word) & 0x7FFFFFFF for word in random_bits(seed, key_of(text), 0, count, torch.device("cpu"))]
