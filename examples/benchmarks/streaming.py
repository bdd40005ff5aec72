"""How long it takes to merge checkpoints from disk to disk, and how much memory: taskvec, and mergekit beside it.

    python examples/benchmarks/streaming.py [--mergekit ENV/bin/mergekit-yaml] [--methods ties linear] [--repeats 3]
    python examples/benchmarks/streaming.py --growth [--methods ties]      # time by size: 2, 5, 10 and 20 layers

The models are a synthetic base and four fine-tunes with the shape of a Llama (see `synthetic`): 601,683,456 parameters
in bfloat16, 1.2 GB each, at the default of 20 layers. They are made once and kept in --folder; remove it afterwards.

Whole processes are timed, from start to exit, imports included, in turn: ours, theirs, ours, theirs. Both do the same
with the same options (see `methods`), and write shards of 300 MB. Before each run the disk writes out what is waiting,
so that no run pays for another; what a run itself leaves waiting is not counted, and taskvec leaves nothing. The first
pair is not counted. "Times as fast" is the median of the ratios pair by pair. Memory is the peak of the private memory
(see `processes`). The last row is the floor: all inputs read once (`cat`) and one model copied (`cp`).

mergekit takes differences in the dtype of its inputs unless --mergekit-float32 is given; taskvec always in float32.
The second table says how many entries of the output are the exact result, computed in float64 and rounded to bfloat16.

mergekit needs an environment of its own: `python -m venv ENV && ENV/bin/pip install mergekit==0.1.5`. Without it only
taskvec is timed. Run it on an idle machine whose memory holds all models (7 GB at 20 layers): it times programs, not
the disk.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, Self

sys.path.insert(0, str(Path(__file__).parents[1] / "experiments"))
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from matplotlib.figure import Figure
from torch import Tensor

import taskvec
from bench.progress import progress
from bench.report import text_table
from benchmarks.methods import METHODS, SHARDS, Method
from benchmarks.processes import Run, timed
from benchmarks.synthetic import Shape, make_set, shortage
from taskvec import load

FOLDER = Path("~/.cache/taskvec-bench").expanduser()
GROWTH = (2, 5, 10, 20)  # layers
NONE = "-"


class Found(NamedTuple):
    """What the runs of one method gave.

    Args:
        ours: with taskvec, run by run.
        theirs: with mergekit; empty where it was not timed.
        exact: the fraction of correctly rounded entries, by program.
    """

    ours: list[Run]
    theirs: list[Run]
    exact: dict[str, float]

    @classmethod
    def nothing(cls) -> Self:
        return cls([], [], {})


class Bench(NamedTuple):
    """What all runs have in common."""

    paths: Sequence[Path]
    workers: int
    mergekit: Path | None = None
    float32: bool = False


# --- one process -----------------------------------------------------------------------------------------------------


def run_ours(name: str, bench: Bench, scratch: Path) -> Run:
    script = str(Path(__file__).with_name("methods.py"))
    folder, output = str(bench.paths[0].parent), str(scratch / "ours")
    return timed([sys.executable, script, name, folder, output, "--workers", str(bench.workers)], scratch)


def run_theirs(method: Method, bench: Bench, scratch: Path) -> Run:
    assert method.theirs is not None
    dtype = {"dtype": "float32", "out_dtype": "bfloat16"} if bench.float32 else {}
    settings = scratch / "settings.yaml"
    settings.write_text(json.dumps(method.theirs(bench.paths) | dtype))  # JSON is YAML
    quietly = ["--no-copy-tokenizer", "--no-write-model-card", "--quiet", "--random-seed", "0"]
    command = [str(bench.mergekit), str(settings), str(scratch / "theirs"), "--out-shard-size", str(SHARDS), *quietly]
    return timed(command, scratch)


def floors(bench: Bench) -> list[Run]:
    """One run that reads all models and copies one; none where the system has no shell."""
    if shutil.which("sh") is None:
        return []
    inputs = [str(file) for path in bench.paths for file in sorted(path.glob("*.safetensors"))]
    script = 'out="$1"; shift; one="$1"; shift; cat "$@" > /dev/null; cp -r "$one" "$out"'
    with tempfile.TemporaryDirectory(dir=bench.paths[0].parent) as scratch:
        command = ["sh", "-c", script, "sh", f"{scratch}/copy", str(bench.paths[0]), *inputs]
        return [timed(command, Path(scratch))]


# --- the comparison --------------------------------------------------------------------------------------------------


def pair(name: str, bench: Bench, found: Found) -> None:
    """Run one method with both programs, and keep what they took."""
    method = METHODS[name]
    with tempfile.TemporaryDirectory(dir=bench.paths[0].parent) as folder:
        scratch = Path(folder)
        found.ours.append(run_ours(name, bench, scratch))
        count_exact(method, bench, scratch / "ours", found)
    if bench.mergekit is None or method.theirs is None:
        return
    with tempfile.TemporaryDirectory(dir=bench.paths[0].parent) as folder:
        scratch = Path(folder)
        found.theirs.append(run_theirs(method, bench, scratch))
        count_exact(method, bench, scratch / "theirs", found)


def count_exact(method: Method, bench: Bench, output: Path, found: Found) -> None:
    """The fraction of correctly rounded entries in two matrices of an output, once for each program."""
    if method.exact is None or output.name in found.exact:
        return
    merged, (base, *tuned) = load(output), map(load, bench.paths)
    names = [name for name in base if name.endswith(("q_proj.weight", "down_proj.weight"))]
    right = [
        exactly(merged[name], method.exact(base[name].double(), [t[name].double() for t in tuned]))
        for name in (names[0], names[-1])
    ]
    found.exact[output.name] = torch.cat(right).double().mean().item()


def exactly(merged: Tensor, exact: Tensor) -> Tensor:
    """Which entries are the float64 result rounded to their own dtype."""
    return (merged == exact.to(merged.dtype)).flatten()


def compare(names: Sequence[str], bench: Bench, repeats: int) -> tuple[dict[str, Found], list[Run]]:
    """What each method took, and the floor."""
    found = {name: Found.nothing() for name in names}
    floors(bench)  # the models are in the system's cache from here on
    pair(names[0], bench, Found.nothing())
    floor: list[Run] = []
    with progress("runs", repeats * len(names)) as step:
        for _ in range(repeats):
            for name in names:
                pair(name, bench, found[name])
                step()
            floor += floors(bench)
    return found, floor


def growth(names: Sequence[str], benches: dict[Shape, Bench], repeats: int) -> list[list[str]]:
    """Rows of our time by size; one run of each size is not counted."""
    rows: list[list[str]] = []
    with progress("runs", repeats * len(names) * len(benches)) as step:
        for shape, bench in benches.items():
            pair(names[0], bench, Found.nothing())
            for name in names:
                found = Found.nothing()
                for _ in range(repeats):
                    pair(name, bench, found)
                    step()
                size = len(bench.paths) * shape.bytes / 1e9
                per_gb = median((run.seconds / size for run in found.ours), 2)
                took = [seconds(found.ours), per_gb, megabytes(found.ours)]
                rows.append([METHODS[name].label, str(shape.layers), f"{size:.1f}", *took])
    return rows


# --- tables ----------------------------------------------------------------------------------------------------------


def median(values: Iterable[float], digits: int) -> str:
    """As text; a dash where there are no values."""
    known = list(values)
    return f"{statistics.median(known):.{digits}f}" if known else NONE


def seconds(runs: Sequence[Run]) -> str:
    return median((run.seconds for run in runs), 1)


def megabytes(runs: Sequence[Run]) -> str:
    return median((run.memory / 1e6 for run in runs if run.memory is not None), 0)


def time_table(found: dict[str, Found], floor: Sequence[Run], title: str) -> str:
    header = ["method", "taskvec s", "mergekit s", "times as fast", "taskvec MB", "mergekit MB"]
    rows: list[list[str]] = []
    for name, (ours, theirs, _) in found.items():
        ratio = median((b.seconds / a.seconds for a, b in zip(ours, theirs, strict=False)), 1)
        rows.append([METHODS[name].label, seconds(ours), seconds(theirs), ratio, megabytes(ours), megabytes(theirs)])
    rows.append(["read all, copy one", seconds(floor), NONE, NONE, NONE, NONE])
    return text_table(title, header, rows)


def exact_table(found: dict[str, Found]) -> str:
    def percent(f: Found, whose: str) -> str:
        return f"{100 * f.exact[whose]:.3f}" if whose in f.exact else NONE

    rows = [[METHODS[name].label, percent(f, "ours"), percent(f, "theirs")] for name, f in found.items() if f.exact]
    return text_table("Correctly rounded entries, %", ["method", "taskvec", "mergekit"], rows) if rows else ""


def machine(workers: int) -> str:
    """What the figures depend on."""
    ours = f"taskvec {taskvec.__version__}, torch {torch.__version__}, Python {platform.python_version()}"
    lines = [f"{os.cpu_count()} cores, {workers} workers; {ours}"]
    if not sys.platform.startswith("linux"):
        lines.append("memory is not measured on this system: that needs Linux")
    return "\n".join(lines)


def other(bench: Bench) -> str:
    """The version of mergekit and how it computes, or that it was not timed."""
    if bench.mergekit is None:
        return "mergekit was not timed: give --mergekit ENV/bin/mergekit-yaml"
    return f"{versions(bench.mergekit)}; it computes in {'float32' if bench.float32 else 'the dtype of its inputs'}"


def versions(mergekit: Path) -> str:
    """Of mergekit and of its torch."""
    code = "from importlib.metadata import version as v; print(f\"mergekit {v('mergekit')}, torch {v('torch')}\")"
    return subprocess.check_output([mergekit.with_name("python"), "-c", code], text=True).strip()  # noqa: S603


def draw(path: Path, rows: Sequence[Sequence[str]]) -> None:
    """Seconds by gigabytes read, a line for each method."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axis = figure.subplots()
    for label in dict.fromkeys(row[0] for row in rows):
        points = [(float(row[2]), float(row[3])) for row in rows if row[0] == label]
        axis.plot(*zip(*points, strict=True), "o-", label=label)
    axis.set(xlabel="gigabytes read: a base and four fine-tunes", ylabel="seconds, whole process")
    axis.set_xlim(left=0)
    axis.set_ylim(bottom=0)
    axis.set_title("Time grows with the bytes")
    axis.legend(frameon=False)
    figure.savefig(path, dpi=100)


