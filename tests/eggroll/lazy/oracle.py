"""A function of lazy parameters next to the same function of every member's own, built parameters."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

import eggroll

MEMBERS = 4


def weights(*shape, seed=2):
    """Standard normal."""
    return jax.random.normal(jax.random.key(seed), shape)


def evaluated(function, params, batch, perturbation=None, *, one_by_one=False):
    """The plan by path, the outputs of the population, those of the oracle; both have a leading axis of members.

    `one_by_one`: the oracle calls the function for one member after the other, where JAX cannot batch it.
    """
    spec = perturbation or eggroll.LowRank(2, "normal")
    es = eggroll.EvolutionStrategy(None, population_size=MEMBERS, sigma=0.3, optimizer=optax.sgd(1.0), perturbation=spec)
    state = es.init(params, key=jax.random.key(0))
    plan = es.plan(state, batch, function=function)
    over_members = functools.partial(jax.lax.map, batch_size=None if one_by_one else MEMBERS)

    @jax.jit
    def both(state, batch):
        population = es.ask(state)
        oracle = over_members(lambda i: function(population.member(i), batch), jnp.arange(MEMBERS))
        return population.apply(function, batch), oracle

    return {leaf.path: leaf for leaf in plan.leaves}, *both(state, batch)


def assert_equals_the_oracle(outputs, oracle):
    """Equal up to rounding, NaN where the oracle has NaN; members differ from each other."""
    for own, wanted in zip(jax.tree.leaves(outputs), jax.tree.leaves(oracle), strict=True):
        size = np.nanmax(np.abs(wanted), initial=0.0)
        np.testing.assert_allclose(own, wanted, rtol=0, atol=1e-5 * size)
        differs = np.nanmax(np.abs(wanted - wanted[:1]), initial=0.0) > 1e-2 * size
        assert differs or not np.isfinite(size) or size == 0, "control: the perturbation is no rounding error"


def check(function, params, batch, perturbation=None, *, one_by_one=False):
    """Assert that the population equals the oracle; return the plan by path."""
    plan, outputs, oracle = evaluated(function, params, batch, perturbation, one_by_one=one_by_one)
    assert_equals_the_oracle(outputs, oracle)
    return plan
