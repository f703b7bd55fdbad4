"""A tiny language model in pieces, with tied embeddings, for the tests of `zo`; after `jax` is configured."""

import jax
import jax.numpy as jnp

from eggroll import zo

WIDTH, WORDS = 8, 11
BATCH = jax.random.randint(jax.random.key(5), (4, 6), 0, WORDS)


def init(blocks=4):
    keys = jax.random.split(jax.random.key(0), 3)
    draw = lambda key, *shape: 0.3 * jax.random.normal(key, shape)  # noqa: E731
    stacked = {"w": draw(keys[1], blocks, WIDTH, WIDTH), "up": draw(keys[2], blocks, WIDTH, WIDTH)}
    stacked["bias"] = jnp.zeros((blocks, WIDTH))
    return {"resident": {"embed": draw(keys[0], WORDS, WIDTH), "norm": jnp.ones(WIDTH)}, "blocks": stacked}


def begin(resident, batch, key):
    return resident["embed"][batch], jnp.ones((), resident["embed"].dtype)


def block(params, x, aux):
    return x + aux * jnp.tanh(x @ params["w"] + params["bias"]) @ params["up"]


def end(resident, x, batch):
    logits = ((x * resident["norm"]) @ resident["embed"].T).astype(jnp.float32)
    likelihood = jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), batch[:, 1:, None], -1)
    real = (batch[:, 1:, None] > 0).astype(jnp.float32)  # word 0 does not count: shares of the batch weigh differently
    return -(likelihood * real).sum(), real.sum()


PIECES = zo.Blocks(begin, block, end)
