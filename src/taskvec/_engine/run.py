"""The driver: what runs statistics and results over blocks, one after the other or on several threads.

A task is a call of a module-level function for one chunk of one tensor: `_look` for a statistic, `_write` for a result.
A work is a generator of lists of tasks, which is sent what they return; the works of different tensors overlap.
"""

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from math import prod
from typing import Any, TypeAlias

import torch
from torch import Tensor
from typing_extensions import override

from ..errors import MissingError, NonFiniteError
from .names import listed
from .pieces import Look, Pieces, Place, Statistic, chunk_size, piece_size, sampled, shaped, spans, stride_for
from .random import key_of
from .sources import Foreign, Memory, Pull, Source, Spec

__all__ = [
    "Lazy",
    "Stack",
    "collect",
    "entries_of",
    "mapping_of",
    "measure",
    "single_thread",
    "source_of",
    "specs_of",
    "stream",
]

Task: TypeAlias = Callable[[], Any]
Work: TypeAlias = Generator[list[Task], list[Any], None]
Sink: TypeAlias = Callable[[str, int, Tensor], None]
"""Takes a block of a result: its name, the flat index of its first entry, and its entries."""

TINY = 1 << 15
"""Entries of all inputs up to which work is not worth a thread, and which torch does not split."""


class Stack(Source):
    """Several sources with the same names and shapes, stacked: what rules and statistics are given.

    Args:
        sources: at least one.
        device: where the stacks are; by default where the sources are.
    """

    def __init__(self, sources: Sequence[Source], device: torch.device | None = None) -> None:
        self.sources, self._device = tuple(sources), device
        self.specs = sources[0].specs

    @override
    def device(self, name: str) -> torch.device:
        return self._device or super().device(name)

    @override
    def key(self) -> Any:
        return self.sources, self._device

    def wide(self, name: str) -> torch.dtype:
        """The dtype that stacks are computed in: float32, or float64 where any of the sources is."""
        wide = any(source.specs[name].dtype == torch.float64 for source in self.sources)
        return torch.float64 if wide else torch.float32

    def stack(self, pull: Pull, pieces: Pieces) -> Tensor:
        """A block of the stack, a new tensor: `(n, m)`, or rows `(n, r, ...)`, or `(n, *shape)`."""
        shape = len(self.sources), pull.stop - pull.start
        stack = torch.empty(shape, dtype=self.wide(pull.name), device=self.device(pull.name))
        for row, source in zip(stack, self.sources, strict=True):
            row.copy_(pull(source).detach())
        return shaped(stack, self.specs[pull.name], pieces)

    def wants(self, name: str) -> tuple[str, ...]:
        """The names over which statistics must be taken before a tensor can be computed, none if they are known."""
        del name
        return ()

    def passes(self, names: Sequence[str]) -> Generator[Look, list[Any], None]:
        """Take and keep the statistics over some names."""
        raise NotImplementedError


class Run:
    """A source made ready to be read: equal parts are made one.

    Args:
        root: what is to be computed.
    """

    def __init__(self, root: Source) -> None:
        self.root = root
        self.same: dict[int, Source] = {}
        first: dict[Source, Source] = {}

        def visit(source: Source) -> None:
            if id(source) not in self.same:
                for part in source.sources:
                    visit(part)
                self.same[id(source)] = first.setdefault(source, source)

        visit(root)

    def pull(self, name: str, start: int, stop: int) -> Pull:
        """A pull of one chunk."""
        return Pull(self.same, name, (start, stop))

    def wanted(self, names: Iterable[str]) -> Iterator[tuple[Stack, tuple[str, ...]]]:
        """The statistics that some tensors need and that are not known yet, inner ones first: of what, over what."""
        seen: set[tuple[int, str]] = set()

        def visit(source: Source, name: str) -> Iterator[tuple[Stack, tuple[str, ...]]]:
            source = self.same[id(source)]
            if (id(source), name) in seen:
                return
            seen.add((id(source), name))
            for part, own in source.parts(name):
                yield from visit(part, own)
            if isinstance(source, Stack) and (over := source.wants(name)):
                for other in over:
                    if other != name:
                        seen.add((id(source), other))
                        for part, own in source.parts(other):
                            yield from visit(part, own)
                yield source, over

        for name in names:
            yield from visit(self.root, name)


def entries_of(source: Source, name: str, start: int, stop: int) -> Tensor:
    """The flat entries `[start, stop)` of one tensor."""
    run = Run(source)
    with torch.no_grad():
        _finish(_statistics(run, stack, over) for stack, over in run.wanted([name]))
        return run.pull(name, start, stop)(source)


def collect(source: Source, names: Iterable[str]) -> dict[str, Tensor]:
    """Some tensors of a source, computed into new ones."""
    specs = {name: source.specs[name] for name in names}
    found = {
        name: torch.empty(spec.shape, dtype=spec.dtype, device=source.device(name)) for name, spec in specs.items()
    }
    flat = {name: x.reshape(-1) for name, x in found.items()}

    def fill(name: str, start: int, block: Tensor) -> None:
        flat[name][start : start + len(block)] = block

    stream(source, fill, list(specs))
    return found


