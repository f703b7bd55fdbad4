"""Train any JAX model without backpropagation: evolution strategies with low-rank perturbations."""

from eggroll.noise.plan import Plan
from eggroll.noise.rules import Dense, Flipout, Frozen, Integer, LowRank
from eggroll.population.members import Population
from eggroll.population.metrics import Metrics
from eggroll.runs.durable import DurableRun
from eggroll.runs.external import External
from eggroll.runs.training import train
from eggroll.state import ESState, copy_state
from eggroll.strategy import EvolutionStrategy
from eggroll.update.anchor import anchored_decay
from eggroll.update.estimator import paper_learning_rate
from eggroll.update.feedback import Feedback
from eggroll.update.shaping import SHAPINGS, centered_ranks, group_relative, pair_sign, z_score
from eggroll.update.sign_steps import standardised_sign
from eggroll.update.threshold import threshold
from eggroll.version import VERSION

__version__ = VERSION
__all__ = [
    "SHAPINGS",
    "Dense",
    "DurableRun",
    "ESState",
    "EvolutionStrategy",
    "External",
    "Feedback",
    "Flipout",
    "Frozen",
    "Integer",
    "LowRank",
    "Metrics",
    "Plan",
    "Population",
    "anchored_decay",
    "centered_ranks",
    "copy_state",
    "group_relative",
    "pair_sign",
    "paper_learning_rate",
    "standardised_sign",
    "threshold",
    "train",
    "z_score",
]
