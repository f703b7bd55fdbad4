"""Zeroth-order fine-tuning with forward passes only, on the perturbations of the engine."""

from eggroll.zo.blocks import Blocks
from eggroll.zo.estimators import ESTIMATORS, Estimator
from eggroll.zo.guidance import Guidance, suggest_learning_rate
from eggroll.zo.offload.runner import Offload
from eggroll.zo.optimizers.descent import Descent, scale_by_projected_gradient
from eggroll.zo.optimizers.rebuilt_adam import RebuiltAdam, scale_by_rebuilt_adam
from eggroll.zo.optimizers.subspace_momentum import subspace_momentum
from eggroll.zo.recipes import RECIPES, adamezo, fzoo, grzo, lozo, lozo_m, mezo, spsa15
from eggroll.zo.strategy import ZerothOrder

__all__ = [
    "ESTIMATORS",
    "RECIPES",
    "Blocks",
    "Descent",
    "Estimator",
    "Guidance",
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
    "suggest_learning_rate",
]

if __name__ == "zo":
    from eggroll.checkout import alias

    alias("zo")
