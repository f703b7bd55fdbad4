"""`Simulator`: copies of an environment written in NumPy, with gymnasium's interface, stepped together.

The policy is called once a step, with the observations of all copies, so that JAX computes all actions at once. It need not
come from JAX. This file imports gymnasium only to make an environment by its name.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from eggroll.envs.checks import ONE_FLAG
from eggroll.envs.protocol import ActionSpace, Continuous, Discrete, MultiDiscrete

RESULT = "(observation, reward, terminated, truncated, info)"


class Played(NamedTuple):
    """One finished episode of every copy."""

    total_reward: np.ndarray  # float64 [copies], NaN where a reward or an observation was not finite
    steps: np.ndarray  # int64 [copies]


class Simulator:
    """Copies of a NumPy environment. It can be pickled: the copies are made again where it is unpickled.

    Args:
        make: a name of gymnasium such as "CartPole-v1", or a function without arguments that returns an environment. Its
            episodes must end; `gymnasium.wrappers.TimeLimit` ends them.
        copies: number of environments, at least 1.

    Attributes:
        observation_shape: of one observation.
        action_space: as `Environment.action_space`, for `choose_action` and `output_size`.

    Raises:
        ModuleNotFoundError: `make` is a name and gymnasium is not installed.
        TypeError: `make` or what it returns is something else.
        ValueError: `copies` is not positive, `make` returns one environment twice, or observations or actions are of another
            kind than arrays and choices.
    """

    def __init__(self, make: str | Callable[[], Any], *, copies: int):
        if not isinstance(copies, int) or copies < 1:
            raise ValueError(f"copies must be an integer >= 1, got {copies!r}.")
        self.name, self._make, self.copies = make if isinstance(make, str) else "", make, copies
        self._envs = [_make(make) for _ in range(copies)]
        if len({id(env) for env in self._envs}) < copies:
            raise ValueError("make must return another environment at every call, got one twice.")
        self.name = self.name or _name_of(self._envs[0])
        self.observation_shape = _observation_shape(self.name, self._envs[0].observation_space)
        self.action_space = _action_space(self.name, self._envs[0].action_space)

    def __getstate__(self) -> dict[str, Any]:
        return {"make": self._make, "copies": self.copies}

    def __setstate__(self, saved: dict[str, Any]) -> None:
        self.__init__(saved["make"], copies=saved["copies"])  # type: ignore[misc]

    def play(self, policy: Callable[..., Any], *, seeds: Sequence[int] | np.ndarray, memory: Any = None) -> Played:
        """Play one episode in every copy.

        Args:
            policy: `policy(observations) -> actions`: float32 [copies, *observation_shape] to [copies, ...], as
                `choose_action` returns them for one. A copy whose episode has ended shows its last observation, and its action
                is ignored.
            seeds: integers [copies], of the starts of the episodes. The two members of an antithetic pair should have the same.
            memory: initial memory of a recurrent policy, of all copies; the policy is then called
                `policy(memory, observations) -> (memory, actions)`. None: the policy has no memory.

        Returns:
            `Played`. A reward or an observation that is not finite ends an episode with the return NaN.

        Raises:
            ValueError: the seeds are not [copies], the actions are not those of the space, or the environment returns something
                else than gymnasium's do. Errors that it raises itself are passed on.
        """
        seeds = np.asarray(seeds)
        if seeds.shape != (self.copies,):
            raise ValueError(f"seeds must have shape ({self.copies},), one for each copy, got {seeds.shape}.")
        observations = np.stack([self._reset(env, int(seed)) for env, seed in zip(self._envs, seeds, strict=True)])
        total, steps = np.zeros(self.copies), np.zeros(self.copies, np.int64)
        running = np.isfinite(observations).reshape(self.copies, -1).all(axis=1)
        total[~running] = np.nan
        while running.any():
            if memory is None:
                actions = policy(observations)
            else:
                memory, actions = policy(memory, observations)
            actions = np.asarray(actions)
            self._check_actions(actions)
            observations = observations.copy()  # the last ones may be in use by an asynchronous computation
            for index in np.flatnonzero(running):
                observations[index], reward, ended = self._step(self._envs[index], actions[index])
                finite = np.isfinite(reward) and np.isfinite(observations[index]).all()
                total[index] += reward if finite else np.nan
                steps[index] += 1
                running[index] = finite and not ended
        return Played(total, steps)

    def close(self) -> None:
        """Close the environments."""
        for env in self._envs:
            env.close()

    def _check_actions(self, actions: np.ndarray) -> None:
        space, given = self.action_space, f"got {actions.dtype}{list(actions.shape)}"
        if isinstance(space, Continuous):
            kind, shape, fits = "numbers", (self.copies, *space.shape), actions.dtype.kind in "biufV"  # V: bfloat16
        else:
            sizes = (len(space.sizes),) if isinstance(space, MultiDiscrete) else ()
            kind, shape, fits = "integers", (self.copies, *sizes), actions.dtype.kind in "biu"
        if not fits or actions.shape != shape:
            raise ValueError(f"policy must return {kind} {list(shape)} for env '{self.name}', as choose_action does, {given}.")

    def _reset(self, env: Any, seed: int) -> np.ndarray:
        made = env.reset(seed=seed)
        if not isinstance(made, tuple) or len(made) != 2:
            raise ValueError(f"env '{self.name}': reset must return (observation, info), as in gymnasium, got {_kind(made)}.")
        return self._observation(made[0])

    def _step(self, env: Any, action: np.ndarray) -> tuple[np.ndarray, float, bool]:
        made = env.step(_native(env.action_space, action))
        if not isinstance(made, tuple) or len(made) != 5:
            hint = ONE_FLAG if isinstance(made, tuple) and len(made) == 4 else ""
            raise ValueError(f"env '{self.name}': step must return {RESULT}, as in gymnasium, got {_kind(made)}.{hint}")
        observation, reward, terminated, truncated, _ = made
        if np.shape(reward) != ():
            raise ValueError(f"env '{self.name}': reward must be a number, got an array of shape {np.shape(reward)}.")
        for name, flag in (("terminated", terminated), ("truncated", truncated)):
            if not isinstance(flag, bool | np.bool_):
                raise ValueError(f"env '{self.name}': {name} must be a bool, got {type(flag).__name__}.")
        return self._observation(observation), float(reward), bool(terminated or truncated)

    def _observation(self, observation: Any) -> np.ndarray:
        if np.shape(observation) != self.observation_shape:
            raise ValueError(
                f"env '{self.name}' must give observations of its observation_space, {self.observation_shape}, "
                f"got {np.shape(observation)}."
            )
        return np.asarray(observation, np.float32)


def _make(make: str | Callable[[], Any]) -> Any:
    if isinstance(make, str):
        import gymnasium

        env = gymnasium.make(make)
    elif callable(make):
        env = make()
    else:
        raise TypeError(f"make must be a name of gymnasium or a function that returns an environment, got {_kind(make)}.")
    missing = [name for name in ("reset", "step", "observation_space", "action_space") if not hasattr(env, name)]
    if missing:
        raise TypeError(f"make must return an environment of gymnasium's interface, got {_kind(env)} without {missing[0]}.")
    return env


def _name_of(env: Any) -> str:
    spec = getattr(env, "spec", None)
    return spec.id if spec is not None else type(env).__name__


def _kind(value: Any) -> str:
    return f"{len(value)} values" if isinstance(value, tuple) else type(value).__name__


def _observation_shape(name: str, space: Any) -> tuple[int, ...]:
    if type(space).__name__ != "Box":
        raise ValueError(
            f"env '{name}' has observations of the space {type(space).__name__}, expected a Box, one array; "
            "gymnasium.wrappers.FlattenObservation makes one of it."
        )
    return tuple(space.shape)


def _action_space(name: str, space: Any) -> ActionSpace:
    kind = type(space).__name__
    if kind == "Discrete":
        return Discrete(int(space.n))
    if kind == "Box":
        return Continuous(tuple(space.shape), np.asarray(space.low, np.float32), np.asarray(space.high, np.float32))
    if kind == "MultiDiscrete" and len(space.shape) == 1:
        return MultiDiscrete(tuple(int(n) for n in space.nvec))
    raise ValueError(f"env '{name}' has actions of the space {kind}, expected Discrete, Box or a MultiDiscrete of one axis.")


def _native(space: Any, action: np.ndarray) -> Any:
    """An action as the environment takes it: choices may start at another number than 0."""
    if type(space).__name__ == "Box":
        return action.astype(space.dtype).reshape(space.shape)
    native = action + getattr(space, "start", 0)
    return int(native) if native.ndim == 0 else native.astype(np.int64)
