"""Updates of bfloat16 and float16 parameters: what reaches the weights under each option."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import eggroll
from eggroll.update.precision import init_masters, rounding_words, stochastic_round
from tests.eggroll.update.rounding import apply_updates
from tests.tables import covering

WEIGHTS = 0.02 * jax.random.normal(jax.random.key(0), (64, 64))
STEP = 1e-6 * jax.random.normal(jax.random.key(1), (64, 64))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_stochastic_rounding_is_unbiased_and_picks_a_neighbour(dtype):
    value = jnp.array([0.0, 1.0, -1.0, 1.0001, -3.14159e-3, 123.456, 3.3333e-6], jnp.float32)  # the last is tiny in float16
    keys = jax.random.split(jax.random.key(2), 20_000)
    drawn = np.asarray(
        jax.vmap(lambda key: stochastic_round(value, dtype, uniform=jax.random.uniform(key, value.shape)).astype(jnp.float32))(
            keys
        ),
        np.float64,
    )
    exact = np.asarray(value, np.float64)
    np.testing.assert_array_equal(drawn[:, :3], np.broadcast_to(exact[:3], (len(keys), 3)))  # representable: unchanged
    for i in range(3, 7):
        assert len(set(drawn[:, i].tolist())) == 2
    error = drawn.std(axis=0, ddof=1)[3:] / len(keys) ** 0.5
    assert (np.abs(drawn.mean(axis=0)[3:] - exact[3:]) / error).max() < 5
    rounded = np.asarray(value.astype(dtype).astype(jnp.float32))[3:]
    assert (np.abs(rounded - exact[3:]) / error).max() > 10  # control: rounding to nearest is biased


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_stochastic_rounding_keeps_zero_and_what_is_not_finite(dtype):
    value = jnp.array([jnp.nan, jnp.inf, -jnp.inf, 0.0, -0.0])
    np.testing.assert_array_equal(
        np.asarray(stochastic_round(value, dtype, uniform=jnp.zeros(value.shape)).astype(jnp.float32)), np.asarray(value)
    )


def test_random_words_of_rounding_follow_the_place_of_a_weight():
    key, shape = jax.random.key(5), (4, 6, 10)
    whole = np.asarray(rounding_words(key, shape, (0, 0, 0), shape))
    assert len(np.unique(whole)) == whole.size  # no two of 240 words of 32 bits are equal
    for starts, sizes in (((2, 0, 0), (2, 6, 10)), ((1, 3, 0), (1, 2, 10)), ((3, 0, 4), (1, 6, 3))):
        place = tuple(slice(start, start + size) for start, size in zip(starts, sizes, strict=True))
        np.testing.assert_array_equal(rounding_words(key, shape, starts, sizes), whole[place])
    assert rounding_words(key, (), (), ()).shape == ()


def moved(precision, steps=100):
    """Relative error of 100 equal small updates of bfloat16 weights."""
    params, masters = WEIGHTS.astype(jnp.bfloat16), init_masters(WEIGHTS.astype(jnp.bfloat16), precision)
    start = params.astype(jnp.float32)

    def body(carry, key):
        return apply_updates(*carry, STEP, precision=precision, key=key), None

    (params, masters), _ = jax.jit(lambda c: jax.lax.scan(body, c, jax.random.split(jax.random.key(3), steps)))(
        (params, masters)
    )
    return np.asarray((masters[0] if masters[0] is not None else params.astype(jnp.float32)) - start) / steps


def test_small_updates_survive_by_masters_and_by_stochastic_rounding_only():
    intended = np.asarray(STEP)

    def cosine(a):
        return float((a * intended).sum() / np.linalg.norm(a) / np.linalg.norm(intended))

    assert cosine(moved("master")) > 0.9999
    stochastic, nearest = moved("stochastic"), moved("nearest")
    # each weight's noise averages out; the projection on the update is kept
    assert abs((stochastic * intended).sum() / (intended**2).sum() - 1) < 0.2
    assert (nearest * intended).sum() / (intended**2).sum() < 0.2


@pytest.mark.parametrize(
    ("precision", "dtype"), covering(["master", "stochastic", "nearest"], [jnp.bfloat16, jnp.float16], strength=1)
)
def test_strategy_keeps_storage_dtypes(precision, dtype):
    params = {"w": WEIGHTS[:8, :4].astype(dtype), "b": jnp.zeros(4)}

    def fitness(params, batch, key):
        return -(jnp.mean((batch @ params["w"]).astype(jnp.float32) + params["b"] - 1.0) ** 2)

    es = eggroll.EvolutionStrategy(
        fitness, population_size=32, sigma=0.05, optimizer=optax.trace(0.9), precision=precision, shaping="z_score"
    )
    state = es.init(params, key=jax.random.key(0))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(state.opt_state))
    assert [m is None for m in state.masters] == [True, precision != "master"]
    after, _ = es.step(state, jnp.ones((3, 8), dtype))
    assert after.params["w"].dtype == dtype and after.params["b"].dtype == jnp.float32
    if precision == "master":
        np.testing.assert_array_equal(np.asarray(after.params["w"]), np.asarray(after.masters[1].astype(dtype)))
