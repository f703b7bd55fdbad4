"""Dense noise that is drawn where it is read: every use sees the member that is built all at once."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import eggroll
from eggroll.lazy import dense
from eggroll.noise import addresses, leaves
from eggroll.noise.draws import draw_pair
from tests.tables import by_default

ROWS, WIDTH, LAYERS = 37, 6, 3
TOKENS = jnp.array([[0, 5, 36], [7, 5, 1]])


def layered(params, x):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["w"])[0]


def head(params, x):
    return jnp.einsum("td,vd->tv", x, params["embed"])


def tied(params, x):
    return head(params, jnp.take(params["embed"], TOKENS[0], axis=0) + layered(params, x))


def while_loop(params, x):
    return jax.lax.fori_loop(0, 3, lambda _, x: jnp.tanh(x @ params["w"][1]), x)


def loop_in_a_layer(params, x):
    def layer(x, w):
        return jax.lax.fori_loop(0, 2, lambda _, x: jnp.tanh(x @ w), x), None

    return jax.lax.scan(layer, x, params["w"])[0]


def branch(params, x):
    return jax.lax.cond(x.sum() > 0, lambda: x @ params["w"][0], lambda: x @ params["w"][2])


USES = {
    "layers": layered,
    "unrolled layers": lambda p, x: functools.reduce(lambda x, k: jnp.tanh(x @ p["w"][k]), range(LAYERS), x),
    "head": head,
    "head first": lambda p, x: jnp.einsum("vd,td->vt", p["embed"], x),
    "tied": tied,
    "rows": lambda p, x: p["embed"][TOKENS],
    "rows of members": lambda p, x: p["embed"][jnp.abs(100 * x[:, 0]).astype(jnp.int32) % ROWS],
    "rows outside": lambda p, x: jnp.nan_to_num(jnp.take(p["embed"], jnp.array([3, 99]), axis=0), nan=7.0),
    "rows clipped": lambda p, x: jnp.take(p["embed"], jnp.array([3, 99]), axis=0, mode="clip"),
    "while": while_loop,
    "loop in a layer": loop_in_a_layer,
    "branch": branch,
    "two parameters": lambda p, x: p["embed"] @ p["w"][0],
    "returned": lambda p, x: p["embed"],
}


@pytest.fixture
def late(monkeypatch):
    """Every dense parameter is late, and heads are read in blocks, the last of which is smaller."""
    monkeypatch.setattr(leaves, "LATE", 1)
    monkeypatch.setattr(dense, "ROWS", 10 * WIDTH)


@pytest.mark.parametrize("distribution", by_default(["normal", "rademacher"], "normal"))
@pytest.mark.parametrize("use", by_default(list(USES), "tied", "rows outside"))
def test_a_use_sees_the_member_that_is_built_at_once(late, use, distribution):
    params = {"embed": jnp.ones((ROWS, WIDTH)), "w": 0.5 * jnp.ones((LAYERS, WIDTH, WIDTH))}
    x = jax.random.normal(jax.random.key(1), (3, WIDTH))
    es = eggroll.EvolutionStrategy(
        None, population_size=4, sigma=0.1, optimizer=optax.sgd(0.1), perturbation=eggroll.Dense(distribution)
    )
    state = es.init(params, key=jax.random.key(0))
    es.plan(state, x, function=USES[use])
    population = es.ask(state)
    outputs = population.apply(USES[use], x)
    built = [USES[use](population.member(index), x) for index in range(4)]
    assert np.abs(outputs[0] - outputs[1]).max() > 1e-3
    np.testing.assert_allclose(outputs, np.stack(built), atol=2e-6)


def test_words_at_an_index_are_those_that_are_drawn_in_a_row():
    keys = jnp.array([[1, 2], [3, 4]], jnp.uint32)
    drawn = addresses.draw_words([keys], [11], first=6)[0]
    np.testing.assert_array_equal(addresses.words_at(keys[:, None], 6 + jnp.arange(11, dtype=jnp.uint32)), drawn)


def test_large_and_small_parameters_have_the_same_noise(monkeypatch):
    leaf = leaves.DenseLeaf("w", (3, 20, 5), jnp.float32, eggroll.Dense(), "", stack=(0,))
    plan = eggroll.noise.plan.Plan((leaf,), jax.tree.structure(0))
    small = draw_pair(plan, jax.random.key(0), 2, 1)[0]
    monkeypatch.setattr(leaves, "LATE", 1)
    np.testing.assert_array_equal(draw_pair(plan, jax.random.key(0), 2, 1)[0], small)
