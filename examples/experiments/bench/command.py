"""What the examples' command lines have in common."""

import argparse
import os
from collections.abc import Callable, Sequence
from typing import TypeVar

from . import data
from .progress import progress
from .zoo import workforce

T = TypeVar("T")


def options(doc: str, seeds: Sequence[int], quick: str = "one seed, nothing written") -> argparse.ArgumentParser:
    """A parser that knows --quick, --seeds and --workers, described by a docstring's first line."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--seeds", type=int, nargs="+", default=seeds)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    return parser


def suite_options(doc: str, seeds: Sequence[int]) -> argparse.ArgumentParser:
    """The same, with the encoder and the task of one part of the suite."""
    parser = options(doc, seeds)
    parser.add_argument("--encoder", choices=["vits", "vit7", "cnn"], default="vits")
    parser.add_argument("--task", choices=data.TASKS, default="mnist")
    return parser


def can_redraw(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """The same parser, which knows --redraw too."""
    parser.add_argument("--redraw", action="store_true", help="draw the pictures from the kept rows, measure nothing")
    return parser


def by_seed(of_seed: Callable[[int], T], seeds: Sequence[int], workers: int) -> dict[int, T]:
    """A function of every seed, in so many processes, and how it goes."""
    found = {}
    with workforce(workers) as pool, progress("seeds", len(seeds)) as step:
        for seed, row in zip(seeds, pool.map(of_seed, seeds), strict=True):
            found[seed] = row
            step()
    return found
