"""What the core costs: rules in memory and from disk, algebra, a Hugging Face model in and out, and the import.

    python examples/experiments/core.py [--quick]

Prints one line a figure. Times are medians of several runs; algebra and import run in turn with what they are compared
with, so that a busy machine slows both. Run it on an idle one.
"""

import argparse
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.shapes import vit
from taskvec import TaskVector, load, merge, merges, save
from taskvec.merges import ties

RULES: dict[str, tuple[Callable[..., Tensor], dict[str, Any]]] = {
    "total": (merges.total, {}),
    "ties, global": (ties, {"density": 0.2}),
    "ties, per tensor": (ties, {"density": 0.2, "scope": "tensor"}),
    "dare": (merges.dare, {"density": 0.2, "seed": 0}),
    "breadcrumbs, per tensor": (merges.breadcrumbs, {"density": 0.2, "outliers": 0.01, "scope": "tensor"}),
    "breadcrumbs, by row": (merges.breadcrumbs, {"density": 0.2, "outliers": 0.01}),
    "model stock": (merges.model_stock, {}),
    "della": (merges.della, {"density": 0.2, "epsilon": 0.1, "seed": 0}),
}
BASELINE = "import torch, safetensors"


def vit_b_like(entries: int) -> dict[str, tuple[int, ...]]:
    """A vision transformer of 12 layers with about so many entries."""
    return vit(max(8, int((entries / 12 / 12) ** 0.5)))


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


def rules_of_eight(shapes: dict[str, tuple[int, ...]], runs: int) -> None:
    """Every rule on eight vectors in memory, on one thread."""
    vectors = [random_vector(shapes, seed) for seed in range(8)]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for name, (rule, options) in RULES.items():
            times = [seconds(lambda: merge(vectors, rule, **options)) for _ in range(runs)]  # noqa: B023 - called here
            print(f"{name}: {statistics.median(times):.2f} s in memory, 8 x {entries_of(shapes):,} float32, 1 thread")
    finally:
        torch.set_num_threads(threads)


def from_disk(shapes: dict[str, tuple[int, ...]]) -> None:
    """Every rule on four bfloat16 checkpoints, from file to file."""
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{i}.safetensors" for i in range(5)]
        for i, path in enumerate(paths):
            save(random_vector(shapes, i).to(dtype=torch.bfloat16).tensors, path)
        for name, (rule, options) in RULES.items():
            start = time.perf_counter()
            base, *tuned = map(load, paths)
            vectors = [TaskVector.between(base, one) for one in tuned]
            save(merge(vectors, rule, **options).apply(base), Path(folder) / "merged.safetensors", overwrite=True)
            took = time.perf_counter() - start
            print(f"{name}: {took:.2f} s from disk to disk, 4 + 1 x {entries_of(shapes):,} bfloat16")


def hugging_face() -> None:
    """A model of MiniLM's size (22.7M parameters): three folders in, TIES, a folder that from_pretrained opens out."""
    from transformers import AutoModel, BertConfig, logging  # noqa: PLC0415 - an extra

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    config = BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)
    with tempfile.TemporaryDirectory() as folder:
        paths = [f"{folder}/{name}" for name in ("base", "one", "two", "three")]
        for path in paths:
            AutoModel.from_config(config).save_pretrained(path)
        start = time.perf_counter()
        base, *tuned = map(load, paths)
        vectors = [TaskVector.between(base, one) for one in tuned]
        save(merge(vectors, ties, density=0.2).apply(base), f"{folder}/merged", like=base)
        opened = AutoModel.from_pretrained(f"{folder}/merged")
        took = time.perf_counter() - start
    size = sum(x.numel() for x in opened.parameters())
    print(f"hugging face, {size:,} parameters: load x 4, TIES, save(like=), from_pretrained: {took:.2f} s")


def entries_of(shapes: dict[str, tuple[int, ...]]) -> int:
    return sum(torch.Size(shape).numel() for shape in shapes.values())


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
    rules_of_eight(vit_b_like(860_000 if quick else 14_200_000), 1 if quick else 5)
    from_disk(vit_b_like(860_000 if quick else 126_000_000))
    hugging_face()
    import_time(1 if quick else 7)


if __name__ == "__main__":
    main()
