"""Defenses against backdoors in merged models, and the controls to compare them with.

The file says what the defender must own; see docs/study.md for what each is worth.
"""

from ._bank import Flag as Flag
from ._bank import bank_scores as bank_scores
from ._bank import disarm as disarm
from ._bank import flagged as flagged
from ._base import cosine_gate as cosine_gate
from ._base import mix as mix
from ._base import shrink as shrink
from ._contributors import clip_norms as clip_norms
from ._contributors import equalise_norms as equalise_norms
from ._models import Substitution as Substitution
from ._models import greedy_substitution as greedy_substitution
from ._models import harden as harden
from ._models import substitute as substitute
from ._models import switch as switch
from ._models import weight_average as weight_average
from ._probes import consensus_subtraction as consensus_subtraction
from ._probes import injection_subtraction as injection_subtraction
from ._probes import negate as negate
from ._probes import project_out as project_out
from ._prototypes import prototype as prototype
from ._prototypes import purify as purify
from ._screening import Screening as Screening
from ._screening import screen as screen
from ._strength import choose_strength as choose_strength
from ._twins import random_twin as random_twin
from ._twins import shuffled_twin as shuffled_twin

__all__ = [
    "Flag",
    "Screening",
    "Substitution",
    "bank_scores",
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
    "mix",
    "negate",
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
]
