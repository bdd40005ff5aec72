"""A progress bar on standard error; where that is not a terminal, a line now and then."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

WIDTH = 30  # of the bar, in characters
PAUSE = 20.0  # seconds between lines where there is no terminal


@contextmanager
def progress(title: str, total: int) -> Iterator[Callable[[], None]]:
    """Count to `total`: gives a function to be called once for every step done."""
    start, done, shown = time.monotonic(), 0, 0.0
    terminal = sys.stderr.isatty()

    def show(end: str) -> None:
        filled = WIDTH * done // max(total, 1)
        bar = f"[{'#' * filled}{'.' * (WIDTH - filled)}] " if terminal else ""
        line = f"{title:<22} {bar}{done}/{total}  {time.monotonic() - start:.0f} s"
        print(("\r" if terminal else "") + line, end=end, file=sys.stderr, flush=True)

    def step() -> None:
        nonlocal done, shown
        done += 1
        if time.monotonic() - max(shown, start) > (0.1 if terminal else PAUSE):
            shown = time.monotonic()
            show("" if terminal else "\n")

    try:
        yield step
    finally:
        show("\n")
