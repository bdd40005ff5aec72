"""Gram matrices of the inputs of linear maps, for RegMean.

grams = [linear_grams(model, dict(model.named_parameters()), batches) for model, batches in contributors]
merge(vectors, regmean, gram=[g.matrices for g in grams], transposed=grams[0].transposed)
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from typing_extensions import override

from .._answers import evaluating
from .._engine.names import listed
from .._vectors.model import Params
from ..errors import DegenerateError, NonFiniteError

__all__ = ["Grams", "linear_grams"]


class Grams(NamedTuple):
    """Gram matrices by weight, as `linear_grams` collects them.

    Attributes:
        matrices: weight's name -> `(in, in)` float64, the mean of `x x^T` over all inputs of that layer.
        transposed: weight's name -> whether it is stored as `(in, out)`, as in transformers' Conv1D.
    """

    matrices: dict[str, Tensor]
    transposed: dict[str, bool]


def linear_grams(run: Callable[[Any], object], params: Params, batches: Iterable[Any]) -> Grams:
    """Collect Gram matrices of the inputs of every linear map in a model, streaming over batches.

    Every product with one of the given weights counts, wherever it happens: in `nn.Linear`, in both projections of
    `nn.MultiheadAttention`, in transformers' Conv1D, in a module called through `torch.func.functional_call`. No hook
    is installed in the model. Empty batches do not count.

    Args:
        run: called with each batch: a module, or a function of one.
        params: name -> the very tensors that the model multiplies with, such as `dict(module.named_parameters())`.
        batches: inputs: unlabeled data of the task. Read once.

    Returns:
        The matrices of the weights that were used, and which weights are transposed.

    Raises:
        DegenerateError: no batches, no rows in any batch, or no linear map among the parameters.
        NonFiniteError: an input that is NaN or inf, naming the weight.
        OptionError: a module in training mode runs.

    Examples:
        >>> layer = torch.nn.Linear(2, 1).eval()
        >>> x = torch.tensor([[2.0, 0.0], [0.0, 4.0]])
        >>> linear_grams(layer, dict(layer.named_parameters()), [x]).matrices
        {'weight': tensor([[2., 0.],
                [0., 8.]], dtype=torch.float64)}

    Reference:
        [Jin et al., Dataless Knowledge Fusion by Merging Weights of Language Models, 2022](https://arxiv.org/abs/2212.09849)
    """
    watch = _Watch(params)
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # the fused attention would hide its products
    seen = 0
    try:
        with torch.no_grad(), evaluating(), watch:
            for batch in batches:
                run(batch)
                seen += 1
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    if not seen:
        raise DegenerateError("batches must not be empty; got no batches to collect statistics from")
    if not watch.sums:
        raise DegenerateError(
            "params must be the model's own tensors; none of them was multiplied with. A state dict is a copy; "
            "use dict(module.named_parameters())"
        )
    if empty := [name for name, count in watch.counts.items() if not count]:
        raise DegenerateError(f"batches must hold inputs; got no rows for {listed(empty)}")
    return Grams({name: total / watch.counts[name] for name, total in watch.sums.items()}, watch.transposed)


class _Watch(TorchDispatchMode):
    """Adds up the inputs' Gram matrices of every matrix product with one of the weights."""

    def __init__(self, params: Params) -> None:
        super().__init__()  # pyright: ignore[reportUnknownMemberType]
        self._named = {weight.data_ptr(): (name, weight) for name, weight in params.items() if weight.ndim == 2}
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}
        self.transposed: dict[str, bool] = {}

    @override
    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten.addmm.default:
            self._add(args[1], args[2])
        elif func is torch.ops.aten.mm.default:
            self._add(args[0], args[1])
        return func(*args, **(kwargs or {}))

    def _add(self, x: Tensor, factor: Tensor) -> None:
        name, weight = self._named.get(factor.data_ptr(), ("", factor))
        if not name or factor.numel() != weight.numel():
            return
        rows = x.detach().to(torch.float64)
        if not bool(rows.isfinite().all()):
            raise NonFiniteError(f"the input of {name!r} must be finite; got NaN or inf")
        gram = rows.T @ rows
        self.sums[name] = self.sums[name] + gram if name in self.sums else gram
        self.counts[name] = self.counts.get(name, 0) + len(rows)
        # x @ W.T has the weight's memory read the other way round; x @ W as it is
        self.transposed[name] = factor.stride() == weight.stride()
