"""What needs a model and data: Gram matrices for RegMean, AdaMerging, representation surgery, BatchNorm statistics."""

from ._adamerging import adamerging
from ._batchnorm import recalibrate
from ._grams import Grams, linear_grams
from ._surgery import Adapter, repaired, surgery

__all__ = ["Adapter", "Grams", "adamerging", "linear_grams", "recalibrate", "repaired", "surgery"]
