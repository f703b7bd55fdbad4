"""Moves of 2-byte floats: the same bits, without float32 copies of what loops read and carry."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import eggroll
from eggroll.population.moves import move_as_integers

LAYERS, WIDTH, TOKENS = 12, 64, 5


def decode(weights, tokens):
    """A decoder in miniature: a loop over tokens around a scan over layers, with a cache and an embedding."""
    embedding, stack = weights["embedding"], weights["stack"]

    def layer(carry, xs):
        (x, cache), (matrix, number) = carry, xs
        cache = jax.lax.dynamic_update_slice(cache, x[None], (number, 0, 0))
        own = jax.lax.dynamic_index_in_dim(cache, number, keepdims=False)
        return (jnp.tanh(x @ matrix) + own, cache), x.mean()

    def step(run):
        count, token, cache, total = run
        x = jnp.take(embedding, token, axis=0)  # a token out of range is NaN
        (x, cache), means = jax.lax.scan(layer, (x, cache), (stack, jnp.arange(LAYERS)))
        logits = jnp.einsum("bd,vd->bv", x, embedding, preferred_element_type=jnp.float32)
        return count + 1, jnp.argmax(logits, axis=-1).astype(jnp.int32), cache, total + means

    cache = jnp.zeros((LAYERS, *tokens.shape, WIDTH), stack.dtype)
    first = jnp.int32(0), tokens, cache, jnp.zeros(LAYERS, stack.dtype)
    return jax.lax.while_loop(lambda run: run[0] < TOKENS, step, first)


def inputs(dtype=jnp.bfloat16):
    keys = jax.random.split(jax.random.key(0))
    shapes = {"embedding": (512, WIDTH), "stack": (LAYERS, WIDTH, WIDTH)}
    weights = {name: jax.random.normal(key, shape, dtype) / 8 for (name, shape), key in zip(shapes.items(), keys, strict=True)}
    return weights, jnp.array([3, 400, 7], jnp.int32)


def temporary_bytes(function, *args):
    return jax.jit(function).lower(*args).compile().memory_analysis().temp_size_in_bytes


def assert_same_bits(one, two):
    for left, right in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        assert left.dtype == right.dtype
        assert np.asarray(left).tobytes() == np.asarray(right).tobytes()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_the_same_bits(dtype):
    args = inputs(dtype)
    assert_same_bits(jax.jit(decode)(*args), jax.jit(move_as_integers(decode))(*args))


def test_a_loop_that_changes_nothing():
    x = jnp.ones(3, jnp.bfloat16)
    idle = lambda x: jax.lax.while_loop(lambda carry: carry.sum() > 9, lambda carry: carry, x)  # noqa: E731
    assert_same_bits(jax.jit(idle)(x), jax.jit(move_as_integers(idle))(x))


def test_a_look_up_out_of_range_stays_nan():
    weights, _ = inputs()
    look = move_as_integers(lambda table, index: jnp.take(table, index, axis=0))
    found = np.asarray(jax.jit(look)(weights["embedding"], jnp.array([1, 512]))).astype(np.float32)
    assert np.isfinite(found[0]).all() and np.isnan(found[1]).all()


def test_no_copy_of_the_weights():
    args = inputs()
    weights = sum(leaf.nbytes for leaf in args[0].values())
    if jax.__version_info__ < (0, 11):  # whose XLA makes the copies
        assert temporary_bytes(decode, *args) > weights  # control
    assert temporary_bytes(move_as_integers(decode), *args) < weights / 2


def test_a_population_has_no_copy_either():
    weights, tokens = inputs()
    es = eggroll.EvolutionStrategy(
        lambda weights, tokens, key: decode(weights, tokens)[3].astype(jnp.float32).mean(),
        population_size=2,
        sigma=0.1,
        optimizer=optax.sgd(1.0),
    )
    state = es.init(weights, key=jax.random.key(0))
    es.plan(state, tokens)
    whole = sum(leaf.nbytes for leaf in weights.values())
    assert temporary_bytes(lambda state: es.evaluate(state, tokens), state) < whole
