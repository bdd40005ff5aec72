"""Fine-tuning: batches of rows of like length, and one loop over them for every text model."""

import random
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn


def batches(lengths: Sequence[int], size: int, epochs: int, seed: int) -> list[list[int]]:
    """The rows of every step: each row once an epoch, rows of like length together, so that little is padded.

    Args:
        lengths: of every row, in tokens.
        size: rows a batch.
        epochs: how often each row comes.
        seed: of the order.
    """
    shuffle = random.Random(seed)  # noqa: S311 - an order, no secret
    found: list[list[int]] = []
    for _ in range(epochs):
        order = list(range(len(lengths)))
        shuffle.shuffle(order)
        window = 50 * size
        order = [
            i for a in range(0, len(order), window) for i in sorted(order[a : a + window], key=lambda i: lengths[i])
        ]
        parts = [order[a : a + size] for a in range(0, len(order), size)]
        shuffle.shuffle(parts)
        found += parts
    return found


def fit(
    model: nn.Module, steps: Sequence[list[int]], loss: Callable[[list[int]], Tensor], *, lr: float, seed: int
) -> None:
    """Fine-tune a module in place: AdamW, a rate that warms up for 6 % of the steps and then falls to 0.

    Args:
        model: its parameters that require a gradient are trained.
        steps: the rows of every step.
        loss: of such rows.
        lr: the learning rate at its height.
        seed: of dropout.
    """
    leaves = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(leaves, lr=lr, weight_decay=0.01)
    torch.manual_seed(seed)
    for step, rows in enumerate(steps):
        optimizer.param_groups[0]["lr"] = lr * min(1.0, (step + 1) / (0.06 * len(steps))) * (1 - step / len(steps))
        optimizer.zero_grad()
        loss(rows).backward()
        nn.utils.clip_grad_norm_(leaves, 1.0)
        optimizer.step()
