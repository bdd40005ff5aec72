"""Merge rules, for `merge`: `(n, *shape) -> (*shape)`.

All keep the dtype and never change their input. `weights` are n numbers, one per vector. For `scope`, see
`taskvec.rules`.
"""

from ._balance import pcb as pcb
from ._balance import sce as sce
from ._choice import consensus as consensus
from ._choice import magmax as magmax
from ._localized import consensus_ta as consensus_ta
from ._localized import consensus_ties as consensus_ties
from ._localized import localize_and_stitch as localize_and_stitch
from ._lowrank import cart as cart
from ._lowrank import iso_c as iso_c
from ._lowrank import iso_cts as iso_cts
from ._lowrank import star as star
from ._lowrank import subspace_boosting as subspace_boosting
from ._lowrank import tsv_m as tsv_m
from ._masks import breadcrumbs as breadcrumbs
from ._masks import dare as dare
from ._masks import della as della
from ._regmean import regmean as regmean
from ._shared_basis import core_space as core_space
from ._shared_basis import dc_merge as dc_merge
from ._shared_basis import knots as knots
from ._solved import actmat as actmat
from ._solved import wudi as wudi
from ._sphere import karcher as karcher
from ._sphere import model_stock as model_stock
from ._sphere import nuslerp as nuslerp
from ._sphere import slerp as slerp
from ._sums import mean as mean
from ._sums import total as total
from ._sums import weighted as weighted
from ._ties import disjoint_mean as disjoint_mean
from ._ties import ties as ties

__all__ = [
    "actmat",
    "breadcrumbs",
    "cart",
    "consensus",
    "consensus_ta",
    "consensus_ties",
    "core_space",
    "dare",
    "dc_merge",
    "della",
    "disjoint_mean",
    "iso_c",
    "iso_cts",
    "karcher",
    "knots",
    "localize_and_stitch",
    "magmax",
    "mean",
    "model_stock",
    "nuslerp",
    "pcb",
    "regmean",
    "sce",
    "slerp",
    "star",
    "subspace_boosting",
    "ties",
    "total",
    "tsv_m",
    "weighted",
    "wudi",
]
