"""The driver: what runs statistics and results over blocks, on whatever does the work.

A task is a call of a module-level function for one chunk of one tensor: `_look` for a statistic, `_write` for a result.
"""

import hashlib
import pickle
from collections.abc import Callable, Container, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Executor
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple, TypeAlias, cast

import torch
from torch import Tensor
from typing_extensions import override

from ..errors import NonFiniteError, OptionError
from .buffers import give_back
from .pieces import Look, Pieces, Place, Statistic, chunk_size, piece_size, sampled, shaped, spans, stride_for
from .pools import Pool, Work, pool_of
from .random import key_of
from .sources import Foreign, Pull, Source
from .transfers import WORKERS

__all__ = [
    "Fill",
    "Stack",
    "block_of",
    "collect",
    "entries_of",
    "measure",
    "settle",
    "stream",
    "workers_of",
]

Span: TypeAlias = tuple[str, int, int]
"""The name of a tensor, and the flat entries of one chunk of it."""

Fill: TypeAlias = Callable[[Tensor], None]
"""Computes a chunk of a result into given memory, `(stop - start,)` of its dtype."""

Sink: TypeAlias = Callable[[str, int, int, Fill], Any]
"""Takes a chunk of a result: its name, the flat entries that it is, and what computes it."""

SHIPPED = 1 << 26
"""Bytes of a plan that may be sent to another process with every task: more are tensors, which belong into files."""

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
            pull.into(source, row)
        return shaped(stack, self.specs[pull.name], pieces)

    def wants(self, name: str) -> tuple[str, ...]:
        """The names over which statistics must be taken before a tensor can be computed, none if they are known."""
        del name
        return ()

    def passes(self, names: Sequence[str]) -> Generator[Look, list[Any], None]:
        """Take and keep the statistics over some names."""
        raise NotImplementedError

    def told(self, name: str) -> Any:
        """The statistics that a tensor needs, as far as they are known; None if it needs none."""
        del name
        return None

    def learn(self, name: str, known: Any) -> None:
        """Keep the statistics that another process has told."""
        raise NotImplementedError


class Run:
    """A source made ready to be read: equal parts are made one.

    Args:
        root: what is to be computed.
    """

    def __init__(self, root: Source) -> None:
        self.root = root
        self.same: dict[int, Source] = {}
        self._plan: bytes | None = None
        first: dict[Source, Source] = {}

        def visit(source: Source) -> None:
            if id(source) not in self.same:
                for part in source.sources:
                    visit(part)
                self.same[id(source)] = first.setdefault(source, source)

        visit(root)
        self.nodes = list(first.values())  # in the same order in every process
        self.number = {id(node): i for i, node in enumerate(self.nodes)}

    def pull(self, name: str, start: int, stop: int) -> Pull:
        """A pull of one chunk."""
        return Pull(self.same, name, (start, stop))

    def plan(self) -> bytes:
        """The root, pickled: what another process makes its own run from."""
        if self._plan is None:
            self._plan = _pickled(self.root)
        return self._plan

    def reached(self, source: Source, name: str) -> Iterable[tuple[Source, str]]:
        """Everything that one tensor of a source is made of, itself included, each once."""
        found: dict[tuple[int, str], tuple[Source, str]] = {}

        def visit(source: Source, name: str) -> None:
            source = self.same[id(source)]
            if (id(source), name) not in found:
                found[id(source), name] = source, name
                for part, own in source.parts(name):
                    visit(part, own)

        visit(source, name)
        return found.values()

    def known(self, source: Source, name: str) -> list[tuple[int, str, Any]]:
        """The statistics that are known of everything that one tensor of a source is made of."""
        stacks = [(part, own) for part, own in self.reached(source, name) if isinstance(part, Stack)]
        told = [(self.number[id(part)], own, part.told(own)) for part, own in stacks]
        return [one for one in told if one[2] is not None]

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
        with pool_of(1) as pool:
            pool.overlap(_statistics(run, stack, over) for stack, over in run.wanted([name]))
        return run.pull(name, start, stop)(source)


def collect(source: Source, names: Iterable[str]) -> dict[str, Tensor]:
    """Some tensors of a source, computed into new ones."""
    specs = {name: source.specs[name] for name in names}
    found = {
        name: torch.empty(spec.shape, dtype=spec.dtype, device=source.device(name)) for name, spec in specs.items()
    }
    flat = {name: x.reshape(-1) for name, x in found.items()}

    def keep(name: str, start: int, stop: int, fill: Fill) -> None:
        fill(flat[name][start:stop])

    stream(source, keep, list(specs))
    return found


def stream(
    source: Source,
    sink: Sink,
    names: Sequence[str],
    workers: int | None = None,
    *,
    executor: Executor | None = None,
    done: Container[Span] = (),
    heard: Callable[[Any], None] | None = None,
) -> None:
    """Compute some tensors of a source, chunk by chunk, each handed to a sink.

    Args:
        source: what is computed.
        sink: called once for every chunk; from several threads, if there are several workers; one that pickles, if
            there is an executor of processes.
        names: the tensors.
        workers: threads; by default as many as torch uses, where there is work for them.
        executor: does the work instead.
        done: chunks to leave out.
        heard: called in this thread with what the sink returned for each chunk, as it is finished.
    """
    run = Run(source)
    left = [name for name in names if any((name, *span) not in done for span in _chunks(run, name))]
    with pool_of(workers_of(run, left, workers), executor) as pool:
        _take_shared(run, pool, left)
        pool.overlap(_result(run, name, sink, done, heard) for name in left)


