"""Three defenses that were made for single models, as baselines: Neural Cleanse, Fine-Pruning, Scale-Up.

They are not part of the library: they train, prune or ask, and know nothing of task vectors. Each is written for any
function of images; Fine-Pruning also needs to know where a model's hidden units are.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .training import Params

Score = Callable[[Tensor], Tensor]
"""Images (n, 1, 28, 28) to logits (n, classes)."""


# --- Neural Cleanse --------------------------------------------------------------------------------------------------


def reversed_trigger(
    score: Score, images: Tensor, target: int, *, seed: int, steps: int = 200, batch: int = 64, lr: float = 0.1
) -> tuple[Tensor, Tensor, float]:
    """The smallest mask and pattern that turn images into the target class.

    Minimises `CE(score((1 - m) x + m p), target) + cost * |m|_1` by Adam. The cost goes up while nearly all images are
    turned and down while they are not; the smallest mask that turned 95 % of a batch is taken.

    Returns:
        Mask and pattern (1, 28, 28) in [0, 1], and the mask's sum; the last mask where none was good enough.
    """
    generator = torch.Generator().manual_seed(seed)
    shape = images.shape[1:]
    raw = [torch.zeros(shape).add_(0.1 * torch.randn(shape, generator=generator)) for _ in range(2)]
    mask_raw, pattern_raw = (tensor.requires_grad_() for tensor in raw)
    optimizer = torch.optim.Adam([mask_raw, pattern_raw], lr=lr, betas=(0.5, 0.9))
    cost, best = 1e-3, None
    for _ in range(steps):
        rows = torch.randint(len(images), (batch,), generator=generator)
        mask, pattern = (_unit(tensor) for tensor in (mask_raw, pattern_raw))
        logits = score((1 - mask) * images[rows] + mask * pattern)
        size = mask.sum()
        loss = F.cross_entropy(logits, torch.full((batch,), target)) + cost * size
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        turned = float((logits.argmax(1) == target).float().mean())
        cost = min(cost * 1.05, 1.0) if turned >= 0.95 else cost / 1.05
        if turned >= 0.95 and (best is None or float(size.detach()) < best[2]):
            best = mask.detach(), pattern.detach(), float(size.detach())
    return best or (mask.detach(), pattern.detach(), float(size.detach()))


def _unit(raw: Tensor) -> Tensor:
    return (raw.tanh() + 1) / 2


def anomaly_indices(sizes: Sequence[float]) -> list[float]:
    """By class: how far its mask is below the median, in normal deviations; above 2 Neural Cleanse calls it backdoored.

    `(median - size) / (1.4826 * median absolute deviation)`; negative for masks larger than the median.
    """
    middle = statistics.median(sizes)
    spread = 1.4826 * statistics.median([abs(size - middle) for size in sizes])
    return [(middle - size) / spread if spread else 0.0 for size in sizes]


# --- Fine-Pruning ----------------------------------------------------------------------------------------------------


def mean_activations(module: nn.Module, params: Params, layer: str, images: Tensor) -> Tensor:
    """What each hidden unit of a layer says to clean images, in the mean: (units,)."""
    sums: list[Tensor] = []
    hook = module.get_submodule(layer).register_forward_hook(
        lambda _module, _inputs, output: sums.append(output.flatten(0, -2).mean(0))
    )
    try:
        with torch.no_grad():
            torch.func.functional_call(module, dict(params), (images,))
    finally:
        hook.remove()
    return sums[0]


def pruned(params: Mapping[str, Tensor], linear: str, activations: Tensor, fraction: float) -> Params:
    """The same model without the given fraction of a linear map's outputs, the quietest first."""
    quiet = activations.argsort()[: round(fraction * len(activations))]
    changed = {name: params[name].clone() for name in (f"{linear}.weight", f"{linear}.bias")}
    for tensor in changed.values():
        tensor[quiet] = 0
    return {**params, **changed}


# --- Scale-Up --------------------------------------------------------------------------------------------------------


def scaled_consistency(
    classes: Callable[[Tensor], Tensor], images: Tensor, scales: Sequence[int] = (3, 5, 7, 9, 11)
) -> Tensor:
    """For each image the share of brighter copies that are classified as it is: high means triggered, says Scale-Up."""
    own = classes(images)
    return torch.stack([(classes((scale * images).clamp(0, 1)) == own).float() for scale in scales]).mean(0)
