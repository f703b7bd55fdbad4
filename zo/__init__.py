"""Zeroth-order fine-tuning with forward passes only, on the perturbations of the engine."""

from zo.blocks import Blocks
from zo.estimators import ESTIMATORS, Estimator
from zo.offload import Offload
from zo.optimizers import Descent, scale_by_projected_gradient
from zo.recipes import RECIPES, fzoo, grzo, lozo, mezo, spsa15
from zo.strategy import ZerothOrder

__all__ = [
    "ESTIMATORS",
    "RECIPES",
    "Blocks",
    "Descent",
    "Estimator",
    "Offload",
    "ZerothOrder",
    "fzoo",
    "grzo",
    "lozo",
    "mezo",
    "scale_by_projected_gradient",
    "spsa15",
]
