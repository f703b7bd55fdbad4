"""A whole generation of a language model for the kernel benchmark, next to pure batched inference of the same inputs.

The model is random and has the sizes of Llama 3.2 1B, in bfloat16; every member reads a short text of its own and is scored by
the likelihood of each next token. The engine chooses its implementation itself.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

import eggroll
from eggroll.experiments.bench.kernel_work import Call, Work, bound
from eggroll.experiments.bench.timing import advancing
from eggroll.llm.decoder import apply
from eggroll.llm.models.leaves import init
from eggroll.llm.models.transformer import TransformerConfig, leaves, make_decoder
from eggroll.noise.factored import LowRankLeaf

ONE_BILLION = TransformerConfig(128256, 2048, 8192, 16, 32, 8, 64, model_type="llama", tie_word_embeddings=True)
SMALL = TransformerConfig(256, 64, 128, 2, 4, 2, 16, model_type="llama", tie_word_embeddings=True)


def make_likelihood(config: TransformerConfig) -> Callable[..., Array]:
    """Return the mean log-likelihood of each next token of a text, a fitness `(params, int32 [B, T + 1], key)`."""
    model = make_decoder(config)

    def likelihood(params: Any, text: Array, key: Array | None = None) -> Array:
        read, following = text[:, :-1], text[:, 1:]
        log_probabilities = jax.nn.log_softmax(apply(model, params, read, jnp.ones(read.shape, bool)))
        return jnp.take_along_axis(log_probabilities, following[..., None], axis=-1).mean()

    return likelihood


def work(*, small: bool, members: int, tokens: int) -> Work:
    """Make the model, its texts, and the two calls.

    Args:
        small: a model of two layers.
        members: population size.
        tokens: tokens that each member reads.
    """
    config = SMALL if small else ONE_BILLION
    likelihood = make_likelihood(config)
    params = init(leaves(config), jax.random.key(0), jnp.bfloat16)
    texts = jax.random.randint(jax.random.key(1), (members, 1, tokens + 1), 0, config.vocab_size)

    es = eggroll.EvolutionStrategy(
        likelihood, population_size=members, sigma=1e-3, optimizer=optax.sgd(1e-3), members_per_batch=1
    )
    state = es.init(params, key=jax.random.key(2))
    products = [leaf.implementation for leaf in es.plan(state, texts).leaves if isinstance(leaf, LowRankLeaf)]
    by_kernel = sum(name != "reference" for name in products)
    implementation = f"mosaic_gpu {by_kernel}/{len(products)}" if by_kernel else "reference"  # of the matrices
    calls = {
        "plain": Call(bound(jax.vmap(likelihood, (None, 0)), params, texts), checked=False),
        implementation: Call(advancing(lambda state: es.step(state, texts), state), checked=False),
    }
    count, weights = members * tokens, sum(leaf.size for leaf in jax.tree.leaves(params))
    shape = f"{weights:,} parameters, {members} members, {tokens} tokens each"
    return Work("generation", "small" if small else "llama-1b", shape, calls, 2.0 * count * weights, 2.0 * weights)
