"""What a rollout checks before it begins: that environment and policy are as `protocol` and `rollout` describe them.

Reset, one step and the mask are traced abstractly, once per environment, with an action of the declared space. So a wrong
result is an error that names it, not one of the loop that carries it.
"""

import math
import sysconfig
import traceback
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from eggroll.envs.actions import output_size
from eggroll.envs.protocol import (
    ActionSpace,
    Continuous,
    Discrete,
    Environment,
    MultiDiscrete,
    PerAgent,
    Transition,
    is_count,
)
from eggroll.signatures import check_signature

_checked: weakref.WeakSet[Environment] = weakref.WeakSet()
_FOLDERS = (sysconfig.get_path("stdlib"), Path(__file__).parents[1])
ONE_FLAG = " One flag `done` becomes two: terminated where the task ended, truncated where the time limit was reached."


def check_environment(environment: Environment) -> None:
    """Raise TypeError or ValueError, naming the environment, unless its functions take and return what the protocol says."""
    if not isinstance(environment, Environment):
        raise TypeError(f"environment must be an envs.Environment, got {type(environment).__name__}.")
    if environment in _checked:
        return
    about = f"env '{environment.name}'"
    _check_declared(environment)
    for name, arguments in (("reset", ("key",)), ("step", ("key", "state", "action"))):
        _check_call(about, name, getattr(environment, name), arguments)
    for name in ("action_mask", "draw"):
        if getattr(environment, name) is not None:
            _check_call(about, name, getattr(environment, name), ("state",))
    key = jax.eval_shape(lambda: jax.random.key(0))
    start = _trace(about, "reset", environment.reset, key)
    if not isinstance(start, tuple) or len(start) != 2:
        raise ValueError(f"{about}: reset must return (observation, state), got {_describe(start)}.")
    observation, state = start
    _check_observation(environment, observation, "reset")
    if environment.action_mask is not None:
        _check_mask(environment, _trace(about, "action_mask", environment.action_mask, state))
    made = _trace(about, "step", environment.step, key, state, _abstract_action(environment.action_space))
    if getattr(made, "_fields", None) != Transition._fields:
        fields, hint = ", ".join(Transition._fields), ONE_FLAG if isinstance(made, tuple) and len(made) == 4 else ""
        raise ValueError(f"{about}: step must return an envs.Transition({fields}), got {_describe(made)}.{hint}")
    _check_observation(environment, made.observation, "step")
    _check_scalar(about, "reward", made.reward, "a float32 scalar", (jnp.floating, jnp.integer, jnp.bool_), "reward.squeeze()")
    for name in ("terminated", "truncated"):
        _check_scalar(about, name, getattr(made, name), "a bool scalar", (jnp.bool_,), f"{name}.squeeze().astype(bool)")
    check_carried(f"{about}: step must return the state as reset makes it", state, made.state)
    _checked.add(environment)


def check_policy(environment: Environment, policy: Callable, *, recurrent: bool) -> None:
    """Raise TypeError unless a policy can be called as a rollout in an environment calls it."""
    mask = () if environment.action_mask is None else ("mask",)
    check_signature("policy", policy, (*(("memory",) if recurrent else ()), "observation", "key", *mask))


def check_recurrent(memory: Any, result: Any) -> None:
    """Raise ValueError unless a policy with a memory returned `(memory, action)`, its memory as it came."""
    if not isinstance(result, tuple) or len(result) != 2:
        raise ValueError(f"policy has a memory and must return (memory, action), got {_describe(result)}.")
    check_carried("policy must return its memory as it came", memory, result[0])


