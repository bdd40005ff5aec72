"""Fixed classification heads: one direction per class, from five images.

Only the encoder is fine-tuned and merged. A head is made once from the pre-trained model and stays, as the text
embeddings of CLIP do; it is public, and with five images a class it leaves fine-tuning something to gain.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .data import Split
from .encoders import features

SCALE = 20.0
SHOTS = 5


class Head(NamedTuple):
    """Class weights (classes, 128), their scale included, and the center (128,) that features are measured from."""

    weights: Tensor
    centre: Tensor


def logits(embedded: Tensor, head: Head) -> Tensor:
    """Scores (n, classes) of features (n, 128): scale times the cosine with each class's weights."""
    return F.normalize(embedded - head.centre, dim=-1) @ head.weights.T


def directions(embedded: Tensor, head: Head) -> Tensor:
    """Features of length one from the head's center, as `logits` sees them."""
    return head.centre + F.normalize(embedded - head.centre, dim=-1)


def prototypes(
    module: nn.Module, base: Mapping[str, Tensor], shots: Split, *, scale: float = SCALE, centred: bool = True
) -> Head:
    """A head of mean base features, one per class, centered on the mean of them all.

    Args:
        shots: the same number of images of every class, in the order of the classes.
        scale: of the scores.
        centred: whether the features that are scored are measured from that mean too. It decides how much the base
            knows already and how much a merge loses, and helps one encoder where it harms another: see zoo.head.
    """
    with torch.no_grad():
        embedded = features(module, base, shots.images)
    means = embedded.unflatten(0, (int(shots.labels.max()) + 1, -1)).mean(1)
    centre = means.mean(0)
    return Head(scale * F.normalize(means - centre, dim=-1), centre if centred else torch.zeros_like(centre))
