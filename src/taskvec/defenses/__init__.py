"""Defences against backdoors in merged models, and the controls to hold them against."""

from .combine import shrink as shrink
from .combine import weight_average as weight_average
from .selection import strength as strength
from .subtract import injection_subtraction as injection_subtraction
from .subtract import random_twin as random_twin
from .subtract import shuffled_twin as shuffled_twin