def check_carried(rule: str, old: Any, new: Any) -> None:
    """Raise ValueError unless what a loop carries keeps its structure, shapes and dtypes; numbers of Python are promoted."""
    structures: list[Any] = [jax.tree.structure(tree) for tree in (old, new)]
    if structures[0] != structures[1]:
        raise ValueError(f"{rule}, {structures[0]}, got {structures[1]}.")
    for (path, before), after in zip(jax.tree.leaves_with_path(old), jax.tree.leaves(new), strict=True):
        promoted = isinstance(before, int | float) or getattr(before, "weak_type", False)
        if jnp.shape(before) != jnp.shape(after) or not (promoted or jnp.result_type(before) == jnp.result_type(after)):
            name = jax.tree_util.keystr(path) or "it"
            raise ValueError(f"{rule}: {name} is {_describe(before)}, got {_describe(after)}.")


def _check_call(about: str, name: str, function: Callable, arguments: tuple[str, ...]) -> None:
    if not callable(function):
        raise TypeError(f"{about}: {name} must be a function, got {type(function).__name__}.")
    try:
        check_signature(name, function, arguments)
    except TypeError as error:
        raise TypeError(f"{about}: {error}") from None


def _trace(about: str, name: str, function: Callable, *arguments: Any) -> Any:
    """Shapes and dtypes of a function's result.

    Raises:
        TypeError: the function needs values that JAX has not computed yet.
        ValueError: the function raises an error of its own; the message has its type, and the line that raised it.
    """
    try:
        return jax.eval_shape(function, *arguments)
    except (jax.errors.ConcretizationTypeError, jax.errors.TracerArrayConversionError) as error:
        raise TypeError(
            f"{about}: {name} must be a pure JAX function, but it needs the value of an array while it is traced "
            f"({type(error).__name__}); write jnp for np, and jnp.where or jax.lax.cond for if. A simulator in NumPy is played "
            "by envs.Simulator."
        ) from error
    except Exception as error:
        raise ValueError(f"{about}: {describe_error(name, error)}") from error


def describe_error(name: str, error: Exception) -> str:
    """Describe an error of an author's function: its type, and the last line that is not of an installed package."""
    lines = [line for line in traceback.extract_tb(error.__traceback__) if not _is_installed(line.filename)]
    where = f" ({Path(lines[-1].filename).name}, line {lines[-1].lineno})" if lines else ""
    return f"{name} raised {type(error).__name__}: {' '.join(str(error).split())[:500]}{where}"


def _is_installed(file: str) -> bool:
    """Whether code is of Python or of a package, this one included, rather than of an author."""
    installed = {"site-packages", "dist-packages"} & {*Path(file).parts}
    return bool(installed) or file.startswith("<") or any(Path(file).is_relative_to(folder) for folder in _FOLDERS)


def _check_declared(environment: Environment) -> None:
    """Check what an environment declares of itself."""
    about, shape, space = f"env '{environment.name}'", environment.observation_shape, environment.action_space
    if not isinstance(shape, tuple) or not all(isinstance(size, int) for size in shape):
        raise TypeError(f"{about}: observation_shape must be a tuple of integers, such as (4,), got {shape!r}.")
    if not isinstance(space, ActionSpace):
        names = ", ".join(f"envs.{kind.__name__}" for kind in (Discrete, Continuous, MultiDiscrete, PerAgent))
        raise TypeError(f"{about}: action_space must be one of {names}, got {type(space).__name__}.")
    inner = space.space if isinstance(space, PerAgent) else space
    if isinstance(space, PerAgent):
        _check_sizes(about, "agents", (space.agents,))
        if shape[:1] != (space.agents,):
            raise ValueError(f"{about}: observation_shape must begin with its {space.agents} agents, got {shape}.")
    if isinstance(inner, Discrete):
        _check_sizes(about, "n", (inner.n,))
    if isinstance(inner, MultiDiscrete):
        _check_sizes(about, "sizes", inner.sizes)
    if isinstance(inner, Continuous):
        _check_bounds(about, inner)