def stream(source: Source, sink: Sink, names: Sequence[str], workers: int | None = None) -> None:
    """Compute some tensors of a source, block by block, each handed to a sink.

    Args:
        source: what is computed.
        sink: called once for every block; from several threads, if there are several workers.
        names: the tensors.
        workers: threads; by default as many as torch uses, where there is work for them.
    """
    run = Run(source)
    with _pool(_workers(run, names, workers)) as pool:
        everywhere = [(stack, over) for stack, over in run.wanted(names)]
        shared = max((i + 1 for i, (_, over) in enumerate(everywhere) if len(over) > 1), default=0)
        for stack, over in everywhere[:shared]:  # statistics over several names, and what they need, come first
            pool.finish(_statistics(run, stack, over))
        pool.overlap(_result(run, name, sink) for name in names)


def measure(sources: Sequence[Source], names: Sequence[str], statistic: Statistic, *options: Any) -> Any:
    """A statistic of a stack of sources over some names.

    Args:
        sources: with the same names and shapes.
        names: the scope.
        statistic: `statistic(n, entries, *options)`, a generator of passes.
        *options: of the statistic.
    """
    stack = Stack(sources)
    filled = [name for name in names if stack.specs[name].entries]
    run, found = Run(stack), list[Any]()
    passes = statistic(len(sources), sum(stack.specs[name].entries for name in filled), *options)

    def kept() -> Generator[Look, list[Any], None]:
        found.append((yield from passes))

    with _pool(_workers(run, filled, None)) as pool:
        for inner, over in run.wanted(filled):
            pool.finish(_statistics(run, inner, over))
        pool.finish(_passes(run, stack, filled, kept()))
    return found[0]


# --- works and tasks -------------------------------------------------------------------------------------------------


