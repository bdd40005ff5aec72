"""Who does the work: the caller's thread, threads of our own, or an executor of the user's, perhaps on other machines.

A work is a generator of lists of tasks, which is sent what they return; the works of different tensors overlap.
"""

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import cache
from typing import Any, Protocol, TypeAlias

import torch

__all__ = ["Pool", "Task", "Work", "pool_of", "single_thread"]


class Task(Protocol):
    """A piece of work: done here by calling it, elsewhere by what `shipped` gives."""

    def __call__(self) -> Any:
        """Do it."""
        ...

    def shipped(self) -> tuple[Any, ...]:
        """A module-level function and its arguments, all of which pickle: the same work in another process."""
        ...

    def landed(self, result: Any) -> None:
        """Hear what it returned, in the caller's thread."""
        ...


Work: TypeAlias = Generator[list[Any], list[Any], None]
"""Yields lists of tasks."""


class Pool(Protocol):
    """Runs works."""

    def finish(self, work: Work) -> None:
        """Run one work to its end."""
        ...

    def overlap(self, works: Iterable[Work]) -> None:
        """Run works, begun in order; several may be under way."""
        ...


class _Inline:
    """Runs works one after the other, in the caller's thread."""

    def finish(self, work: Work) -> None:
        tasks = next(work, None)
        while tasks is not None:
            try:
                tasks = work.send([_done(task) for task in tasks])
            except StopIteration:
                return

    def overlap(self, works: Iterable[Work]) -> None:
        for work in works:
            self.finish(work)


def _done(task: Task) -> Any:
    result = task()
    task.landed(result)
    return result


class _Submitting:
    """Runs works through `submit`: begun in order, with so many tasks in flight."""

    def __init__(self, submit: Callable[[Task], Future[Any]], depth: int) -> None:
        self._submit, self._depth = submit, depth

    def finish(self, work: Work) -> None:
        self.overlap([work])

    def overlap(self, works: Iterable[Work]) -> None:
        coming, running = iter(works), dict[Future[Any], tuple[Work, int, Task]]()
        waiting, found, left = deque[tuple[Work, int, Task]](), dict[Work, list[Any]](), dict[Work, int]()

        def go_on(work: Work, results: list[Any] | None) -> None:
            """Send a work its results and queue the tasks that it asks for next."""
            tasks: list[Task] = []
            while not tasks:
                try:
                    tasks = work.send(results)  # type: ignore[arg-type]
                except StopIteration:
                    return
                results = []
            found[work], left[work] = [None] * len(tasks), len(tasks)
            waiting.extend((work, i, task) for i, task in enumerate(tasks))

        try:
            while True:
                while len(waiting) + len(running) < self._depth and (work := next(coming, None)) is not None:
                    go_on(work, None)
                while waiting and len(running) < self._depth:
                    work, i, task = waiting.popleft()
                    running[self._submit(task)] = work, i, task
                if not running:
                    return
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    work, i, task = running.pop(future)
                    found[work][i] = future.result()
                    task.landed(found[work][i])
                    left[work] -= 1
                    if not left[work]:
                        go_on(work, found.pop(work))
        finally:
            for future in running:
                future.cancel()
            wait(running)  # what has begun still writes


@contextmanager
def pool_of(workers: int, executor: Executor | None = None) -> Generator[Pool]:
    """Something that runs works.

    Args:
        workers: threads; with one, the caller's own does it all.
        executor: runs the tasks instead; one of threads works in this process, any other is sent what pickles.
    """
    if executor is not None:
        with _one_thread_each() as alone:
            here = isinstance(executor, ThreadPoolExecutor)
            # more than its workers can hold: an executor on a cluster does not say how many it has
            depth = max(64, 3 * workers)
            yield _Submitting(
                (lambda task: executor.submit(alone, task)) if here else lambda task: executor.submit(*task.shipped()),
                depth,
            )
    elif workers <= 1:
        _keep_freed_memory()
        yield _Inline()
    else:
        _keep_freed_memory()
        with _threads(workers) as threads:
            yield _Submitting(threads.submit, 3 * workers)


@cache
def _keep_freed_memory() -> None:
    """Free one large block: glibc maps large ones anew each time until a larger one has been freed; then it keeps them.

    Fresh memory costs more than what is computed in it.
    """
    torch.empty(31 << 20, dtype=torch.uint8, device="cpu")


def _one_thread() -> None:
    """Give torch one thread in the thread that calls this."""
    torch.get_num_threads()  # asked first: a later lazy initialisation would undo the setting
    torch.set_num_threads(1)


@contextmanager
def _threads(workers: int) -> Generator[ThreadPoolExecutor]:
    before, ready = torch.get_num_threads(), threading.Barrier(workers + 1)

    def begin() -> None:
        _one_thread()
        ready.wait()

    try:
        with ThreadPoolExecutor(workers, "taskvec", begin) as executor:
            for _ in range(workers):
                executor.submit(int)
            ready.wait()
            torch.set_num_threads(before)  # the caller's own, which a worker's setting would become for new threads
            yield executor
    finally:
        torch.set_num_threads(before)  # and what `single_thread` has set in a worker


@contextmanager
def _one_thread_each() -> Generator[Callable[[Task], Any]]:
    """A way to do a task in a thread of somebody else's, with one thread of torch's; the caller's own are restored."""
    before = torch.get_num_threads()

    def alone(task: Task) -> Any:
        _one_thread()
        return task()

    try:
        yield alone
    finally:
        torch.set_num_threads(before)


@contextmanager
def single_thread() -> Generator[None]:
    """One thread for torch: sums, and what LAPACK computes, have other bits with several."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
