"""Transposes leave a loop, values stay."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core as jexc

from eggroll import population
from eggroll.hoisting import hoisted
from experiments import pretraining
from experiments.egg_config import Config


def two_loops(weights, x):
    """A loop over time around a scan over layers, of one member."""

    def turn(x, _):
        x = jax.lax.scan(lambda x, w: ((x * w) % 127 + 1, x.sum()), x, weights)
        return x[0], x[1].sum()

    return jax.lax.scan(turn, x, None, length=5)


def transposes(jaxpr, *, inside=False):
    """How many there are inside of loops."""
    count = 0
    for equation in jaxpr.eqns:
        count += inside and equation.primitive.name == "transpose"
        for inner in jax.tree.leaves(equation.params, is_leaf=lambda v: isinstance(v, jexc.ClosedJaxpr | jexc.Jaxpr)):
            if isinstance(inner, jexc.ClosedJaxpr | jexc.Jaxpr):
                count += transposes(getattr(inner, "jaxpr", inner), inside=inside or equation.primitive.name == "scan")
    return count


@pytest.mark.parametrize("chunk", [None, 2])
def test_transposes_of_what_stays_leave_the_loop(chunk):
    weights = jnp.arange(3 * 4 * 6, dtype=jnp.int32).reshape(3, 4, 6) % 7
    x = jnp.arange(3 * 6, dtype=jnp.int32).reshape(3, 6)

    def members(weights, x):
        if chunk is None:
            return jax.vmap(two_loops)(weights, x)
        return jax.lax.map(lambda member: two_loops(*member), (weights, x), batch_size=chunk)

    plain, moved = (jax.make_jaxpr(function)(weights, x).jaxpr for function in (members, hoisted(members)))
    outer = 0 if chunk is None else 1  # in the loop over chunks, once a chunk
    assert transposes(plain) > outer == transposes(moved)
    for one, other in zip(*(jax.tree.leaves(jax.jit(f)(weights, x)) for f in (members, hoisted(members))), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_generation_of_the_integer_model_has_no_transpose_in_its_loop_over_text(monkeypatch):
    config = Config(layers=2, width=8, population_size=8, group=4, bytes_per_update=3)
    es, state = pretraining.start(config, init_key=jax.random.key(0), run_key=jax.random.key(1))
    text = jnp.arange(8, dtype=jnp.uint8).reshape(2, 4)

    def evaluation(state):
        return es.evaluate(es._fitness(), state, text, layout=es.layout)

    assert transposes(jax.make_jaxpr(evaluation)(state).jaxpr) <= 1  # of the state, which changes
    with monkeypatch.context() as patch:
        patch.setattr(population, "hoisted", lambda function: function)
        assert transposes(jax.make_jaxpr(lambda state: evaluation(state))(state).jaxpr) > 16
