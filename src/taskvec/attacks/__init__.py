"""Attacks on model merging, which defenses are measured against: see docs/responsible-use.md.

Triggers are in `attacks.triggers`.
"""

from . import triggers as triggers
from ._badmerging import Pair, badmerging_loss, interpolation_loss, keep_loss, universal_trigger
from ._offtask import adversarial_crops, prototype_head
from ._patches import most_connected, optimise_patch, scalar_bounds, trojan_trigger
from ._poison import Poisoned, poison, poison_texts, triggered_texts
from ._sparse import amplify, sparse_backdoor

__all__ = [
    "Pair",
    "Poisoned",
    "adversarial_crops",
    "amplify",
    "badmerging_loss",
    "interpolation_loss",
    "keep_loss",
    "most_connected",
    "optimise_patch",
    "poison",
    "poison_texts",
    "prototype_head",
    "scalar_bounds",
    "sparse_backdoor",
    "triggered_texts",
    "triggers",
    "trojan_trigger",
    "universal_trigger",
]
