"""Kill a save at every call to the system that it makes, and see what is left: does resume=True always complete it?

    python tests/kills.py            # every call of every case, about a minute

A process forks children (importing torch anew would take longer than the save); a child replaces the calls of `os` by
ones that count, and kills itself before the one whose turn it is.
"""

import os
import random
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from taskvec import TaskVector, load, merge, save
from taskvec._files import partial
from taskvec.merges import ties

CALLS = (
    *("pwrite", "write", "fsync", "replace", "rename", "unlink", "rmdir", "mkdir", "link", "posix_fallocate", "chmod"),
)
TENSORS = 24
KEPT = tempfile.TemporaryDirectory()
INPUTS = Path(KEPT.name)


class Case(NamedTuple):
    """What is saved where.

    Attributes:
        name: of the target.
        there: whether an older model is there.
        exchange: whether the system can exchange two names in one step.
    """

    name: str
    there: bool
    exchange: bool = True


CASES = (
    Case("out", there=False),
    Case("out", there=True),
    Case("out.safetensors", there=False),
    Case("out.safetensors", there=True),
    Case("out", there=True, exchange=False),
    Case("out.safetensors", there=False, exchange=False),
)


def model(seed: int) -> dict[str, torch.Tensor]:
    """A model of several tensors."""
    random_numbers = torch.Generator().manual_seed(seed)
    return {f"w{i:02d}": torch.randn(40, 30, generator=random_numbers) for i in range(TENSORS)}


def saved(folder: Path, case: Case) -> None:
    """Merge two models on disk into a third, as a user would."""
    base, *tuned = (load(INPUTS / str(i)) for i in range(3))
    vectors = [TaskVector.between(base, model) for model in tuned]
    merged = merge(vectors, ties, density=0.3, scope="tensor").apply(base)
    shards = {} if case.name.endswith(".safetensors") else {"max_shard_size": 30_000}
    save(merged, folder / "place" / case.name, overwrite=case.there, resume=True, **shards)


def counting(at: int, log: Path) -> None:
    """Count the calls to the system from now on; before the one with the number `at`, die."""
    count = [0]

    def watched(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def instead(*args: Any, **kwargs: Any) -> Any:
            if name == "write" and not (isinstance(args[1], bytes) and args[1].startswith(b'["')):
                return call(*args, **kwargs)  # not the journal
            count[0] += 1
            if count[0] == at:
                os.kill(os.getpid(), signal.SIGKILL)
            with log.open("a") as file:
                file.write(f"{name}\n")
            return call(*args, **kwargs)

        return instead

    for name in CALLS:
        setattr(os, name, watched(name, getattr(os, name)))
    partial._renameat2 = watched("renameat2", partial._renameat2)


def child(work: Callable[[], None]) -> int:
    """Do some work in a process of its own: its exit status, or minus the signal that ended it."""
    if pid := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    try:
        work()
    except BaseException as error:  # noqa: BLE001 - told by the status
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        os._exit(1)
    os._exit(0)


def prepared(folder: Path, case: Case) -> None:
    """The inputs, if they are not there yet, and the older model."""
    for i in range(3):
        if not (INPUTS / str(i)).exists():
            save(model(i), INPUTS / str(i))
    if case.there:
        older(folder / "place" / case.name)


def older(target: Path) -> None:
    """A model that is to be replaced, with something beside it that is to stay."""
    save({name: x * 0 for name, x in model(0).items()}, target, overwrite=target.exists())
    if target.is_dir():
        (target / "notes.txt").write_text("mine")


def calls_of(case: Case) -> list[str]:
    """The calls that a save makes which nothing disturbs."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        start(folder, case)

        def work() -> None:
            without_exchange(case)
            counting(-1, folder / "log")
            saved(folder, case)

        assert child(work) == 0
        return (folder / "log").read_text().split()


def start(folder: Path, case: Case) -> None:
    """Everything that is there before."""
    (folder / "place").mkdir()
    assert child(lambda: prepared(folder, case)) == 0


def without_exchange(case: Case) -> None:
    """Make this process one of a system that cannot exchange names."""
    if not case.exchange:
        partial._renameat2 = lambda *_: False


def killed(case: Case, at: int) -> str:
    """Kill a save before a call, look at what is left, and resume it.

    Returns:
        What is wrong, or nothing.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        start(folder, case)
        target = folder / "place" / case.name

        def work() -> None:
            without_exchange(case)
            counting(at, folder / "log")
            saved(folder, case)

        status = child(work)
        if status not in (0, -signal.SIGKILL):
            return f"the save ended with {status}"
        if case.there and case.exchange and not target.exists():
            return "the target is missing"
        if target.exists() and child(lambda: whole(target, case)) != 0:
            return "the target is half-written"

        def again() -> None:
            without_exchange(case)
            saved(folder, case)
            compare(target)
            beside = sorted(path.name for path in (folder / "place").iterdir())
            assert beside == [case.name], f"left behind: {beside}"

        return "" if child(again) == 0 else "resume did not complete it"


def whole(target: Path, case: Case) -> None:
    """The target is the old model or the new one, and what is beside the weights is there."""
    found = load(target)
    old = all(not x.any() for x in found.values())
    assert len(found) == TENSORS
    assert old or all(x.any() for x in found.values())
    if case.there and target.is_dir():
        assert (target / "notes.txt").read_text() == "mine"


def compare(target: Path) -> None:
    """The bits are those of a merge in memory."""
    base, *tuned = (model(i) for i in range(3))
    vectors = [TaskVector.between(base, model) for model in tuned]
    expected = merge(vectors, ties, density=0.3, scope="tensor").apply(base)
    found = load(target)
    assert all(torch.equal(found[name], x) for name, x in expected.items())


def sampled(calls: list[str], writes: int) -> list[int]:
    """Numbers of calls: every one that writes no tensor and no line of the journal, and some of those that do."""
    busy = [i for i, name in enumerate(calls, 1) if name in ("pwrite", "write")]
    chosen = random.Random(0).sample(busy, min(writes, len(busy)))
    return sorted({*chosen, *(i for i in range(1, len(calls) + 1) if i not in busy)})


def main() -> None:
    torch.set_num_threads(1)
    wrong = 0
    for case in CASES:
        calls = calls_of(case)
        found = [killed(case, at) for at in range(1, len(calls) + 1)]
        bad = [f"{i} ({calls[i - 1]}): {what}" for i, what in enumerate(found, 1) if what]
        wrong += len(bad)
        kinds = ", ".join(f"{count} {name}" for name, count in Counter(calls).items())
        print(f"{case}: {len(found)} kills ({kinds}); {len(bad)} wrong {bad[:5]}")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
