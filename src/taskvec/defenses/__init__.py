"""Defences against backdoors in merged models, and the controls to hold them against."""

from .bank import bank_scores as bank_scores
from .bank import disarm as disarm
from .bank import flagged as flagged
from .combine import mix as mix
from .combine import shrink as shrink
from .combine import weight_average as weight_average
from .contributors import clip_norms as clip_norms
from .contributors import cosine_gate as cosine_gate
from .contributors import equalise_norms as equalise_norms
from .modules import greedy_substitution as greedy_substitution
from .modules import substitute as substitute
from .modules import switch as switch
from .prototypes import prototype as prototype
from .prototypes import purify as purify
from .screening import Screening as Screening
from .screening import screen as screen
from .selection import strength as strength
from .subtract import consensus_subtraction as consensus_subtraction
from .subtract import harden as harden
from .subtract import injection_subtraction as injection_subtraction
from .subtract import negate as negate
from .subtract import project_out as project_out
from .subtract import random_twin as random_twin
from .subtract import shuffled_twin as shuffled_twin
