"""Partials that reproduce other implementations, named after them.

Papers and code bases disagree silently on scope, counts, ties, weights and divisors; here each is an argument, and a
preset is nothing but a choice of arguments, which its `repr` shows. They are rules like any other:

    merge(vectors, presets.ties_peft, density=0.2, weights=[1.0, 0.5])

The values they were checked against are in `tests/golden`.
"""

from functools import partial

from .merges import breadcrumbs, dare, della, model_stock, pcb, regmean, ties

__all__ = [
    "breadcrumbs_mergekit",
    "breadcrumbs_reference",
    "dare_mergekit",
    "dare_paper",
    "della_mergekit",
    "della_paper",
    "model_stock_mergekit",
    "pcb_vision",
    "regmean_badmerging",
    "ties_badmerging",
    "ties_mergekit",
    "ties_peft",
    "ties_reference",
]

ties_reference = partial(ties, scope="global", count="reference", zero="majority")
"""The TIES authors' code (prateeky2806/ties-merging): the threshold of the whole vector, kept with all that are equal
to it; exact zeros take the majority's sign. Where even the majority is tied, their comparison keeps the negatives; here
no entry is kept."""

ties_badmerging = partial(ties, scope="global", count="reference", zero="majority", reduce="sum")
"""TIES as BadMerging's code and fusion_bench run it: a sum over those that agree, applied at scale 0.3."""

ties_peft = partial(ties, scope="tensor", count="floor", zero="positive")
"""PEFT: per tensor; zeros elect +; weights multiply after the election and the divisor is a count."""

ties_mergekit = partial(
    ties, scope="tensor", count="at_least_one", zero="positive", weighted_vote=True, reduce="weighted_mean_or_sum"
)
"""mergekit: per tensor, of which at least one entry is kept; zeros elect +; weights vote, and the divisor is the sum of
those that agree, or 1 where that is 0."""

breadcrumbs_reference = partial(breadcrumbs, scope="row", count="floor")
"""The Model Breadcrumbs authors' code. Its rows are along the last dimension: the same as here for matrices and
vectors, not for tensors of more dimensions."""

breadcrumbs_mergekit = partial(breadcrumbs, scope="tensor", count="floor", first="density")
"""mergekit: per tensor. Where both fractions exceed the tensor together, fewer outliers are dropped."""

dare_paper = partial(dare, rescale="density")
"""The DARE authors' code (MergeLM), and PEFT: survivors are divided by the density. The vectors are added up."""

dare_mergekit = partial(dare, rescale="l1")
"""mergekit: the L1 norm of each tensor is restored, in place of dividing by the density."""

della_paper = partial(della, rescale="density")
"""The DELLA authors' code: survivors are divided by their own probability."""

della_mergekit = partial(della, rescale="l1", zero="positive", weighted_vote=True, reduce="weighted_mean_or_sum")
"""mergekit: the L1 norm of each tensor is restored; zeros elect +; weights vote and divide, as in its TIES. Its epsilon
is half the width of the window, which must not touch 0 or 1 there."""

model_stock_mergekit = partial(model_stock, extrapolate=True)
"""mergekit: it goes backwards where the mean cosine is negative. Tensor by tensor, or row by row (its `filter_wise`:
`scope="row"`). (It takes vectors with a product of norms below 1e-6 for shorter than they are.)"""

regmean_badmerging = partial(regmean, off_diagonal=0.1)
"""RegMean as BadMerging's code runs it: entries off the diagonal are multiplied by 0.1."""

pcb_vision = partial(pcb, density=0.05, clamp=0.01)
"""PCB as the authors' code for images runs it."""


def __dir__() -> list[str]:  # completion shows what is public
    return __all__
