"""How much memory a computation will take, known before it starts: a bound, from shapes and the parts of a result."""

from collections.abc import Iterator, Sequence
from math import ceil

import torch

from .lift import Ruled
from .pieces import BLOCK, chunk_size
from .run import Run, Stack, block_of, workers_of
from .select import FEW, HELD, SAMPLE, guessed_share
from .sources import Foreign, Memory, Source

__all__ = ["peak_bytes"]

FIXED = 48 << 20
"""Bytes of threads, of their stacks, and of what the allocator keeps, whatever is computed."""

LIVE = 3
"""Blocks of every vector that a rule holds at once, at most, beside its stack."""


def peak_bytes(source: Source, names: Sequence[str], workers: int) -> int:
    """A bound on the bytes that computing some tensors block by block takes beside what is in memory already.

    For each worker the chunks that it has read and the blocks that it computes from them, of the tensor that needs
    most; once the samples and keys of statistics.

    Args:
        source: what is computed.
        names: the tensors.
        workers: threads.
    """
    run = Run(source)
    largest = max((_of_task(run, name) for name in names), default=0)
    statistics = max(_of_statistics(run, names), default=0) + sum(_of_survivors(run))
    return FIXED + workers_of(run, names, workers) * largest + statistics


def _of_task(run: Run, name: str) -> int:
    """The bytes of one chunk's inputs and output, and of one block on its way through all that is computed of them."""
    entries, size = run.root.specs[name].entries, block_of(run, name)
    block, chunk = min(entries, size), min(entries, chunk_size(size))
    total = chunk * run.root.specs[name].dtype.itemsize
    for source, own in run.reached(run.root, name):
        width = 8 if source.specs[own].dtype == torch.float64 else 4
        if isinstance(source, Memory):
            continue
        if isinstance(source, Foreign):
            total += source.specs[own].bytes
        elif not source.sources:
            total += chunk * source.specs[own].dtype.itemsize
        elif isinstance(source, Stack):
            total += block * width * ((1 + LIVE) * len(source.sources) + 2)
        else:
            total += block * width * 2
    return total


def _of_statistics(run: Run, names: Sequence[str]) -> Iterator[int]:
    for source in run.nodes:
        if isinstance(source, Ruled) and any(map(source.wants, source.specs)):
            own = [source.specs[name].entries for name in source.specs]
            scope = own if source.options.scope == "global" else [max(own, default=0)]
            entries, blocks = sum(scope), sum(-(-count // BLOCK) for count in scope)
            sample = min(SAMPLE, ceil(entries ** (2 / 3)))
            held = max(min(HELD, entries), int(guessed_share(sample, entries) * entries)) + FEW * blocks
            overlapping = 1 if source.options.scope == "global" else min(len(names), 2)
            # of one vector at a time there are joined and sorted copies
            yield overlapping * (len(source.sources) + 2) * 8 * (sample + held)


def _of_survivors(run: Run) -> Iterator[int]:
    """A bit for every entry of two tensors, which a random drop that is measured keeps from one pass to the next."""
    for source in run.nodes:
        if isinstance(source, Ruled) and source.options.given.get("rescale") == "l1":
            sizes = sorted(spec.entries for spec in source.specs.values())
            yield len(source.sources) * sum(sizes[-2:]) // 8
