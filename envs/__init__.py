"""Environments for policies in JAX: one protocol, one adapter per suite, rollouts and observation normalisation.

This package knows arrays, not populations.
"""

from eggroll.envs.actions import choose_action, output_size
from eggroll.envs.checks import check_environment
from eggroll.envs.normalisation import ObservationStatistics, ObservationSums, initial_statistics, merge, normalise
from eggroll.envs.policy import input_size, network_policy
from eggroll.envs.protocol import (
    ActionSpace,
    Continuous,
    Discrete,
    Environment,
    MultiDiscrete,
    PerAgent,
    Transition,
    with_time_limit,
)
from eggroll.envs.registry import is_installed, make, names, register
from eggroll.envs.rollout import Episode, run_episode, run_episodes
from eggroll.envs.simulator import Simulator

__all__ = [
    "ActionSpace",
    "Continuous",
    "Discrete",
    "Environment",
    "Episode",
    "MultiDiscrete",
    "ObservationStatistics",
    "ObservationSums",
    "PerAgent",
    "Simulator",
    "Transition",
    "check_environment",
    "choose_action",
    "initial_statistics",
    "input_size",
    "is_installed",
    "make",
    "merge",
    "names",
    "network_policy",
    "normalise",
    "output_size",
    "register",
    "run_episode",
    "run_episodes",
    "with_time_limit",
]

if __name__ == "envs":
    from eggroll.checkout import alias

    alias("envs")
