"""Defenses against backdoors in merged models, and the controls to compare them with.

Every tunable defense has one `strength` as its last positional argument, and 0 leaves the model untouched.
"""

from ._bank import Flag, bank_scores, disarm, flagged
from ._base import cosine_gate, mix, shrink
from ._contributors import clip_norms, equalise_norms
from ._models import Substitution, greedy_substitution, harden, substitute, switch, weight_average
from ._probes import consensus_subtraction, injection_subtraction, negate, project_out
from ._prototypes import prototype, purify
from ._screening import Screening, screen
from ._strength import choose_strength
from ._texts import bigram_perplexity, label_z_scores, onion, without_spurious, word_suspicion
from ._twins import random_twin, shuffled_twin

__all__ = [
    "Flag",
    "Screening",
    "Substitution",
    "bank_scores",
    "bigram_perplexity",
    "choose_strength",
    "clip_norms",
    "consensus_subtraction",
    "cosine_gate",
    "disarm",
    "equalise_norms",
    "flagged",
    "greedy_substitution",
    "harden",
    "injection_subtraction",
    "label_z_scores",
    "mix",
    "negate",
    "onion",
    "project_out",
    "prototype",
    "purify",
    "random_twin",
    "screen",
    "shrink",
    "shuffled_twin",
    "substitute",
    "switch",
    "weight_average",
    "without_spurious",
    "word_suspicion",
]
