"""Transposes leave a loop, values stay."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core as jexc

from eggroll.experiments.egg import evolution
from eggroll.experiments.egg.config import Config
from eggroll.lazy.hoisting import hoist_transposes
from eggroll.population import evaluate as population


def two_loops(weights, x):
    """A loop over time around a scan over layers, of one member."""

    def turn(x, _):
        x = jax.lax.scan(lambda x, w: ((x * w) % 127 + 1, x.sum()), x, weights)
        return x[0], x[1].sum()

    return jax.lax.scan(turn, x, None, length=5)


def with_a_condition(weights, x):
    """A loop that every member leaves at its own time, around a scan over layers."""

    def turn(run):
        count, x = run
        return count + 1, jax.lax.scan(lambda x, w: ((x * w) % 127 + 1, None), x, weights)[0]

    return jax.lax.while_loop(lambda run: run[0] < 2 + x[0] % 3, turn, (jnp.int32(0), x))


def transposes(jaxpr, *, loops=1):
    """How many there are inside of so many loops or more."""
    count = 0
    for equation in jaxpr.eqns:
        count += loops <= 0 and equation.primitive.name == "transpose"
        for inner in jax.tree.leaves(equation.params, is_leaf=lambda v: isinstance(v, jexc.ClosedJaxpr | jexc.Jaxpr)):
            if isinstance(inner, jexc.ClosedJaxpr | jexc.Jaxpr):
                entered = loops - (equation.primitive.name in ("scan", "while"))
                count += transposes(getattr(inner, "jaxpr", inner), loops=entered)
    return count


@pytest.mark.parametrize("one", [two_loops, with_a_condition])
@pytest.mark.parametrize("chunk", [None, 2])
def test_transposes_of_what_stays_leave_the_loop(chunk, one):
    weights = jnp.arange(3 * 4 * 6, dtype=jnp.int32).reshape(3, 4, 6) % 7
    x = jnp.arange(3 * 6, dtype=jnp.int32).reshape(3, 6)

    def members(weights, x):
        if chunk is None:
            return jax.vmap(one)(weights, x)
        return jax.lax.map(lambda member: one(*member), (weights, x), batch_size=chunk)

    plain, moved = (jax.make_jaxpr(function)(weights, x).jaxpr for function in (members, hoist_transposes(members)))
    over_time = 1 if chunk is None else 2  # a loop, within the loop over chunks
    assert transposes(plain, loops=over_time) > 0 == transposes(moved, loops=over_time)
    for a, b in zip(*(jax.tree.leaves(jax.jit(f)(weights, x)) for f in (members, hoist_transposes(members))), strict=True):
        np.testing.assert_array_equal(a, b)


def test_noise_of_the_integer_model_is_not_transposed_in_its_loop_over_text(monkeypatch):
    config = Config(layers=2, width=8, population_size=8, group=4, bytes_per_update=3)
    es, state = evolution.start(config, init_key=jax.random.key(0), run_key=jax.random.key(1))
    text = jnp.arange(8, dtype=jnp.uint8).reshape(2, 4)

    def evaluation(state):
        return es.evaluate(state, text)

    found = transposes(jax.make_jaxpr(evaluation)(state).jaxpr)  # of the state and of products, which change
    with monkeypatch.context() as patch:
        patch.setattr(population, "hoist_transposes", lambda function: function)
        before = transposes(jax.make_jaxpr(lambda state: evaluation(state))(state).jaxpr)
    assert found <= 10 and before >= 25
