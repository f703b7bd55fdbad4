"""What the engine benchmark evaluates: a one-member function, its parameters, one batch entry per member."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array


class Case(NamedTuple):
    """One workload of the engine benchmark."""

    function: Callable  # function(params, batch) -> scalar fitness of one member
    params: Any
    batch: Array  # [N, ...], one entry per member
    chunk_size: int  # members evaluated at a time, chosen by `--tune`
    dense_chunk_size: int  # the same for the dense form, whose members hold whole matrices


class _MLP(nn.Module):
    """Three hidden layers of 256, as the policies of the EGGROLL paper (appendix N.4)."""

    outputs: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        for _ in range(3):
            x = nn.tanh(nn.Dense(256)(x))
        return nn.Dense(self.outputs)(x)


class _Block(nn.Module):
    @nn.compact
    def __call__(self, x: Array, _: None) -> tuple[Array, None]:
        mask = nn.make_causal_mask(x[..., 0])
        x = x + nn.MultiHeadDotProductAttention(num_heads=4)(nn.LayerNorm()(x), mask=mask)
        return x + nn.Dense(x.shape[-1])(nn.gelu(nn.Dense(4 * x.shape[-1])(nn.LayerNorm()(x)))), None


class _Transformer(nn.Module):
    """A causal language model: 4 scanned blocks of width 128, tied embedding of 256 bytes."""

    @nn.compact
    def __call__(self, tokens: Array) -> Array:
        embed = nn.Embed(256, 128)
        blocks = nn.scan(_Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=4)
        x, _ = blocks()(embed(tokens), None)
        return embed.attend(x)


def mlp(inputs_per_member: int, *, chunk_size: int) -> Case:
    """An MLP 256-256-256-256-8, N = 1024, each member with its own inputs."""
    model = _MLP(8)
    batch = jax.random.normal(jax.random.key(1), (1024, inputs_per_member, 256))
    params = model.init(jax.random.key(0), batch[0])

    def mean_square(params: Any, x: Array) -> Array:
        outputs: Any = model.apply(params, x)
        return -jnp.mean(outputs**2)

    return Case(mean_square, params, batch, chunk_size, 64)


def transformer() -> Case:
    """A causal transformer, N = 128, each member with one sequence of 64 tokens."""
    model = _Transformer()
    batch = jax.random.randint(jax.random.key(1), (128, 1, 64), 0, 256)
    params = model.init(jax.random.key(0), batch[0])

    def log_likelihood(params, tokens):
        logits = nn.log_softmax(model.apply(params, tokens[:, :-1]))
        return jnp.mean(jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1))

    return Case(log_likelihood, params, batch, 32, 16)


def policy() -> Case:
    """A policy MLP 16-256-256-256-8 stepping a linear system for 32 steps, one input at a time, N = 1024."""
    model = _MLP(8)
    batch = jax.random.normal(jax.random.key(1), (1024, 16))
    params = model.init(jax.random.key(0), batch[0])
    control = 0.1 * jax.random.normal(jax.random.key(2), (8, 16))

    def episode(params, start):
        def step(observation, _):
            observation = 0.95 * observation + model.apply(params, observation) @ control
            return observation, -jnp.mean(observation**2)

        return jax.lax.scan(step, start, None, length=32)[1].mean()

    return Case(episode, params, batch, 1024, 64)


CASES: dict[str, Callable[[], Case]] = {
    "mlp8": lambda: mlp(8, chunk_size=1024),
    "mlp128": lambda: mlp(128, chunk_size=64),
    "transformer": transformer,
    "policy": policy,
}


def check_cases(names: Sequence[str]) -> None:
    """Exit with an error that names unknown cases."""
    if unknown := [name for name in names if name not in CASES]:
        raise SystemExit(f"error: cases must be among {', '.join(CASES)}, got {', '.join(unknown)}.")
