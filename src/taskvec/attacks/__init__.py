"""Attacks on model merging, here so that defences can be measured honestly: see docs/responsible-use.md."""

from . import badmerging as badmerging
from . import optimised as optimised
from . import triggers as triggers
from .poison import poison as poison
from .sparse import amplify as amplify
from .sparse import sparse_backdoor as sparse_backdoor
