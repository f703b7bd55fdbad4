"""From the output of a policy network to an action.

    discrete      argmax of the logits, or a draw from their softmax
    continuous    a squashed value, low + (high - low) (tanh(u) + 1) / 2; u is the output, or a normal draw around it

An axis without finite bounds is not squashed.
"""

import math

import jax
import jax.numpy as jnp
from jax import Array

from envs.protocol import ActionSpace, Continuous, Discrete


def output_size(space: ActionSpace, *, sampled: bool = False) -> int:
    """Return how many outputs a policy network needs: logits, or values, and their log standard deviations when sampled."""
    if isinstance(space, Discrete):
        return space.n
    return math.prod(space.shape) * (2 if sampled else 1)


def choose_action(space: ActionSpace, output: Array, *, key: Array | None = None) -> Array:
    """Choose an action from the output of a policy network.

    Args:
        space: the environment's action space.
        output: [output_size] floats; the outputs of a sampled policy serve for its deterministic action as well.
        key: consumed to sample the action; None: the deterministic action.

    Returns:
        int32 [] for `Discrete`, float32 [*shape] for `Continuous`.

    Raises:
        ValueError: `output` has another size than `output_size` tells.
    """
    sizes = {output_size(space, sampled=sampled) for sampled in ((True,) if key is not None else (False, True))}
    if output.ndim != 1 or output.size not in sizes:
        expected = " or ".join(f"({size},)" for size in sorted(sizes))
        raise ValueError(f"output must have shape {expected} for this action space, got {output.shape}.")
    if isinstance(space, Discrete):
        action = jnp.argmax(output) if key is None else jax.random.categorical(key, output)
        return action.astype(jnp.int32)
    value = output[: output_size(space)]
    if key is not None:
        log_std = output[output_size(space) :]
        value = value + jnp.exp(log_std) * jax.random.normal(key, value.shape, value.dtype)
    return _squash(space, value.astype(jnp.float32).reshape(space.shape))


def _squash(space: Continuous, value: Array) -> Array:
    low, high = jnp.asarray(space.low, jnp.float32), jnp.asarray(space.high, jnp.float32)
    bounded = jnp.isfinite(low) & jnp.isfinite(high)
    low, high = jnp.where(bounded, low, 0.0), jnp.where(bounded, high, 0.0)
    return jnp.where(bounded, low + (high - low) * (jnp.tanh(value) + 1.0) / 2.0, value)
