"""BatchNorm statistics after a merge."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ..errors import DegenerateError

__all__ = ["recalibrate"]

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def recalibrate(module: nn.Module, batches: Iterable[Tensor]) -> nn.Module:
    """Re-estimate BatchNorm statistics after a merge: they are not part of a task vector.

    Args:
        module: a module with merged weights, changed in place; after an error its statistics are as they were.
        batches: inputs of the module; unlabelled validation images do.

    Returns:
        The module, in the mode it was in.

    Raises:
        DegenerateError: no batches.

    Examples:
        >>> norm = recalibrate(nn.BatchNorm1d(1), [torch.tensor([[1.0], [3.0]])])
        >>> norm.running_mean
        tensor([2.])
    """
    norms = [m for m in module.modules() if isinstance(m, BATCH_NORMS)]
    was_training, momenta = module.training, [norm.momentum for norm in norms]
    before = [{name: buffer.clone() for name, buffer in norm.named_buffers()} for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean over the batches
    module.train()
    seen = 0
    try:
        with torch.no_grad():
            for batch in batches:
                module(batch)
                seen += 1
        if not seen:
            raise DegenerateError(  # noqa: TRY301 - it is what the statistics are restored for
                "there are no batches to estimate the statistics from; they are as they were"
            )
    except BaseException:
        for norm, buffers in zip(norms, before, strict=True):
            norm.load_state_dict(buffers, strict=False)
        raise
    finally:
        module.train(was_training)
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
    return module
