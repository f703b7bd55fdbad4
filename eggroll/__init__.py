"""Train any JAX model without backpropagation: evolution strategies with low-rank perturbations."""

from eggroll.anchor import anchored_decay
from eggroll.durable import DurableRun
from eggroll.estimator import paper_learning_rate
from eggroll.external import External
from eggroll.members import Population
from eggroll.metrics import Metrics
from eggroll.plan import Plan
from eggroll.rules import Dense, Flipout, Frozen, Integer, LowRank
from eggroll.shaping import SHAPINGS, centered_ranks, group_relative, pair_sign, z_score
from eggroll.sign_steps import standardised_sign
from eggroll.state import ESState
from eggroll.strategy import EvolutionStrategy
from eggroll.threshold import threshold
from eggroll.training import train

__version__ = "0.1.0"
__all__ = [
    "SHAPINGS",
    "Dense",
    "DurableRun",
    "ESState",
    "EvolutionStrategy",
    "External",
    "Flipout",
    "Frozen",
    "Integer",
    "LowRank",
    "Metrics",
    "Plan",
    "Population",
    "anchored_decay",
    "centered_ranks",
    "group_relative",
    "pair_sign",
    "paper_learning_rate",
    "standardised_sign",
    "threshold",
    "train",
    "z_score",
]
