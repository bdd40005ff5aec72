"""Seven small image tasks, split the same way for everybody.

A task has three parts. The *pool* is for training, *validation* (the last 500 rows of the file's train split, never
trained on) is for every choice, and *test* is read once, when all choices are made: that is why it has a function of
its own and does not come with the rest.
"""

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

FILE = Path(__file__).parents[2] / "data" / "vision.npz"
TASKS = ("mnist", "fashion", "animal", "glyph_latin", "glyph_greek")
PRETRAINING = ("glyph_lower", "glyph_cyrillic")
CLASSES = {
    "mnist": tuple("0123456789"),
    "fashion": ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot"),
    "animal": ("bear", "bird", "cat", "cow", "dog", "elephant", "giraffe", "horse", "sheep", "zebra"),
    "glyph_latin": tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ"),
    "glyph_greek": tuple("αβγδεζηθικλμνξοπρστυφχψω"),
}
VALIDATION = 500


class Split(NamedTuple):
    """Images (n, 1, 28, 28), floats in [0, 1], and their labels (n,)."""

    images: Tensor
    labels: Tensor

    def take(self, rows: Tensor | slice) -> "Split":
        """The given rows, as a Split."""
        return Split(self.images[rows], self.labels[rows])


@cache
def _read(task: str, part: str) -> Split:
    with np.load(FILE) as file:
        images, labels = file[f"{task}_{part}_images"], file[f"{task}_{part}_labels"]
    return Split(torch.from_numpy(images).float().div(255).unsqueeze(1), torch.from_numpy(labels).long())


def pool(task: str) -> Split:
    """The rows to train on: the train split but for its last 500."""
    return _read(task, "train").take(slice(None, -VALIDATION))


def validation(task: str, limit: int | None = None) -> Split:
    """The 500 rows that choices are made on, or `limit` of them, spread evenly."""
    rows = _read(task, "train").take(slice(-VALIDATION, None))
    return rows if limit is None else rows.take(slice(None, None, VALIDATION // limit)).take(slice(limit))


def test(task: str) -> Split:
    """The rows to read once, at the end."""
    return _read(task, "test")


def halves(split: Split, seed: int) -> tuple[Split, Split]:
    """Two disjoint random halves: one for whoever attacks, one for whoever defends."""
    order = torch.randperm(len(split.labels), generator=torch.Generator().manual_seed(seed))
    middle = len(order) // 2
    return split.take(order[:middle]), split.take(order[middle:])


def few_shot(split: Split, shots: int, seed: int) -> Split:
    """`shots` random rows of each class, in the order of the classes: (classes * shots) rows."""
    order = torch.randperm(len(split.labels), generator=torch.Generator().manual_seed(seed))
    labels = split.labels[order]
    return split.take(torch.cat([order[labels == c][:shots] for c in range(int(labels.max()) + 1)]))


def joined(tasks: tuple[str, ...]) -> Split:
    """The pools of several tasks as one, every class with a number of its own."""
    pools = [pool(task) for task in tasks]
    offsets = np.cumsum([0] + [int(p.labels.max()) + 1 for p in pools])
    labels = [p.labels + int(offset) for p, offset in zip(pools, offsets, strict=False)]
    return Split(torch.cat([p.images for p in pools]), torch.cat(labels))


def batches(split: Split, size: int, seed: int) -> Iterator[Split]:
    """Batches without end: every epoch is a new permutation, its incomplete last batch is dropped."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(split.labels), generator=generator)
        for rows in order.split(size):
            if len(rows) == size:
                yield split.take(rows)
