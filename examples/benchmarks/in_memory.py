"""How long a merge in memory takes, and how much memory beside its inputs: taskvec, mergekit's functions, and PEFT's.

    python examples/benchmarks/in_memory.py [--mergekit ENV/bin/python] [--layers 12] [--vectors 8] [--threads 1 2]

Task vectors in the shape of a ViT-B (86 million parameters at 12 layers), float32, normal numbers of unlike scale, are
merged in one process per program and number of torch threads; only the merge is timed. "Times as fast" is mergekit's,
or PEFT's, median over ours. The memory is the peak of the process above what it held with its inputs, as a share of
them. mergekit is called by its own function, `merge_state_dicts`, on a base of zeros; PEFT's tensor by tensor.
mergekit needs an environment of its own: `python -m venv ENV && ENV/bin/pip install mergekit==0.1.5`.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "experiments"))

import torch
from torch import Tensor

from bench.shapes import vit

Stacks = Mapping[str, Tensor]
"""Name -> the vectors' tensors, `(n, *shape)`."""

METHODS = ("task arithmetic", "ties", "breadcrumbs", "dare", "della", "model stock")
PROGRAMS = ("taskvec", "mergekit", "peft")
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
    from taskvec.merges import della, weighted  # noqa: PLC0415 - each program has an environment of its own

    vectors = [TaskVector({name: x[i] for name, x in stacks.items()}) for i in range(n)]
    ones = [1.0] * n
    return {
        "task arithmetic": lambda: merge(vectors, weighted, weights=ones),
        "ties": lambda: merge(vectors, presets.ties_mergekit, density=DENSITY, weights=ones),
        "breadcrumbs": lambda: merge(vectors, presets.breadcrumbs_mergekit, density=0.9, outliers=0.01, weights=ones),
        "dare": lambda: merge(vectors, presets.dare_mergekit, density=DENSITY, seed=0, weights=ones),
        "della": lambda: merge(vectors, della, density=DELLA_DENSITY, epsilon=2 * EPSILON, seed=0, rescale="l1"),
        "model stock": lambda: merge(vectors, presets.model_stock_mergekit),
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


def measure(program: str, given: argparse.Namespace) -> dict[str, list[float]]:
    """Method -> the median of the seconds, and the peak above the inputs as a share of them."""
    torch.set_num_threads(given.threads[0])
    stacks = draw(given.layers, given.vectors)
    size = sum(x.numel() * 4 for x in stacks.values())
    how = {"taskvec": with_taskvec, "mergekit": with_mergekit, "peft": with_peft}[program]
    found: dict[str, list[float]] = {}
    with torch.no_grad():
        for name, run in how(stacks, given.vectors).items():
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
    command = [python, __file__, "--program", program, *words]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    out = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout  # noqa: S603
    return json.loads(out.splitlines()[-1])


def rows(threads: int, given: argparse.Namespace) -> list[list[str]]:
    found = {"taskvec": elsewhere(sys.executable, "taskvec", threads, given)}
    found["peft"] = elsewhere(sys.executable, "peft", threads, given)
    if given.mergekit is not None:
        found["mergekit"] = elsewhere(str(given.mergekit), "mergekit", threads, given)
    lines: list[list[str]] = []
    for method in METHODS:
        own, own_peak = found["taskvec"][method]
        line = [method, str(threads), f"{own:.2f}"]
        for program in ("mergekit", "peft"):
            other = found.get(program, {}).get(method)
            line += ["-", "-"] if other is None else [f"{other[0]:.2f}", f"{other[0] / own:.1f}"]
        lines.append([*line, f"{own_peak:.2f}"])
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mergekit", type=Path, help="the python of an environment with mergekit 0.1.5")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--vectors", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--program", choices=PROGRAMS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.program:
        print(json.dumps(measure(given.program, given)))
        return
    from bench.report import text_table  # noqa: PLC0415 - each program has an environment of its own

    header = ["method", "threads", "taskvec s", "mergekit s", "times", "PEFT s", "times", "extra memory / inputs"]
    lines: Sequence[Sequence[str]] = [line for threads in given.threads for line in rows(threads, given)]
    entries = sum(torch.Size(shape).numel() for shape in vit(layers=given.layers).values())
    print(text_table(f"{given.vectors} vectors of {entries:,} float32 in memory", header, lines))


if __name__ == "__main__":
    main()
