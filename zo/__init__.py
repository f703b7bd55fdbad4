"""Zeroth-order fine-tuning with forward passes only, on the perturbations of the engine."""

from zo.blocks import Blocks
from zo.estimators import ESTIMATORS, Estimator
from zo.offload import Offload
from zo.optimizers import Descent, scale_by_projected_gradient
from zo.rebuilt_adam import RebuiltAdam, scale_by_rebuilt_adam
from zo.recipes import RECIPES, adamezo, fzoo, grzo, lozo, lozo_m, mezo, spsa15
from zo.strategy import ZerothOrder
from zo.subspace_momentum import subspace_momentum

__all__ = [
    "ESTIMATORS",
    "RECIPES",
    "Blocks",
    "Descent",
    "Estimator",
    "Offload",
    "RebuiltAdam",
    "ZerothOrder",
    "adamezo",
    "fzoo",
    "grzo",
    "lozo",
    "lozo_m",
    "mezo",
    "scale_by_projected_gradient",
    "scale_by_rebuilt_adam",
    "spsa15",
    "subspace_momentum",
]
