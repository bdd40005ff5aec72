"""What the core costs: algebra, TIES and the import, against what one would write by hand.

    python examples/benchmarks/core.py [--quick]

Prints one line a figure. Times are medians of several runs in turn with what they are compared with, in one process,
so that a busy machine slows both. Run it on an idle one.
"""

import argparse
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

from taskvec import TaskVector, merge
from taskvec.merges import ties

BASELINE = "import torch, safetensors"


def vit_b_like(entries: int) -> dict[str, tuple[int, ...]]:
    """Shapes of a vision transformer's size: 12 layers of the usual matrices."""
    width = max(8, int((entries / 12 / 12) ** 0.5))
    shapes: dict[str, tuple[int, ...]] = {}
    for i in range(12):
        shapes |= {
            f"blocks.{i}.attn.qkv.weight": (3 * width, width),
            f"blocks.{i}.attn.proj.weight": (width, width),
            f"blocks.{i}.mlp.up.weight": (4 * width, width),
            f"blocks.{i}.mlp.down.weight": (width, 4 * width),
            f"blocks.{i}.norm.weight": (width,),
            f"blocks.{i}.norm.bias": (width,),
        }
    return shapes


def random_vector(shapes: dict[str, tuple[int, ...]], seed: int) -> TaskVector:
    generator = torch.Generator().manual_seed(seed)
    return TaskVector({name: torch.randn(shape, generator=generator).mul_(1e-3) for name, shape in shapes.items()})


def seconds(f: Callable[[], object]) -> float:
    start = time.perf_counter()
    f()
    return time.perf_counter() - start


def ratio(ours: Callable[[], object], theirs: Callable[[], object], runs: int) -> tuple[float, float, float]:
    """Median seconds of both, and the median of the ratios run by run."""
    ours(), theirs()
    pairs = [(seconds(ours), seconds(theirs)) for _ in range(runs)]
    a, b = zip(*pairs, strict=True)
    return statistics.median(a), statistics.median(b), statistics.median(x / y for x, y in pairs)


def algebra(shapes: dict[str, tuple[int, ...]], runs: int) -> None:
    left, right = random_vector(shapes, 0), random_vector(shapes, 1)
    a, b = list(left.values()), list(right.values())
    hand: dict[str, tuple[Callable[[], object], Callable[[], list[Tensor]]]] = {
        "add": (lambda: left + right, lambda: torch._foreach_add(a, b)),
        "scale": (lambda: left * 0.3, lambda: torch._foreach_mul(a, 0.3)),
        "subtract": (lambda: left - right, lambda: torch._foreach_sub(a, b)),
    }
    entries = sum(x.numel() for x in a)
    for name, (ours, theirs) in hand.items():
        own, by_hand, times = ratio(ours, theirs, runs)
        print(f"{name}: {own:.3f} s, torch._foreach by hand {by_hand:.3f} s, ratio {times:.2f}, {entries:,} entries")


def ties_of_eight(shapes: dict[str, tuple[int, ...]], runs: int) -> None:
    vectors = [random_vector(shapes, seed) for seed in range(8)]
    size = sum(x.numel() * x.element_size() for x in vectors[0].values())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    times = [seconds(lambda: merge(vectors, ties, density=0.2)) for _ in range(runs)]
    extra = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before - size
    print(
        f"ties of 8 x {size // 4:,} float32, density 0.2: {statistics.median(times):.2f} s (best {min(times):.2f}), "
        f"{max(0, extra) / 1e6:.0f} MB beyond inputs and result, {torch.get_num_threads()} threads"
    )


def import_time(runs: int) -> None:
    def run(code: str) -> Callable[[], object]:
        return lambda: subprocess.run([sys.executable, "-c", code], check=True)  # noqa: S603

    own, baseline, times = ratio(run("import taskvec"), run(BASELINE), runs)
    print(f"import taskvec: {own:.2f} s, {BASELINE!r} {baseline:.2f} s, ratio {times:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a hundredth of the size, to see that it runs")
    quick = parser.parse_args().quick
    shapes = vit_b_like(860_000 if quick else 86_000_000)
    ties_of_eight(shapes, 1 if quick else 3)  # first: the peak of memory is the process's
    algebra(shapes, 3 if quick else 15)
    import_time(1 if quick else 7)


if __name__ == "__main__":
    main()
