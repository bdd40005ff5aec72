"""BatchNorm statistics after a merge: they are not part of a task vector."""

from collections.abc import Generator, Iterable
from contextlib import contextmanager
from typing import TypeAlias

import torch
from torch import Tensor, nn

from ..errors import DegenerateError, NonFiniteError

__all__ = ["recalibrate"]

BatchNorm: TypeAlias = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d | nn.SyncBatchNorm


def recalibrate(module: nn.Module, batches: Iterable[Tensor]) -> nn.Module:
    """Re-estimate BatchNorm statistics, as the plain mean over batches; dropout is off.

    Args:
        module: a module with merged weights, changed in place. On any error its statistics are as before.
        batches: inputs of the module; unlabeled validation images will do.

    Returns:
        The module, each of its parts in the mode it was in.

    Raises:
        DegenerateError: no batches.
        NonFiniteError: statistics that are NaN or inf.

    Examples:
        >>> batches = [torch.tensor([[1.0], [3.0]]), torch.tensor([[4.0], [4.0]])]
        >>> recalibrate(nn.BatchNorm1d(1), batches).running_mean
        tensor([3.])
    """
    norms = [part for part in module.modules() if isinstance(part, BatchNorm)]
    seen = 0
    with _restored(module, norms), torch.no_grad():
        module.eval()  # dropout and its like would make them random, and those of another network
        for norm in norms:
            norm.train().reset_running_stats()
            norm.momentum = None  # a plain mean over the batches
        for batch in batches:
            module(batch)
            seen += 1
        if not seen:
            raise DegenerateError("batches must not be empty; got none, and the statistics are as before")
        if bad := [i for i, norm in enumerate(norms) if not all(bool(x.isfinite().all()) for x in _statistics(norm))]:
            raise NonFiniteError(f"statistics must be finite; got NaN or inf in BatchNorm {bad[0]}, from these batches")
    return module


@contextmanager
def _restored(module: nn.Module, norms: list[BatchNorm]) -> Generator[None]:
    """Put modes and momenta back in any case, and the statistics after an error."""
    modes = [(part, part.training) for part in module.modules()]
    momenta = [norm.momentum for norm in norms]
    before = [[x.clone() for x in _statistics(norm)] for norm in norms]
    try:
        yield
    except BaseException:
        for norm, old in zip(norms, before, strict=True):
            for x, value in zip(_statistics(norm), old, strict=True):
                x.copy_(value)
        raise
    finally:
        for part, mode in modes:
            part.training = mode
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum


def _statistics(norm: BatchNorm) -> list[Tensor]:
    own = norm.running_mean, norm.running_var, norm.num_batches_tracked
    return [x for x in own if x is not None]
