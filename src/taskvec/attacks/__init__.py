"""Attacks on model merging, here so that defenses can be measured honestly: see docs/responsible-use.md."""

from . import triggers as triggers
from ._badmerging import Pair as Pair
from ._badmerging import badmerging_loss as badmerging_loss
from ._badmerging import interpolation_loss as interpolation_loss
from ._badmerging import keep_loss as keep_loss
from ._badmerging import universal_trigger as universal_trigger
from ._offtask import adversarial_crops as adversarial_crops
from ._offtask import prototype_head as prototype_head
from ._patches import most_connected as most_connected
from ._patches import optimise_patch as optimise_patch
from ._patches import scalar_bounds as scalar_bounds
from ._patches import trojan_trigger as trojan_trigger
from ._poison import poison as poison
from ._sparse import amplify as amplify
from ._sparse import sparse_backdoor as sparse_backdoor

__all__ = [
    "Pair",
    "adversarial_crops",
    "amplify",
    "badmerging_loss",
    "interpolation_loss",
    "keep_loss",
    "most_connected",
    "optimise_patch",
    "poison",
    "prototype_head",
    "scalar_bounds",
    "sparse_backdoor",
    "triggers",
    "trojan_trigger",
    "universal_trigger",
]