def settle(source: Source) -> None:
    """Take the statistics over several names, once, before a source is sent elsewhere."""
    run, names = Run(source), list(source.specs)
    with pool_of(workers_of(run, names, None)) as pool:
        _take_shared(run, pool, names)


def _take_shared(run: Run, pool: Pool, names: Sequence[str]) -> None:
    """Statistics over several names, and what they need, come first."""
    everywhere = list(run.wanted(names))
    shared = max((i + 1 for i, (_, over) in enumerate(everywhere) if len(over) > 1), default=0)
    for stack, over in everywhere[:shared]:
        pool.finish(_statistics(run, stack, over))


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

    with pool_of(workers_of(run, filled, None)) as pool:
        for inner, over in run.wanted(filled):
            pool.finish(_statistics(run, inner, over))
        pool.finish(_passes(run, stack, filled, kept()))
    return found[0]


# --- works and tasks -------------------------------------------------------------------------------------------------


class Task(NamedTuple):
    """A call of `f(run, *args)` that computes something of one tensor of a source."""

    f: Callable[..., Any]
    run: Run
    source: Source
    name: str
    args: tuple[Any, ...]
    heard: Callable[[Any], None] | None = None

    def __call__(self) -> Any:
        with torch.no_grad():  # a thread's own setting
            return self.f(self.run, *self.args)

    def shipped(self) -> tuple[Any, ...]:
        """The same for another process: the plan, and the statistics that are known."""
        return _elsewhere, self.run.plan(), self.run.known(self.source, self.name), self.f, self.args

    def landed(self, result: Any) -> None:
        """Pass the result on."""
        if self.heard is not None:
            self.heard(result)


def _chunks(run: Run, name: str) -> Iterator[tuple[int, int]]:
    """The chunks that a result is computed in."""
    return spans(0, run.root.specs[name].entries, chunk_size(block_of(run, name)))


def block_of(run: Run, name: str) -> int:
    """The length of the blocks that a result is computed in."""
    grain = run.root.grain(name)
    return max(1, piece_size(run.root.specs[name], "element", run.root.device(name)) // grain) * grain


def _result(run: Run, name: str, sink: Sink, done: Container[Span], heard: Callable[[Any], None] | None) -> Work:
    for stack, over in run.wanted([name]):
        yield from _statistics(run, stack, over)
    block = block_of(run, name)
    yield [
        Task(_write, run, run.root, name, (name, span, block, sink), heard)
        for span in _chunks(run, name)
        if (name, *span) not in done
    ]


def _write(run: Run, name: str, span: tuple[int, int], block: int, sink: Sink) -> Any:
    pull = run.pull(name, *span)

    def fill(out: Tensor) -> None:
        for start, stop in spans(*span, block):
            pull.at(start, stop).into(run.root, out[start - span[0] : stop - span[0]])
        give_back(pull.raw.values())

    return sink(name, *span, fill)


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
                yield Task(_look, run, stack, name, (run.number[id(stack)], name, runs, look))
            before += spec.entries
        else:
            for span in spans(0, spec.entries, chunk_size(max(1, grain // size) * size)):
                yield Task(_look, run, stack, name, (run.number[id(stack)], name, [span], look))


def _look(run: Run, number: int, name: str, runs: Sequence[tuple[int, int]], look: Look) -> list[Any]:
    stack, found = cast("Stack", run.nodes[number]), list[Any]()
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
        give_back(pull.raw.values())
    return found


# --- other processes -------------------------------------------------------------------------------------------------


def _pickled(root: Source) -> bytes:
    """A source as bytes; functions that have no module of their own need cloudpickle, which Dask brings along."""
    pickler: Any = import_module("cloudpickle") if find_spec("cloudpickle") else pickle
    try:
        plan = cast("bytes", pickler.dumps(root))
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise OptionError(
            f"executor= sends the work to other processes, and this cannot be sent: {error}; a rule must be a function "
            "of a module (or install cloudpickle), and the inputs must come from load()"
        ) from error
    if len(plan) > SHIPPED:
        raise OptionError(
            f"executor= sends the work to other processes, and {len(plan):,} bytes of it are tensors in memory; save() "
            "them first and load() them, so that every process reads its own part"
        )
    return plan


_RUNS: dict[bytes, Run] = {}
"""Of this process: the run that it was sent last, under the hash of its plan."""


def _received(plan: bytes) -> Run:
    digest = hashlib.sha256(plan).digest()
    run = _RUNS.get(digest)
    if run is None:
        run = Run(pickle.loads(plan))  # noqa: S301 - from the process that sent the task, which is a pickle itself
        _RUNS.clear()
        _RUNS[digest] = run
    return run


def _elsewhere(plan: bytes, known: list[tuple[int, str, Any]], f: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    """Do a task in another process, which gives torch one thread."""
    if torch.get_num_threads() != 1:
        torch.set_num_threads(1)
    run = _received(plan)
    for number, name, value in known:
        cast("Stack", run.nodes[number]).learn(name, value)
    with torch.no_grad():
        return f(run, *args)


def workers_of(run: Run, names: Sequence[str], wanted: int | None) -> int:
    """How many threads to use: one where torch, the caller's own function or the size leave no work for more."""
    nodes = set(run.same.values())
    devices = {run.root.device(name).type for name in names}
    if not devices <= {"cpu", "cuda"} or not all(map(_may_run_in_threads, nodes)):
        return 1
    entries = sum(run.root.specs[name].entries for name in names) * max(1, sum(not s.sources for s in nodes))
    if entries <= TINY:
        return 1
    return min(wanted or WORKERS, WORKERS) if "cuda" in devices else wanted or torch.get_num_threads()


def _may_run_in_threads(source: Source) -> bool:
    return not isinstance(source, Foreign) and getattr(source, "threads", True)
