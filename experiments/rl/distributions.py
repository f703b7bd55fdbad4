"""The stochastic policy that PPO trains: distributions of actions from the output of a network.

    discrete        softmax of the logits            raw action: int32 []
    multi-discrete  a softmax for every choice       raw action: int32 [choices]
    continuous      normal(output, exp(log_std))     raw action: float32 [size], squashed into the space by `envs.choose_action`
    per agent       the same for every agent, independent given the observation: log probabilities add up

The squashing is the same for old and new parameters, so it cancels from the ratio of probabilities; entropies are those of the
raw action. Masked actions have probability 0.
"""

import itertools
import math

import jax
import jax.numpy as jnp
from jax import Array

from eggroll import envs

MASKED = -1e9  # a logit: probability 0 in float32, but finite, so that entropies and their gradients stay finite


def num_log_stds(space: envs.ActionSpace) -> int:
    """Return how many log standard deviations the policy has: one per continuous action of an agent."""
    if isinstance(space, envs.PerAgent):
        return num_log_stds(space.space)
    return math.prod(space.shape) if isinstance(space, envs.Continuous) else 0


def sample(space: envs.ActionSpace, output: Array, log_std: Array, *, key: Array, mask: Array | None = None) -> Array:
    """Draw a raw action.

    Args:
        space: the environment's action space.
        output: [output_size] floats of the network, [agents, output_size] for `PerAgent`.
        log_std: float32 [num_log_stds].
        key: consumed.
        mask: bool, of the shape of the logits; None: every action is allowed.

    Returns:
        The raw action, with a leading axis of agents for `PerAgent`.
    """
    if isinstance(space, envs.PerAgent):
        one = jax.vmap(lambda output, key, mask: sample(space.space, output, log_std, key=key, mask=mask))
        return one(output, jax.random.split(key, space.agents), mask)
    if isinstance(space, envs.Continuous):
        return output + jnp.exp(log_std) * jax.random.normal(key, output.shape, output.dtype)
    choices = _choices(space, output, mask)
    keys = jax.random.split(key, len(choices))
    drawn = [jax.random.categorical(k, logits).astype(jnp.int32) for k, logits in zip(keys, choices, strict=True)]
    return drawn[0] if isinstance(space, envs.Discrete) else jnp.stack(drawn)


def log_prob_and_entropy(
    space: envs.ActionSpace, output: Array, log_std: Array, raw: Array, *, mask: Array | None = None
) -> tuple[Array, Array]:
    """Return the log probability (density) of a raw action and the entropy of its distribution, float32 [] each."""
    if isinstance(space, envs.PerAgent):
        one = jax.vmap(lambda output, raw, mask: log_prob_and_entropy(space.space, output, log_std, raw, mask=mask))
        of_agents = one(output, raw, mask)
        return of_agents[0].sum(), of_agents[1].sum()
    if isinstance(space, envs.Continuous):
        log_density = -0.5 * jnp.square((raw - output) * jnp.exp(-log_std)) - log_std - 0.5 * math.log(2 * math.pi)
        return log_density.sum(), (log_std + 0.5 * math.log(2 * math.pi * math.e)).sum()
    log_probs = [jax.nn.log_softmax(logits) for logits in _choices(space, output, mask)]
    chosen = [p[index] for p, index in zip(log_probs, jnp.atleast_1d(raw), strict=True)]
    entropies = [-(jnp.exp(p) * p).sum() for p in log_probs]
    return jnp.stack(chosen).sum(), jnp.stack(entropies).sum()


def to_action(space: envs.ActionSpace, raw: Array) -> Array:
    """Turn a raw action into one that the environment takes."""
    continuous = num_log_stds(space) > 0
    return envs.choose_action(space, raw) if continuous else raw


def _choices(space: envs.Discrete | envs.MultiDiscrete, logits: Array, mask: Array | None) -> list[Array]:
    """Return the logits of each choice; a mask that allows nothing is ignored, as in `envs.choose_action`."""
    sizes = (space.n,) if isinstance(space, envs.Discrete) else space.sizes
    ends = list(itertools.accumulate(sizes))
    parts = [slice(end - size, end) for size, end in zip(sizes, ends, strict=True)]
    if mask is None:
        return [logits[part] for part in parts]
    return [jnp.where(mask[part] | ~mask[part].any(), logits[part], MASKED) for part in parts]
