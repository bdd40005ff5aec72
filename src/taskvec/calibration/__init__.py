"""What needs a model and unlabelled data: statistics for merges, coefficients and adapters that are learned."""

from ._adamerging import adamerging as adamerging
from ._batchnorm import recalibrate as recalibrate
from ._grams import Grams as Grams
from ._grams import linear_grams as linear_grams
from ._surgery import Adapter as Adapter
from ._surgery import repaired as repaired
from ._surgery import surgery as surgery

__all__ = [
    "Adapter",
    "Grams",
    "adamerging",
    "linear_grams",
    "recalibrate",
    "repaired",
    "surgery",
]
