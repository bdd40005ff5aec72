"""What one needs to write a rule.

A rule is a function of stacked tensors, `(n, *shape) -> (*shape)`, and a sparsifier ("leaf") one of a single tensor,
`(*shape) -> (*shape)`. Any such function can be given to `merge` or `TaskVector.map`; it then gets whole tensors. A
rule that can also run on pieces says so with a mark, which makes it faster, and lets it stream tensors larger than
memory:

    @runs("element")
    def halves(stack):
        return stack[0] / 2 + stack[1] / 2

A rule that needs something of the whole scope lists a statistic in its mark and asks for it through `at`:

    def block_sums(stack, at):              # of one block, (n, m)
        return stack.abs().sum(1, dtype=torch.float64)

    def l1(n, entries):                     # a generator of passes; `over` is one that adds up
        return (yield from over(block_sums))

    @runs("element", l1)
    def by_l1(stack, *, scope="tensor", at=HERE):
        ...at.take(l1, stack)...            # over the scope in merge(), of the stack itself in a plain call
"""

from typing import Literal, TypeAlias

from ._engine.marks import Mark, mark_of, runs
from ._engine.pieces import HERE, Look, Place
from ._engine.random import fold
from ._engine.select import masked
from ._engine.totals import lockstep, over, sum64

__all__ = ["HERE", "Look", "Mark", "Place", "Scope", "fold", "lockstep", "mark_of", "masked", "over", "runs", "sum64"]

Scope: TypeAlias = Literal["global", "tensor", "row"]
"""What "everything" means to a statistic: all names of the call, one tensor, or one slice along dim 0 of a tensor
(flattened; 1-D and 0-d tensors are one row)."""


def __dir__() -> list[str]:  # completion shows what is public
    return __all__