def _check_sizes(about: str, name: str, sizes: Any) -> None:
    """Check numbers of actions or agents."""
    if not isinstance(sizes, Iterable) or not (counts := list(sizes)) or not all(map(is_count, counts)):
        expected = "integers >= 1" if name == "sizes" else "an integer >= 1"
        raise ValueError(f"{about}: {name} of action_space must be {expected}, got {sizes if name == 'sizes' else sizes[0]!r}.")


def _check_bounds(about: str, space: Continuous) -> None:
    """Check the bounds of continuous actions."""
    if not tuple(space.shape) == jnp.shape(space.low) == jnp.shape(space.high):
        raise ValueError(
            f"{about}: the bounds of continuous actions must be arrays of their shape {tuple(space.shape)}, "
            f"got {jnp.shape(space.low)} and {jnp.shape(space.high)}."
        )
    traced = any(isinstance(bound, jax.core.Tracer) for bound in (space.low, space.high))
    if not traced and not np.all(np.asarray(space.low) <= np.asarray(space.high)):  # NaN is neither
        raise ValueError(f"{about}: low must be at most high in every axis of action_space, got {space.low} and {space.high}.")


def _check_observation(environment: Environment, observation: Any, function: str) -> None:
    declared = tuple(environment.observation_shape)
    if not hasattr(observation, "shape"):
        raise ValueError(
            f"env '{environment.name}': {function} must return the observation as one float32 array {list(declared)}, got "
            f"{_describe(observation)}; join its parts: jnp.concatenate([x.ravel() for x in jax.tree.leaves(observation)])."
        )
    if observation.shape != declared:
        raise ValueError(
            f"env '{environment.name}' must give observations of its observation_shape {declared}, got {observation.shape}."
        )
    if observation.dtype != jnp.float32:
        raise ValueError(
            f"env '{environment.name}' must give observations of dtype float32, got {observation.dtype} from {function}; "
            "convert them: observation.astype(jnp.float32)."
        )


def _check_scalar(about: str, name: str, value: Any, expected: str, kinds: tuple[Any, ...], remedy: str) -> None:
    shape = getattr(value, "shape", None)
    if shape == () and any(jnp.issubdtype(value.dtype, kind) for kind in kinds):
        return
    one = shape is not None and math.prod(shape) == 1
    raise ValueError(f"{about}: {name} must be {expected}, got {_describe(value)}." + f" Convert it: {remedy}." * one)


def _check_mask(environment: Environment, mask: Any) -> None:
    space = environment.action_space
    inner = space.space if isinstance(space, PerAgent) else space
    if isinstance(inner, Continuous):
        return  # of any shape, for a policy of the author's; `choose_action` says that these have none
    shape = (*((space.agents,) if isinstance(space, PerAgent) else ()), output_size(space))
    if getattr(mask, "shape", None) != shape or mask.dtype != jnp.bool_:
        raise ValueError(f"env '{environment.name}': action_mask must return bool{list(shape)}, got {_describe(mask)}.")


def _abstract_action(space: ActionSpace) -> jax.ShapeDtypeStruct:
    """Shape and dtype of an action."""
    if isinstance(space, PerAgent):
        one = _abstract_action(space.space)
        return jax.ShapeDtypeStruct((space.agents, *one.shape), one.dtype)
    if isinstance(space, Discrete):
        return jax.ShapeDtypeStruct((), jnp.int32)
    if isinstance(space, MultiDiscrete):
        return jax.ShapeDtypeStruct((len(space.sizes),), jnp.int32)
    return jax.ShapeDtypeStruct(tuple(space.shape), jnp.float32)


def _describe(value: Any) -> str:
    """The type of a result: "float32[3]", "a tuple of 4 values (float32[3], ...)", "a dict"."""
    if isinstance(value, tuple | list):
        parts = ", ".join(map(_describe, value))
        return f"a {type(value).__name__} of {len(value)} value{'s' * (len(value) != 1)} ({parts})"
    if hasattr(value, "dtype"):
        return f"{value.dtype}{list(value.shape)}"
    return f"a {type(value).__name__}"
