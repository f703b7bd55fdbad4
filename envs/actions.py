"""From the output of a policy network to an action.

    discrete        argmax of the logits, or a draw from their softmax
    multi-discrete  the same for every choice; its logits are concatenated
    continuous      a squashed value, low + (high - low) (tanh(u) + 1) / 2; u is the output, or a normal draw around it
    per agent       the same for every row of the output

An axis with an infinite bound is clipped to the other one, not squashed. A masked action has the logit -inf.
"""

import itertools
import math

import jax
import jax.numpy as jnp
from jax import Array

from eggroll.envs.protocol import ActionSpace, Continuous, Discrete, MultiDiscrete, PerAgent


def output_size(space: ActionSpace, *, sampled: bool = False) -> int:
    """Return how many outputs a policy network needs: logits, or values, and their log standard deviations if sampled.

    With `PerAgent` it is the number for one agent.
    """
    if isinstance(space, PerAgent):
        return output_size(space.space, sampled=sampled)
    if isinstance(space, Discrete):
        return space.n
    if isinstance(space, MultiDiscrete):
        return sum(space.sizes)
    return math.prod(space.shape) * (2 if sampled else 1)


def choose_action(space: ActionSpace, output: Array, *, key: Array | None = None, mask: Array | None = None) -> Array:
    """Choose an action from the output of a policy network.

    Args:
        space: the environment's action space.
        output: [output_size] floats, [agents, output_size] for `PerAgent`; the outputs of a sampled policy serve for its
            deterministic action as well.
        key: consumed to sample the action; None: the deterministic action.
        mask: bool, of the shape of the logits, as the environment's `action_mask` returns it; None: every action is allowed.
            A mask that allows no action is ignored.

    Returns:
        int32 [] for `Discrete`, int32 [choices] for `MultiDiscrete`, float32 [*shape] for `Continuous`; with a leading
        axis of agents for `PerAgent`.

    Raises:
        ValueError: `output` does not have the size `output_size`, or `mask` not the shape of the logits.
    """
    sizes = {output_size(space, sampled=sampled) for sampled in ((True,) if key is not None else (False, True))}
    leading = (space.agents,) if isinstance(space, PerAgent) else ()
    if output.shape not in {(*leading, size) for size in sizes}:
        expected = " or ".join(f"{(*leading, size)}" for size in sorted(sizes))
        raise ValueError(f"output must have shape {expected} for this action space, got {output.shape}.")
    if mask is not None and mask.shape != output.shape:
        raise ValueError(f"mask must have the shape {output.shape} of the logits, got {mask.shape}.")
    if isinstance(space, PerAgent):
        keys = None if key is None else jax.random.split(key, space.agents)
        one = jax.vmap(lambda output, key, mask: choose_action(space.space, output, key=key, mask=mask))
        return one(output, keys, mask)
    if isinstance(space, Discrete):
        return _choose(output, key, mask)
    if isinstance(space, MultiDiscrete):
        return _choose_each(space.sizes, output, key, mask)
    if mask is not None:
        raise ValueError("mask must be None for continuous actions.")
    return _continuous(space, output, key)


def _choose(logits: Array, key: Array | None, mask: Array | None) -> Array:
    if mask is not None:
        logits = jnp.where(mask | ~mask.any(), logits, -jnp.inf)
    action = jnp.argmax(logits) if key is None else jax.random.categorical(key, logits)
    return action.astype(jnp.int32)


def _choose_each(sizes: tuple[int, ...], logits: Array, key: Array | None, mask: Array | None) -> Array:
    ends = list(itertools.accumulate(sizes))
    parts = [slice(end - size, end) for size, end in zip(sizes, ends, strict=True)]
    keys = [None] * len(sizes) if key is None else list(jax.random.split(key, len(sizes)))
    masks = [None if mask is None else mask[part] for part in parts]
    return jnp.stack([_choose(logits[part], k, m) for part, k, m in zip(parts, keys, masks, strict=True)])


def _continuous(space: Continuous, output: Array, key: Array | None) -> Array:
    value = output[: output_size(space)]
    if key is not None:
        log_std = output[output_size(space) :]
        value = value + jnp.exp(log_std) * jax.random.normal(key, value.shape, value.dtype)
    return _squash(space, value.astype(jnp.float32).reshape(space.shape))


def _squash(space: Continuous, value: Array) -> Array:
    low, high = jnp.asarray(space.low, jnp.float32), jnp.asarray(space.high, jnp.float32)
    bounded, clipped = jnp.isfinite(low) & jnp.isfinite(high), jnp.clip(value, low, high)
    low, high = jnp.where(bounded, low, 0.0), jnp.where(bounded, high, 0.0)
    return jnp.where(bounded, low + (high - low) * (jnp.tanh(value) + 1.0) / 2.0, clipped)
