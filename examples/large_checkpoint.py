"""Merge checkpoints of any size from disk to disk, in a few hundred MB of memory.

    python examples/large_checkpoint.py [--gb 1] [--models 4] [--folder FOLDER] [--resume]

Makes a synthetic base and fine-tunes in shards, with the shape of a Llama, and merges them by TIES. With --folder the
models and the result are kept there; with --resume too, a run that was killed continues where it stopped.
"""

import argparse
import os
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks.processes import PeakMemory
from benchmarks.synthetic import Shape, make_set, shape_of
from taskvec import TaskVector, load, merge, save
from taskvec.merges import ties


def merge_folders(paths: list[Path], output: Path, **options: Any) -> None:
    base, *tuned = map(load, paths)
    vectors = [TaskVector.between(base, t) for t in tuned]
    merged = merge(vectors, ties, density=0.2).apply(base)
    save(merged, output, max_shard_size="300MB", overwrite=True, **options)


def report(folder: Path, shape: Shape, models: int, **options: Any) -> None:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as maker:  # whose memory is not counted
        paths = maker.submit(make_set, folder, shape, models).result()
    print(
        f"{models} fine-tunes and a base of {shape.parameters:,} bfloat16 parameters, {shape.bytes / 1e9:.2f} GB each"
    )
    start = time.perf_counter()
    with PeakMemory(os.getpid()) as peak:
        merge_folders(paths, folder / shape.name / "merged", **options)
    seconds = time.perf_counter() - start
    read = len(paths) * shape.bytes / 1e9
    memory = "" if peak.bytes is None else f", {peak.bytes / 1e6:.0f} MB of memory"
    print(f"merged in {seconds:.1f} s: {read / seconds:.2f} GB of checkpoints per second{memory}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gb", type=float, default=1.0, help="size of one model")
    parser.add_argument("--models", type=int, default=4, help="fine-tunes beside the base")
    parser.add_argument("--folder", type=Path, help="where models and result are kept; by default nothing is kept")
    parser.add_argument("--resume", action="store_true", help="continue a run that was killed; needs --folder")
    given = parser.parse_args()
    if given.gb <= 0 or given.models < 1:
        parser.error("--gb must be positive and --models at least 1")
    if given.resume and given.folder is None:
        parser.error("--resume needs the --folder of the run that was killed")
    options = {"resume": True} if given.resume else {}
    if given.folder is not None:
        report(given.folder, shape_of(given.gb * 1e9), given.models, **options)
        return
    with tempfile.TemporaryDirectory() as folder:
        report(Path(folder), shape_of(given.gb * 1e9), given.models)


if __name__ == "__main__":
    main()
