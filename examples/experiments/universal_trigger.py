"""The universal trigger in batches against one image at a time, as in the paper: seconds to the same success.

    python examples/experiments/universal_trigger.py [--quick] [--encoder vits] [--size 10]

Both start from the same patch and optimize it on the base model and its head, on the same training images. Every few
steps ASR is measured on 500 validation images, outside of the clock. "One at a time" is the paper's procedure: for each
image that is not taken for the target already, plain gradient steps of length 1 until it is (at most 1000), the patch
carried from image to image; its learning rate is for normalized pixels, so several are tried and the best is taken.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from taskvec.attacks import universal_trigger
from taskvec.attacks.triggers import Patch, random_patch, stamp
from taskvec.metrics import attack_success_rate

sys.path.insert(0, str(Path(__file__).parents[1]))  # the examples' own folder

from bench import attackers, data, zoo
from bench.zoo import SHAPE, Setting

STEPS = (1, 2, 3, 5, 7, 10, 15, 20, 30, 50, 70, 100, 150, 200)
Curve = list[tuple[float, float]]
"""(seconds so far, validation ASR)."""


class Watch:
    """Seconds of the optimisation alone, and ASR now and then."""

    def __init__(self, asr: Callable[[Tensor], float]) -> None:
        self.asr, self.curve, self.spent, self.since = asr, [], 0.0, time.perf_counter()

    def look(self, pattern: Tensor) -> None:
        self.spent += time.perf_counter() - self.since
        self.curve.append((self.spent, self.asr(pattern)))
        self.since = time.perf_counter()


def in_batches(score: Callable, images: Tensor, start: Patch, target: int, watch: Watch) -> Curve:
    """The library's, for more and more steps; each a run of its own, from the start."""
    universal_trigger(score, images, start, target=target, seed=0, steps=1)  # the first call of anything is slow
    for count in STEPS:
        watch.spent, watch.since = 0.0, time.perf_counter()
        watch.look(universal_trigger(score, images, start, target=target, seed=0, steps=count).pattern)
    return watch.curve


def one_at_a_time(
    score: Callable, images: Tensor, start: Patch, target: int, watch: Watch, lr: float, limit: float
) -> Curve:
    """The paper's procedure, our own writing, until the time is up; a look every hundredth of it."""
    pattern, aim = start.pattern.clone(), torch.tensor([target])
    watch.since = time.perf_counter()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    for row in order.repeat(10).tolist():
        image = images[row : row + 1]
        with torch.no_grad():
            if int(score(image).argmax(1)) == target:
                continue
        for _ in range(1000):
            patched = torch.where(start.mask, pattern, image).requires_grad_()
            loss = F.cross_entropy(score(patched), aim)
            (gradient,) = torch.autograd.grad(loss, [patched])
            pattern = (pattern - lr * gradient[0]).clamp(0, 1) * start.mask
            with torch.no_grad():
                if int(score(torch.where(start.mask, pattern, image)).argmax(1)) == target:
                    break
            if time.perf_counter() - watch.since > limit / 100:
                watch.look(pattern)
            if watch.spent > limit:
                return watch.curve
    return watch.curve


def until(curve: Curve, wanted: float) -> float | None:
    """Seconds until the wanted ASR is first reached."""
    return next((seconds for seconds, asr in curve if asr >= wanted), None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--encoder", default="vits")
    parser.add_argument("--size", type=int, default=10, help="where an optimised trigger works on the base")
    parser.add_argument("--target", type=int, default=1)
    parser.add_argument("--limit", type=float, default=60.0, help="seconds for one image at a time")
    parser.add_argument("--quick", action="store_true", help="10 seconds for one image at a time")
    given = parser.parse_args()
    torch.set_num_threads(1)
    setting = Setting(given.encoder)
    base, head = zoo.base(setting), attackers.head_of(setting, "mnist")
    start = random_patch(given.size, SHAPE, seed=0)
    images, validation = data.pool("mnist").images, data.validation("mnist")

    def score(x: Tensor) -> Tensor:
        return head(attackers.embed(setting, base, x))

    def asr(pattern: Tensor) -> float:
        trigger = partial(stamp, patch=Patch(pattern, start.mask))
        return attack_success_rate(score, *validation, target=given.target, trigger=trigger).value

    asr(start.pattern)  # the first call of anything is slow
    limit = 10.0 if given.quick else given.limit
    ours = in_batches(score, images, start, given.target, Watch(asr))
    print(
        f"{given.encoder}, patch {given.size}x{given.size}, class {given.target}; start: ASR {asr(start.pattern):.3f}"
    )
    print("in batches, 64 images a step: " + ", ".join(f"{n}: {a:.3f}" for n, (_, a) in zip(STEPS, ours, strict=True)))
    curves = {
        lr: one_at_a_time(score, images, start, given.target, Watch(asr), lr, limit) for lr in (0.03, 0.1, 0.3, 1.0)
    }
    for lr, curve in curves.items():
        best = max(curve, key=lambda point: point[1])
        last = statistics.fmean(a for _, a in curve[-5:])
        print(
            f"one at a time, lr {lr:g}: best ASR {best[1]:.3f} after {best[0]:.1f} s; mean of the last five {last:.3f}"
        )
    one = [point for curve in curves.values() for point in curve]
    for name, wanted in (("its best", max(a for _, a in one)), ("ours after 100 steps", ours[STEPS.index(100)][1])):
        mine, theirs = until(ours, wanted), min((t for t, a in one if a >= wanted), default=None)
        goal = f"to ASR {wanted:.3f} ({name})"
        if mine is None:
            print(f"{goal}: not reached in batches")
        elif theirs is None:
            print(f"{goal}: {mine:.2f} s in batches, not in {limit:.0f} s one at a time: > {limit / mine:.0f}x")
        else:
            print(f"{goal}: {mine:.2f} s in batches, {theirs:.2f} s one at a time: {theirs / mine:.1f}x")


if __name__ == "__main__":
    main()
