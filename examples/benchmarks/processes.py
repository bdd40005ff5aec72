"""Whole processes: how long they take, and the peak of their private memory.

Private memory is what a process has allocated (RssAnon in /proc/<pid>/status): pages of files that it maps or reads are
the system's cache, and are not counted. It is sampled every 20 ms, children included. Linux only; elsewhere it is None.
"""

import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Self

PROC = Path("/proc")
PAUSE = 0.02  # seconds between samples
TREE = 10  # samples between looks for new children, which cost more
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}


class Run(NamedTuple):
    """One process from start to exit: seconds, and the peak of its private memory in bytes."""

    seconds: float
    memory: int | None


def timed(command: Sequence[str], scratch: Path) -> Run:
    """Run a command and wait for it; what it prints is shown only where it fails.

    The disk first writes out what is waiting, so that no run pays for what another left.
    """
    if hasattr(os, "sync"):
        os.sync()
    with tempfile.TemporaryFile(dir=scratch) as told:
        start = time.perf_counter()
        process = subprocess.Popen(  # noqa: S603
            command, stdin=subprocess.DEVNULL, stdout=told, stderr=told, env=os.environ | OFFLINE
        )
        with PeakMemory(process.pid) as peak:
            code = process.wait()
            seconds = time.perf_counter() - start
        if code:
            told.seek(0)
            last = told.read().decode(errors="replace")[-3000:]
            sys.exit(f"{' '.join(command)}\nended with {code}; the last it printed was:\n{last}")
    return Run(seconds, peak.bytes)


class PeakMemory:
    """A context in which the memory of a process is sampled.

    Args:
        pid: of the process.
    """

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.bytes: int | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        samples, pids = 0, [self.pid]
        while not self._ended.wait(PAUSE):
            if samples % TREE == 0:
                pids = tree(self.pid)
            samples += 1
            found = [size for size in map(private, pids) if size is not None]
            if found:
                self.bytes = max(self.bytes or 0, sum(found))


def private(pid: int) -> int | None:
    """The private memory of a process in bytes, None where it cannot be read."""
    for line in _lines(PROC / str(pid) / "status"):
        if line.startswith("RssAnon:"):
            return 1024 * int(line.split()[1])
    return None


def tree(pid: int) -> list[int]:
    """A process, its children, their children, and so on."""
    children: dict[int, list[int]] = {}
    for path in PROC.glob("[0-9]*/stat"):
        for line in _lines(path):  # one: pid (name) state parent ...
            children.setdefault(int(line.rpartition(")")[2].split()[1]), []).append(int(path.parent.name))
    found = [pid]
    for known in found:
        found += children.get(known, [])
    return found


def _lines(path: Path) -> list[str]:
    """The lines of a file, none where the process has ended or the system has no such file."""
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
