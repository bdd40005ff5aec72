"""Merge rules, for `merge`: `(n, *shape) -> (*shape)`.

All keep the dtype and never change their input. `weights` are n numbers, one per vector. For `scope`, see
`taskvec.rules`.
"""

from ._choice import consensus as consensus
from ._choice import magmax as magmax
from ._masks import breadcrumbs as breadcrumbs
from ._masks import dare as dare
from ._masks import della as della
from ._regmean import regmean as regmean
from ._sphere import model_stock as model_stock
from ._sphere import slerp as slerp
from ._sums import mean as mean
from ._sums import total as total
from ._sums import weighted as weighted
from ._ties import disjoint_mean as disjoint_mean
from ._ties import ties as ties

__all__ = [
    "breadcrumbs",
    "consensus",
    "dare",
    "della",
    "disjoint_mean",
    "magmax",
    "mean",
    "model_stock",
    "regmean",
    "slerp",
    "ties",
    "total",
    "weighted",
]
