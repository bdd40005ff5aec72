"""What is measured must be in evaluation mode: dropout or BatchNorm in training mode would change what it answers."""

import threading
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from .errors import OptionError


@contextmanager
def evaluating() -> Generator[None]:
    """Refuse, in this thread and for this long, every call of a module in training mode."""
    thread = threading.get_ident()

    def check(module: nn.Module, _inputs: Any) -> None:
        if module.training and threading.get_ident() == thread:
            raise OptionError(
                f"a {type(module).__name__} is in training mode while the model is measured: call .eval() first"
            )

    handle = register_module_forward_pre_hook(check)
    try:
        yield
    finally:
        handle.remove()
