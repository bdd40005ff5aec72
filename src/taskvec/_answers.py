"""A model in evaluation mode, and answers that can be trusted.

Dropout or BatchNorm in training mode changes a model's answers; logits that are NaN or inf have no meaning.
"""

import threading
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from .errors import NonFiniteError, OptionError, RangeError


@contextmanager
def evaluating() -> Generator[None]:
    """Refuse every call of a module in training mode, in this thread, until the context ends."""
    thread = threading.get_ident()

    def check(module: nn.Module, _inputs: Any) -> None:
        if module.training and threading.get_ident() == thread:
            who = type(module).__name__
            raise OptionError(f"the model must be in evaluation mode; got a {who} in training mode; call .eval() first")

    handle = register_module_forward_pre_hook(check)
    try:
        yield
    finally:
        handle.remove()


def check_finite(x: Tensor, what: str) -> None:
    """Refuse NaN and inf; `what` is a plural, such as `"logits"`."""
    if not bool(x.isfinite().all()):
        raise NonFiniteError(f"{what} must be finite; got NaN or inf: the model is broken")


def check_target(target: int, classes: int) -> None:
    """Refuse a target class that the logits have no column for."""
    if not 0 <= target < classes:
        raise RangeError(f"target must be one of the {classes} classes, from 0 to {classes - 1}; got {target!r}")
