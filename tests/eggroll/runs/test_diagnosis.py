"""What a run says about itself."""

import warnings

import jax
import jax.numpy as jnp
import optax
import pytest

import eggroll
from eggroll.runs.diagnosis import PATIENCE


def run(fitness, *, generations=2 * PATIENCE, shaping="centered_ranks"):
    es = eggroll.EvolutionStrategy(fitness, population_size=8, sigma=0.1, optimizer=optax.sgd(0.1), shaping=shaping)
    return eggroll.train(es, es.init({"w": jnp.ones((3, 2))}, key=jax.random.key(0)), generations=generations)


def learning(params, batch, key):
    return -jnp.sum(params["w"] ** 2)


def best_action(params, batch, key):
    """A greedy action: which output is largest does not change under a small sigma."""
    return jnp.argmax(jnp.arange(2.0) * 100 + params["w"].sum(axis=0)).astype(jnp.float32)


def test_a_run_of_tied_pairs_says_so_once_and_what_to_change():
    with pytest.warns(UserWarning, match=r"same fitness in 5 generations in a row .*Raise sigma \(now 0.1\), sample") as given:
        run(best_action)
    assert len(given) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(best_action, generations=PATIENCE - 1)
        run(learning)


def test_a_gradient_of_zero_without_ties_says_so():
    with pytest.warns(UserWarning, match="gradient was zero in 5 generations in a row .*shaping gives them equal weight"):
        run(learning, shaping=jnp.zeros_like)
