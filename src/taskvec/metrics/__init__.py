"""What attacks and defenses do, measured with their controls: see docs/protocol.md."""

from ._intervals import Estimate as Estimate
from ._intervals import Roc as Roc
from ._intervals import clustered as clustered
from ._intervals import estimate as estimate
from ._intervals import roc as roc
from ._measure import Measurement as Measurement
from ._measure import measure as measure
from ._measure import sweep as sweep
from ._measure import transfer_matrix as transfer_matrix
from ._rates import Rate as Rate
from ._rates import accuracy as accuracy
from ._rates import attack_success_rate as attack_success_rate
from ._rates import predictor as predictor
from ._similarity import by_layer as by_layer
from ._similarity import coefficients as coefficients
from ._similarity import cosine_matrix as cosine_matrix
from ._similarity import projection as projection
from ._similarity import sign_agreement as sign_agreement
from ._similarity import spectrum as spectrum
from ._similarity import support_overlap as support_overlap

__all__ = [
    "Estimate",
    "Measurement",
    "Rate",
    "Roc",
    "accuracy",
    "attack_success_rate",
    "by_layer",
    "clustered",
    "coefficients",
    "cosine_matrix",
    "estimate",
    "measure",
    "predictor",
    "projection",
    "roc",
    "sign_agreement",
    "spectrum",
    "support_overlap",
    "sweep",
    "transfer_matrix",
]
