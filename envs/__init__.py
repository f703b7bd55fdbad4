"""Environments for policies in JAX: one protocol, one adapter per suite, rollouts and observation normalisation.

This package knows arrays, not populations.
"""

from envs.actions import choose_action, output_size
from envs.normalisation import (
    ObservationStatistics,
    ObservationSums,
    initial_statistics,
    merge,
    normalise,
)
from envs.protocol import ActionSpace, Continuous, Discrete, Environment, Transition
from envs.registry import make
from envs.rollout import Episode, run_episode, run_episodes

__all__ = [
    "ActionSpace",
    "Continuous",
    "Discrete",
    "Environment",
    "Episode",
    "ObservationStatistics",
    "ObservationSums",
    "Transition",
    "choose_action",
    "initial_statistics",
    "make",
    "merge",
    "normalise",
    "output_size",
    "run_episode",
    "run_episodes",
]
