"""Train any JAX model without backpropagation: evolution strategies with low-rank perturbations."""

from eggroll.plan import Dense, Frozen, LowRank, Plan
from eggroll.shaping import SHAPINGS, centered_ranks, group_relative, pair_sign, z_score
from eggroll.strategy import ESState, EvolutionStrategy, Metrics, Population, paper_learning_rate

__version__ = "0.1.0"
__all__ = [
    "SHAPINGS",
    "Dense",
    "ESState",
    "EvolutionStrategy",
    "Frozen",
    "LowRank",
    "Metrics",
    "Plan",
    "Population",
    "centered_ranks",
    "group_relative",
    "paper_learning_rate",
    "pair_sign",
    "z_score",
]
