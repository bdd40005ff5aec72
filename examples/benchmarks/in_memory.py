"""How long a merge in memory takes, and how much memory beside its inputs: taskvec, mergekit's functions, and PEFT's.

    python examples/benchmarks/in_memory.py [--mergekit ENV/bin/python] [--layers 12] [--vectors 8] [--threads 1 2]
    python examples/benchmarks/in_memory.py --methods TSV-M Iso-C --tsv FOLDER --iso FOLDER --layers 3

Task vectors in the shape of a ViT-B (86 million parameters at 12 layers), float32, normal numbers of unlike scale, are
merged in one process per program and number of torch threads; only the merge is timed. "times" is the other's median
over ours. The memory is the peak of the process above what it held with its inputs, as a share of
them. mergekit is called by its own function, `merge_state_dicts`, on a base of zeros; PEFT's tensor by tensor.
mergekit needs an environment of its own: `python -m venv ENV && ENV/bin/pip install mergekit==0.1.5`.
TSV-M and Iso-C are timed beside their authors' code, in checkouts of AntoAndGar/task_singular_vectors and
danielm1405/iso-merging.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from functools import partial
from importlib.util import module_from_spec, spec_from_file_location
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1] / "experiments"))

import torch
from torch import Tensor

from bench.shapes import vit

Stacks = Mapping[str, Tensor]
"""Name -> the vectors' tensors, `(n, *shape)`."""

METHODS = ("task arithmetic", "ties", "breadcrumbs", "dare", "della", "model stock", "TSV-M", "Iso-C")
AUTHORS = ("tsv", "iso")
OTHERS = ("mergekit", "peft", *AUTHORS)
DENSITY, DELLA_DENSITY, EPSILON = 0.2, 0.4, 0.2  # the epsilon of mergekit: half the window


def draw(layers: int, vectors: int) -> dict[str, Tensor]:
    """Normal numbers; every tensor has a scale of its own."""
    random = torch.Generator().manual_seed(0)
    scales = (1e-3, 3e-4, 2e-3)
    return {
        name: torch.randn(vectors, *shape, generator=random) * scales[i % 3]
        for i, (name, shape) in enumerate(vit(layers=layers).items())
    }


# --- the programs ----------------------------------------------------------------------------------------------------


def with_taskvec(stacks: Stacks, n: int) -> dict[str, Callable[[], Any]]:
    from taskvec import TaskVector, merge, presets  # noqa: PLC0415 - each program has an environment of its own
    from taskvec.merges import iso_c, tsv_m, weighted  # noqa: PLC0415 - each program has an environment of its own

    vectors = [TaskVector({name: x[i] for name, x in stacks.items()}) for i in range(n)]
    ones = [1.0] * n
    return {
        "task arithmetic": lambda: merge(vectors, weighted, weights=ones),
        "ties": lambda: merge(vectors, presets.ties_mergekit, density=DENSITY, weights=ones),
        "breadcrumbs": lambda: merge(vectors, presets.breadcrumbs_mergekit, density=0.9, outliers=0.01, weights=ones),
        "dare": lambda: merge(vectors, presets.dare_mergekit, density=DENSITY, seed=0, weights=ones),
        "della": lambda: merge(vectors, presets.della_mergekit, density=DELLA_DENSITY, epsilon=2 * EPSILON, seed=0),
        "model stock": lambda: merge(vectors, presets.model_stock_mergekit),
        "TSV-M": lambda: merge(vectors, tsv_m),
        "Iso-C": lambda: merge(vectors, iso_c),
    }


def with_mergekit(stacks: Stacks, n: int) -> dict[str, Callable[[], Any]]:
    from mergekit.merge_methods.api import merge_state_dicts  # noqa: PLC0415 - each program has an environment of its own

    models: dict[Any, dict[str, Tensor]] = {i: {name: x[i] for name, x in stacks.items()} for i in range(n)}
    models["base"] = {name: torch.zeros_like(x) for name, x in models[0].items()}

    def run(method: str, **options: float) -> Callable[[], Any]:
        weights = {} if method == "model_stock" else {"weight": dict.fromkeys(range(n), 1.0)}
        return lambda: merge_state_dicts(models, method, parameters={**weights, **options}, base="base")

    return {
        "task arithmetic": run("task_arithmetic"),
        "ties": run("ties", density=DENSITY),
        "breadcrumbs": run("breadcrumbs", density=0.9, gamma=0.01),
        "dare": run("dare_linear", density=DENSITY),
        "della": run("della", density=DELLA_DENSITY, epsilon=EPSILON),
        "model stock": run("model_stock"),
    }


def with_peft(stacks: Stacks, n: int) -> dict[str, Callable[[], Any]]:
    from peft.utils import merge_utils  # noqa: PLC0415 - each program has an environment of its own

    ones = torch.ones(n)
    return {
        "task arithmetic": lambda: [merge_utils.task_arithmetic(list(x), ones) for x in stacks.values()],
        "ties": lambda: [merge_utils.ties(list(x), ones, DENSITY) for x in stacks.values()],
        "dare": lambda: [merge_utils.dare_linear(list(x), ones, DENSITY) for x in stacks.values()],
    }


class Vector(NamedTuple):
    """A task vector as the authors' code of TSV-M and Iso-C has it."""

    vector: dict[str, Tensor]


class Config(NamedTuple):
    """What that code reads of its settings."""

    DATASETS: list[str]
    device: str = "cpu"


