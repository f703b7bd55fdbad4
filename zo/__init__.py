"""Zeroth-order fine-tuning with forward passes only, on the perturbations of the engine."""

from zo.estimators import ESTIMATORS, Estimator
from zo.optimizers import scale_by_projected_gradient, zo_optimizer
from zo.recipes import RECIPES, fzoo, lozo, mezo, spsa15
from zo.strategy import ZerothOrder

__all__ = [
    "ESTIMATORS",
    "RECIPES",
    "Estimator",
    "ZerothOrder",
    "fzoo",
    "lozo",
    "mezo",
    "scale_by_projected_gradient",
    "spsa15",
    "zo_optimizer",
]
