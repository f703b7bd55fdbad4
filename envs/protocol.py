"""What an environment is here: pure functions for ONE episode, and a description of what they take and give.

An adapter (one file per suite) turns a suite's environment into an `Environment`; nothing else knows the suite.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from jax import Array


class Transition(NamedTuple):
    """What one step of an environment gives."""

    observation: Array  # float32 [*observation_shape]
    state: Any  # pytree of the environment
    reward: Array  # float32 []
    terminated: Array  # bool [], the task ended
    truncated: Array  # bool [], the time limit was reached


@dataclasses.dataclass(frozen=True)
class Discrete:
    """Actions 0, ..., n - 1, an int32 scalar."""

    n: int


@dataclasses.dataclass(frozen=True, eq=False)
class Continuous:
    """Actions float32 [*shape] between `low` and `high`, which have that shape and may be infinite."""

    shape: tuple[int, ...]
    low: np.ndarray
    high: np.ndarray


ActionSpace = Discrete | Continuous


@dataclasses.dataclass(frozen=True, eq=False)
class Environment:
    """An environment as pure functions of one episode.

    Args:
        name: the suite's name for it.
        reset: `reset(key) -> (observation, state)`.
        step: `step(key, state, action) -> Transition`; what it gives after an end is not defined.
        observation_shape: shape of one observation.
        action_space: `Discrete` or `Continuous`.
        max_steps: steps after which an episode ends in any case.
    """

    name: str
    _: dataclasses.KW_ONLY
    reset: Callable[[Array], tuple[Array, Any]]
    step: Callable[[Array, Any, Array], Transition]
    observation_shape: tuple[int, ...]
    action_space: ActionSpace
    max_steps: int