def with_authors(stacks: Stacks, n: int, *, file: Path, function: str) -> Callable[[], Any]:
    """A function of a file, which is all that is imported of a checkout."""
    spec = spec_from_file_location("authors", file)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    vectors = [Vector({name: x[i] for name, x in stacks.items()}) for i in range(n)]

    def run() -> Any:
        with redirect_stdout(StringIO()):
            return getattr(module, function)(vectors, Config([str(i) for i in range(n)]))

    return run


def with_tsv(stacks: Stacks, n: int, checkout: Path) -> dict[str, Callable[[], Any]]:
    file = checkout / "src" / "utils" / "TSVM_utils.py"
    return {"TSV-M": with_authors(stacks, n, file=file, function="compute_and_sum_svd_mem_reduction")}


def with_iso(stacks: Stacks, n: int, checkout: Path) -> dict[str, Callable[[], Any]]:
    return {"Iso-C": with_authors(stacks, n, file=checkout / "src" / "utils" / "iso.py", function="iso_c")}


def measure(program: str, given: argparse.Namespace) -> dict[str, list[float]]:
    """Method -> the median of the seconds, and the peak above the inputs as a share of them."""
    torch.set_num_threads(given.threads[0])
    stacks = draw(given.layers, given.vectors)
    size = sum(x.numel() * 4 for x in stacks.values())
    how: dict[str, Callable[..., dict[str, Callable[[], Any]]]] = {
        "taskvec": with_taskvec,
        "mergekit": with_mergekit,
        "peft": with_peft,
        "tsv": partial(with_tsv, checkout=given.tsv),
        "iso": partial(with_iso, checkout=given.iso),
    }
    runs = {name: run for name, run in how[program](stacks, given.vectors).items() if name in given.methods}
    found: dict[str, list[float]] = {}
    with torch.no_grad():
        for name, run in runs.items():
            took: list[float] = []
            peak = 0
            for _ in range(given.repeats + 1):  # the first does not count
                held = forget_peak()
                start = time.perf_counter()
                result = run()
                took.append(time.perf_counter() - start)
                peak = max(peak, peak_memory() - held)
                del result
            found[name] = [statistics.median(took[1:]), peak / size]
    return found


def status(field: str) -> int:
    """Bytes, as the system counts them: exact for merges that end within a few samples of `processes.PeakMemory`."""
    lines = Path("/proc/self/status").read_text("ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def forget_peak() -> int:
    """Begin to watch the peak anew; what is held now."""
    Path("/proc/self/clear_refs").write_text("5", "ascii")
    return status("VmRSS")


def peak_memory() -> int:
    return status("VmHWM")


# --- the table -------------------------------------------------------------------------------------------------------


def elsewhere(python: str, program: str, threads: int, given: argparse.Namespace) -> dict[str, list[float]]:
    """What a process of its own measures."""
    options = {"layers": given.layers, "vectors": given.vectors, "repeats": given.repeats, "threads": threads}
    words = [word for key, value in options.items() for word in (f"--{key}", str(value))]
    words += ["--methods", *given.methods]
    if program in AUTHORS:
        words += [f"--{program}", str(getattr(given, program))]
    command = [python, __file__, "--program", program, *words]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    out = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout  # noqa: S603
    return json.loads(out.splitlines()[-1])


def rows(threads: int, given: argparse.Namespace) -> list[list[str]]:
    """A row for each method and each other program that has it."""
    pythons = {"mergekit": given.mergekit, "peft": sys.executable}
    pythons |= {name: sys.executable for name in AUTHORS if getattr(given, name) is not None}
    own = elsewhere(sys.executable, "taskvec", threads, given)
    others = {name: elsewhere(str(pythons[name]), name, threads, given) for name in OTHERS if pythons.get(name)}
    lines: list[list[str]] = []
    for method in given.methods:
        seconds, peak = own[method]
        found = {name: known[method] for name, known in others.items() if method in known}
        for name, (theirs, their_peak) in found.items():
            program = "the authors" if name in AUTHORS else name
            ratio = f"{theirs / seconds:.1f}"
            lines.append(
                [
                    method,
                    str(threads),
                    f"{seconds:.2f}",
                    program,
                    f"{theirs:.2f}",
                    ratio,
                    f"{peak:.2f}",
                    f"{their_peak:.2f}",
                ]
            )
        if not found:
            lines.append([method, str(threads), f"{seconds:.2f}", "-", "-", "-", f"{peak:.2f}", "-"])
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mergekit", type=Path, help="the python of an environment with mergekit 0.1.5")
    parser.add_argument("--tsv", type=Path, metavar="FOLDER", help="a checkout of AntoAndGar/task_singular_vectors")
    parser.add_argument("--iso", type=Path, metavar="FOLDER", help="a checkout of danielm1405/iso-merging")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="NAME")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--vectors", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--program", choices=("taskvec", *OTHERS), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.program:
        print(json.dumps(measure(given.program, given)))
        return
    from bench.report import text_table  # noqa: PLC0415 - each program has an environment of its own

    header = ["method", "threads", "taskvec s", "other", "s", "times", "extra memory / inputs", "the other's"]
    lines: Sequence[Sequence[str]] = [line for threads in given.threads for line in rows(threads, given)]
    entries = sum(torch.Size(shape).numel() for shape in vit(layers=given.layers).values())
    print(text_table(f"{given.vectors} vectors of {entries:,} float32 in memory", header, lines))


if __name__ == "__main__":
    main()
