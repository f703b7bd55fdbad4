"""The models whose memory is measured: fitness, parameters and batch, all as shapes.

mlp_603m     16 layers x + relu(x Wup) Wdown of 2048 x 8192, tied embedding 32,768 x 2,048; plain JAX, bfloat16 or int8
1b, 7b, 70b  decoders with the sizes of Llama 3.2 1B, Qwen2.5 7B and Llama 3 70B; bfloat16, one text per member
tiny         a decoder of no size, for tests
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike

from eggroll.experiments.bench.kernel_generation import ONE_BILLION, SMALL, make_likelihood
from eggroll.llm.models.leaves import init
from eggroll.llm.models.transformer import TransformerConfig, leaves

DECODERS = {
    "tiny": SMALL,
    "1b": ONE_BILLION,
    "7b": TransformerConfig(152064, 3584, 18944, 28, 28, 4, 128, model_type="qwen2"),
    "70b": TransformerConfig(128256, 8192, 28672, 80, 64, 8, 128, model_type="llama"),
}
BY_COLUMNS, BY_ROWS = ("q", "k", "v", "gate", "up"), ("o", "down")  # how "model" splits a block: one all-reduce after each row


class Workload(NamedTuple):
    """A fitness function and the shapes of what it takes."""

    fitness: Callable  # fitness(params, batch, key=None) -> scalar, of one member
    params: Any  # shapes
    batch: Any  # shapes; [N, ...] if every member has its own entry
    members_per_batch: int | None  # as for EvolutionStrategy

    @property
    def num_params(self) -> int:
        """Number of parameters."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.params))


def mlp(
    *, layers: int = 16, width: int = 2048, hidden: int = 8192, vocab: int = 32768, weights: DTypeLike = jnp.bfloat16
) -> Workload:
    """Make a deep MLP over tokens whose layers are stacked and scanned; members share a batch of 8 tokens."""

    def fitness(params: Any, tokens: Array, key: Array | None = None) -> Array:
        def layer(x: Array, weights: tuple[Array, Array]) -> tuple[Array, None]:
            up, down = weights
            return x + jax.nn.relu(x @ up.astype(x.dtype)) @ down.astype(x.dtype), None

        x, _ = jax.lax.scan(layer, params["embed"][tokens[:-1]].astype(jnp.bfloat16), (params["up"], params["down"]))
        log_probabilities = jax.nn.log_softmax((x @ params["embed"].astype(x.dtype).T).astype(jnp.float32))
        return jnp.take_along_axis(log_probabilities, tokens[1:, None], axis=-1).mean()

    shapes = {"embed": (vocab, width), "up": (layers, width, hidden), "down": (layers, hidden, width)}
    params = {name: jax.ShapeDtypeStruct(shape, weights) for name, shape in shapes.items()}
    return Workload(fitness, params, jax.ShapeDtypeStruct((9,), jnp.int32), None)


def sized(name: str, layers: int | None) -> TransformerConfig:
    """Return the configuration of a decoder, with fewer layers if a number is given."""
    config = DECODERS[name]
    return config if layers is None else dataclasses.replace(config, num_hidden_layers=layers)


def decoder(config: TransformerConfig, *, members: int, tokens: int = 1) -> Workload:
    """Make a decoder scored by the likelihood of each next token of a text, one text per member."""
    params = jax.eval_shape(functools.partial(init, leaves(config), dtype=jnp.bfloat16), jax.random.key(0))
    return Workload(make_likelihood(config), params, jax.ShapeDtypeStruct((members, 1, tokens + 1), jnp.int32), 1)


def decoder_specs(params: Any) -> Any:
    """Return how a decoder's parameters lie over the mesh axis "model": heads and hidden units, and the vocabulary."""
    blocks = {name: PartitionSpec() for name in params["blocks"]}
    blocks |= {name: PartitionSpec(None, None, "model") for name in BY_COLUMNS} | {
        name: PartitionSpec(None, "model") for name in BY_ROWS
    }
    resident = {name: PartitionSpec("model") if name in ("embed", "head") else PartitionSpec() for name in params["resident"]}
    return {"resident": resident, "blocks": blocks}