# --- the command -----------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where models are kept (default: %(default)s)")
    parser.add_argument("--mergekit", type=Path, help="the mergekit-yaml of an environment with mergekit 0.1.5")
    parser.add_argument("--mergekit-float32", action="store_true", help="let mergekit compute in float32")
    parser.add_argument(
        "--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="NAME", help=", ".join(METHODS)
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2, help="threads of taskvec; mergekit takes all cores")
    parser.add_argument("--layers", type=int, default=20, help="20 are 1.2 GB a model")
    parser.add_argument("--growth", action="store_true", help="our time by size instead")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="of --growth")
    given = parser.parse_args()
    if given.mergekit is not None and not given.mergekit.is_file():
        parser.error(f"there is no {given.mergekit}; give the path of mergekit-yaml in the environment's bin folder")
    if min(given.repeats, given.workers, given.layers) < 1:
        parser.error("--repeats, --workers and --layers must be at least 1")
    (print_growth if given.growth else print_comparison)(given)


def print_comparison(given: argparse.Namespace) -> None:
    shape = Shape(given.layers)
    paths = make_set(given.folder, shape)
    bench = Bench(paths, given.workers, given.mergekit, given.mergekit_float32)
    found, floor = compare(given.methods, bench, given.repeats)
    title = f"A base and four fine-tunes of {shape.parameters:,} bfloat16 parameters ({shape.bytes / 1e9:.2f} GB each)"
    print(time_table(found, floor, f"{title}: medians of {given.repeats}"))
    print(exact_table(found))
    print(f"\n{machine(bench.workers)}\n{other(bench)}")


def print_growth(given: argparse.Namespace) -> None:
    benches: dict[Shape, Bench] = {}
    notes: list[str] = []
    for shape in map(Shape, GROWTH):
        short = shortage(given.folder, shape)
        if short:
            notes.append(f"{shape.layers} layers are left out: {short}")
        else:
            benches[shape] = Bench(make_set(given.folder, shape), given.workers)
    header = ["method", "layers", "GB read", "seconds", "seconds / GB", "MB"]
    title = f"taskvec by the size of a base and four fine-tunes: medians of {given.repeats}"
    rows = growth(given.methods, benches, given.repeats)
    print(text_table(title, header, rows))
    if given.picture is not None:
        draw(given.picture, rows)
    print("\n".join(["", *notes, machine(given.workers)]))


if __name__ == "__main__":
    main()
