"""Rules that need statistics of the data, and the collectors for them.

grams = [linear_grams(model, dict(model.named_parameters()), batches) for model, batches in contributors]
merge(vectors, regmean, gram=[g.matrices for g in grams], transposed=grams[0].transposed)
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from typing_extensions import override

from ._errors import DegenerateError, MismatchError, NonFiniteError, RangeError
from ._modes import evaluating
from .merges import mean
from .rules import runs

__all__ = ["Grams", "linear_grams", "regmean"]


class Grams(NamedTuple):
    """What `linear_grams` collects.

    Attributes:
        matrices: weight's name -> `(in, in)` float64, the mean of `x x^T` over all inputs of that layer.
        transposed: weight's name -> whether it is kept as `(in, out)`, as transformers' Conv1D does.
    """

    matrices: dict[str, Tensor]
    transposed: dict[str, bool]


def linear_grams(run: Callable[[Any], object], params: Mapping[str, Tensor], batches: Iterable[Any]) -> Grams:
    """Gram matrices of the inputs of every linear map in a model, streaming over batches.

    Every product with one of the given weights is seen, wherever it happens: in `nn.Linear`, in both projections of
    `nn.MultiheadAttention`, in transformers' Conv1D, in a module called through `torch.func.functional_call`. Nothing
    is installed in the model.

    Args:
        run: called with each batch; a module, or a function of one.
        params: name -> the very tensors that the model multiplies with, such as `dict(module.named_parameters())`.
        batches: inputs; unlabelled data of the task. Read once.

    Returns:
        The matrices of the weights that were used, and which are transposed.

    Raises:
        DegenerateError: no batches, or no linear map among the parameters.
        NonFiniteError: an input that is NaN or inf.
        OptionError: a module in training mode runs.

    Example:
        >>> layer = torch.nn.Linear(2, 1).eval()
        >>> linear_grams(layer, dict(layer.named_parameters()), [torch.tensor([[2.0, 0.0], [0.0, 4.0]])]).matrices
        {'weight': tensor([[2., 0.],
                [0., 8.]], dtype=torch.float64)}

    Reference:
        Jin et al., Dataless Knowledge Fusion by Merging Weights of Language Models, 2022,
        https://arxiv.org/abs/2212.09849
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
        raise DegenerateError("no batches to collect statistics from")
    if not watch.sums:
        raise DegenerateError(
            "none of the given weights was multiplied with: are these the model's own tensors? A state dict is a copy; "
            "give dict(module.named_parameters())"
        )
    return Grams({name: total / watch.counts[name] for name, total in watch.sums.items()}, watch.transposed)


class _Watch(TorchDispatchMode):
    """Adds up the inputs' Gram matrices of every matrix product with one of the weights."""

    def __init__(self, params: Mapping[str, Tensor]) -> None:
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
            raise NonFiniteError(f"the input of {name!r} is NaN or inf")
        gram = rows.T @ rows
        self.sums[name] = self.sums[name] + gram if name in self.sums else gram
        self.counts[name] = self.counts.get(name, 0) + len(rows)
        # x @ W.T has the weight's memory read the other way round; x @ W as it is
        self.transposed[name] = factor.stride() == weight.stride()


@runs("tensor")
def regmean(
    stack: Tensor,
    gram: Sequence[Tensor] | None = None,
    *,
    off_diagonal: float = 0.9,
    ridge: float = 1e-6,
    transposed: bool = False,
) -> Tensor:
    """RegMean: the linear map whose outputs are nearest to those of all, each on its own inputs.

    `W = (sum_i W_i G_i) (sum_i G_i)^-1` for weights `(out, in)`, with each Gram matrix's off-diagonal entries scaled
    down and a ridge of `ridge` times the mean diagonal added, so that inputs which are always zero get the mean. It is
    linear, so it merges task vectors as it merges weights. Tensors without a Gram matrix are averaged.

    Args:
        stack: `(n, out, in)` weights or task vectors, any float dtype; any shape where there is no Gram matrix.
        gram: n matrices `(in, in)`, such as `linear_grams(...).matrices` of each model, as a list of mappings.
        off_diagonal: what off-diagonal entries are multiplied by, in [0, 1]: 0.9 in the paper (second-hand), 0.1 in
            BadMerging's code.
        ridge: relative to the mean diagonal of all.
        transposed: the weights are `(in, out)`.

    Returns:
        `(*shape)`, the dtype of the stack.

    Raises:
        MismatchError: a Gram matrix that does not fit the weights.
        DegenerateError: without a ridge, matrices whose sum is singular.
        RangeError: an option outside its range, a wrong number of matrices.

    Example:
        >>> stack = torch.tensor([[[1.0, 1.0]], [[3.0, 3.0]]])
        >>> regmean(stack, [torch.diag(torch.tensor([1.0, 0.0])), torch.eye(2)], ridge=0.0)
        tensor([[2., 3.]])

    Reference:
        Jin et al., 2022, https://arxiv.org/abs/2212.09849
    """
    if not 0 <= off_diagonal <= 1 or not ridge >= 0:
        raise RangeError(f"off_diagonal is in [0, 1] and ridge at least 0, not {off_diagonal!r} and {ridge!r}")
    if gram is None:
        return mean(stack)
    if len(gram) != len(stack):
        raise RangeError(f"{len(gram)} Gram matrices for {len(stack)} models; give one for each")
    weights = stack.transpose(1, 2) if transposed and stack.ndim == 3 else stack
    inputs = weights.shape[-1]
    if weights.ndim != 3 or any(g.shape != (inputs, inputs) for g in gram):
        raise MismatchError(
            f"Gram matrices of {[tuple(g.shape) for g in gram]} do not fit weights of {tuple(stack.shape[1:])}"
        )
    wide = [g.to(device=stack.device, dtype=torch.float64) for g in gram]
    ridges = (
        ridge * torch.stack([g.diagonal().mean() for g in wide]).mean()
    )  # the same for all: a mean where it decides
    matrices = [_conditioned(g, off_diagonal, ridges) for g in wide]
    total = matrices[0].clone()
    product = weights[0].to(torch.float64) @ matrices[0]
    for w, g in zip(weights[1:], matrices[1:], strict=True):
        total += g
        product += w.to(torch.float64) @ g
    try:
        solved: Tensor = cast("Any", torch.linalg).solve(total, product, left=False)
    except RuntimeError as error:  # torch's LinAlgError is one
        raise DegenerateError("the sum of the Gram matrices is singular: give more data, or ridge=1e-6") from error
    merged = solved.transpose(0, 1) if transposed else solved
    return merged.to(stack.dtype)


def _conditioned(gram: Tensor, off_diagonal: float, ridge: Tensor) -> Tensor:
    return off_diagonal * gram + torch.diag((1 - off_diagonal) * gram.diagonal() + ridge)