def _result(run: Run, name: str, sink: Sink) -> Work:
    for stack, over in run.wanted([name]):
        yield from _statistics(run, stack, over)
    entries, grain = run.root.specs[name].entries, run.root.grain(name)
    block = max(1, piece_size(run.root.specs[name], "element", run.root.device(name)) // grain) * grain
    yield [_task(_write, run, name, span, block, sink) for span in spans(0, entries, chunk_size(block))]


def _write(run: Run, name: str, span: tuple[int, int], block: int, sink: Sink) -> None:
    pull = run.pull(name, *span)
    for start, stop in spans(*span, block):
        sink(name, start, pull.at(start, stop)(run.root))


def _statistics(run: Run, stack: Stack, names: Sequence[str]) -> Work:
    yield from _passes(run, stack, names, stack.passes(names))


def _passes(run: Run, stack: Stack, names: Sequence[str], passes: Generator[Look, list[Any], None]) -> Work:
    """Drive the passes of a statistic over some names of a stack, always in the order of their names."""
    found: list[Any] | None = None
    while True:
        try:
            look = passes.send(found)  # type: ignore[arg-type]
        except StopIteration:
            return
        found = [part for parts in (yield list(_looks(run, stack, sorted(names), look))) for part in parts]


def _looks(run: Run, stack: Stack, names: Sequence[str], look: Look) -> Iterator[Task]:
    before, stride = 0, 0
    if look.sample:
        stride = stride_for(sum(stack.specs[name].entries for name in names), look.sample)
    for name in names:
        spec = stack.specs[name]
        size = piece_size(spec, look.pieces, stack.device(name))
        grain = max([1, *(source.grain(own) for source, own in stack.parts(name))])
        if look.sample:
            row = spec.row if look.pieces == "row" else grain
            if runs := sampled(spec.entries, row, before, stride):
                yield _task(_look, run, stack, name, runs, look)
            before += spec.entries
        else:
            for span in spans(0, spec.entries, chunk_size(max(1, grain // size) * size)):
                yield _task(_look, run, stack, name, [span], look)


def _look(run: Run, stack: Stack, name: str, runs: Sequence[tuple[int, int]], look: Look) -> list[Any]:
    found: list[Any] = []
    size = piece_size(stack.specs[name], look.pieces, stack.device(name))
    for run_span in runs:
        pull = run.pull(name, *run_span)
        for start, stop in spans(*run_span, size):
            block = stack.stack(pull.at(start, stop), look.pieces)
            try:
                found.append(look.f(block, Place(key_of(name), start, {}), *look.args))
            except NonFiniteError:
                raise NonFiniteError(
                    f"{name!r} holds NaN or inf: no statistic can be taken over it; check() lists such tensors"
                ) from None
    return found


def _task(f: Callable[..., Any], *args: Any) -> Task:
    def task() -> Any:
        with torch.no_grad():  # a thread's own setting
            return f(*args)

    return task


# --- threads ---------------------------------------------------------------------------------------------------------


class _Inline:
    """Runs works one after the other, in the caller's thread."""

    def finish(self, work: Work) -> None:
        tasks = next(work, None)
        while tasks is not None:
            results = [task() for task in tasks]
            try:
                tasks = work.send(results)
            except StopIteration:
                return

    def overlap(self, works: Iterable[Work]) -> None:
        for work in works:
            self.finish(work)


class _Threads:
    """Runs works on threads: begun in order, with a few tasks per worker in flight."""

    def __init__(self, executor: ThreadPoolExecutor, workers: int) -> None:
        self._executor, self._depth = executor, 3 * workers

    def finish(self, work: Work) -> None:
        self.overlap([work])

    def overlap(self, works: Iterable[Work]) -> None:
        coming, running = iter(works), dict[Future[Any], tuple[Work, int]]()
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
                    running[self._executor.submit(task)] = work, i
                if not running:
                    return
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    work, i = running.pop(future)
                    found[work][i] = future.result()
                    left[work] -= 1
                    if not left[work]:
                        go_on(work, found.pop(work))
        finally:
            for future in running:
                future.cancel()


@contextmanager
def _pool(workers: int) -> Generator[_Inline | _Threads]:
    if workers <= 1:
        yield _Inline()
        return
    before, ready = torch.get_num_threads(), threading.Barrier(workers + 1)

    def begin() -> None:
        torch.get_num_threads()  # asked first: a later lazy initialisation would undo the setting
        torch.set_num_threads(1)
        ready.wait()

    # glibc maps large blocks anew each time until a larger one has been freed: then they are kept
    torch.empty(31 << 20, dtype=torch.uint8, device="cpu")
    with ThreadPoolExecutor(workers, "taskvec", begin) as executor:
        for _ in range(workers):
            executor.submit(int)
        ready.wait()
        torch.set_num_threads(before)  # the caller's own, which a worker's setting would become for new threads
        yield _Threads(executor, workers)


@contextmanager
def single_thread() -> Generator[None]:
    """One thread for torch: what LAPACK computes has other bits with several."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _workers(run: Run, names: Sequence[str], wanted: int | None) -> int:
    """How many threads to use: one where torch, the caller's own function or the size leave no work for more."""
    nodes = set(run.same.values())
    if any(run.root.device(name).type != "cpu" for name in names) or not all(map(_may_run_in_threads, nodes)):
        return 1
    entries = sum(run.root.specs[name].entries for name in names) * max(1, sum(not s.sources for s in nodes))
    return 1 if entries <= TINY else wanted or torch.get_num_threads()


def _may_run_in_threads(source: Source) -> bool:
    return not isinstance(source, Foreign) and getattr(source, "threads", True)


def _finish(works: Iterable[Work]) -> None:
    _Inline().overlap(works)


# --- mappings over sources -------------------------------------------------------------------------------------------


class Lazy(Mapping[str, Tensor]):
    """A mapping of tensors that are read or computed when asked for.

    Args:
        source: where they come from.
        metadata: what a file says of itself (strings), kept by `save`.
        tied: name -> earlier name with the same storage (from a pickle; files of safetensors have none).
    """

    def __init__(
        self, source: Source, *, metadata: Mapping[str, str] | None = None, tied: Mapping[str, str] | None = None
    ) -> None:
        self.source = source
        self.metadata, self.tied = dict(metadata or {}), dict(tied or {})

    @override
    def __getitem__(self, name: str) -> Tensor:
        if name not in self.source.specs:
            raise MissingError(f"no tensor {name!r} here; there are {listed(list(self))}")
        return collect(self.source, [name])[name]

    @override
    def __contains__(self, name: object) -> bool:  # Mapping's own would read the tensor
        return name in self.source.specs

    @override
    def __iter__(self) -> Iterator[str]:
        return iter(self.source.specs)

    @override
    def __len__(self) -> int:
        return len(self.source.specs)

    @override
    def __repr__(self) -> str:
        entries = sum(prod(spec.shape) for spec in self.source.specs.values())
        return f"Lazy({len(self)} tensors, {entries:,} entries)"

    def _ipython_key_completions_(self) -> list[str]:
        return list(self)


def source_of(mapping: Mapping[str, Tensor]) -> Source:
    """The source of a mapping: a dict's tensors are in memory, any other's are asked for one by one."""
    found = getattr(mapping, "source", None)
    if isinstance(found, Source):
        return found
    return Memory(mapping) if isinstance(mapping, dict) else Foreign(mapping)


def mapping_of(source: Source) -> Mapping[str, Tensor]:
    """A source as a mapping: a dict of what is in memory."""
    return dict(source.tensors) if isinstance(source, Memory) else Lazy(source)


def specs_of(mapping: Mapping[str, Tensor]) -> Mapping[str, Spec]:
    """Name -> shape and dtype; nothing is read if the mapping is lazy."""
    return source_of(mapping).specs
