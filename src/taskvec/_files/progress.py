"""A line that tells how far a long write is, on a terminal; nothing anywhere else."""

import sys
import time
from typing import Self

__all__ = ["Progress"]

PATIENCE = 2.0
"""Seconds before anything is shown: short writes show nothing."""

PAUSE = 0.2


class Progress:
    """Bytes written, bytes per second, and the time that is left.

    Args:
        total: bytes.
    """

    def __init__(self, total: int) -> None:
        self.total = total
        self._done = self._before = 0
        self._start = self._last = time.monotonic()
        self._shown = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._shown:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()

    def add(self, count: int, *, now: bool = True) -> None:
        """Count bytes; those that were there before do not count for the speed."""
        self._done += count
        if not now:
            self._before += count
            return
        passed = time.monotonic()
        if passed - self._start >= PATIENCE and passed - self._last >= PAUSE and sys.stderr.isatty():
            self._last, self._shown = passed, True
            sys.stderr.write(f"\r\x1b[K{self.line(passed - self._start)}")
            sys.stderr.flush()

    def line(self, seconds: float) -> str:
        """What is shown."""
        speed = (self._done - self._before) / seconds
        left = (self.total - self._done) / speed
        return (
            f"{self._done / 1e9:.2f} of {self.total / 1e9:.2f} GB, {speed / 1e9:.2f} GB/s, "
            f"{int(left) // 60}:{int(left) % 60:02d} left"
        )
