"""Metrics: accuracy, attack success rate and their controls, uncertainty over seeds, and how alike vectors are."""

from ._intervals import Estimate, Roc, clustered, estimate, roc
from ._measure import Measurement, measure, sweep, transfer_matrix
from ._rates import Rate, accuracy, attack_success_rate, predictor
from ._similarity import (
    by_layer,
    coefficients,
    cosine_matrix,
    projection,
    sign_agreement,
    spectrum,
    support_overlap,
)

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
