"""The few type names of the library."""

from collections.abc import Callable, Mapping
from typing import TypeAlias

from torch import Tensor

Params: TypeAlias = Mapping[str, Tensor]
"""A model's parameters: a `state_dict()`, a checkpoint on disk, a task vector."""

Leaf: TypeAlias = Callable[..., Tensor]
"""A function of one tensor, `(*shape) -> (*shape)`: a sparsifier."""

Rule: TypeAlias = Callable[..., Tensor]
"""A function of stacked tensors, `(n, *shape) -> (*shape)`: a merge."""
