"""What a run says about itself."""

import dataclasses
import re
import warnings

import jax
import jax.numpy as jnp
import optax
import pytest

import eggroll
from eggroll.runs.diagnosis import PATIENCE, advise, find_unusual


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


def test_updates_far_beyond_the_perturbations_say_so():
    es = eggroll.EvolutionStrategy(learning, population_size=8, sigma=1e-3, optimizer=optax.sgd(1.0))
    with pytest.warns(UserWarning, match=r"than 10 sigma in 5 .* by 1\.72e\+05: beyond .* Raise sigma \(now 0.001\), or lower"):
        eggroll.train(es, es.init({"w": jnp.ones((3, 2))}, key=jax.random.key(0)), generations=PATIENCE)


FINE = {"sigma": 0.1, "tied_pairs": 0.0, "update_over_sigma": 0.1, "pair_correlation": 0.2, "weight_norm": 3.0}


@pytest.mark.parametrize(
    ("shown", "advice"),
    [
        ({}, r"^Try another learning rate or sigma, a larger population, or more generations\.$"),
        ({"tied_pairs": 0.8}, r"^80% of the pairs .* Raise sigma \(now 0.1\), sample actions .*\.$"),
        (
            {"update_over_sigma": 300.0, "pair_correlation": 0.9999},
            r"by 300 sigma.* the learning rate\. .*random key or examples\. Raise",
        ),
        (
            {"sigma": 5.0},
            r"Sigma \(5\) is 5 times as large as the weights \(root mean square 1 by weight_norm\), .*\. Lower sigma\.$",
        ),
        ({"sigma": float("nan"), "weight_norm": float("nan"), "update_over_sigma": float("nan")}, "^Try another"),  # int8
    ],
)
def test_a_run_without_gain_is_told_what_to_change(shown, advice):
    es = eggroll.EvolutionStrategy(learning, population_size=8, sigma=0.1, optimizer=optax.sgd(0.1))
    plan = es.plan(es.init({"w": jnp.ones((3, 3))}, key=jax.random.key(0)), ())
    _, history = run(learning, generations=1)
    records = [dataclasses.replace(history[0], **FINE | shown)] * 3
    assert re.search(advice, advise(records, plan))
    assert advise([], plan) == "No generation was run."


def test_weights_that_have_outgrown_sigma_ask_for_smaller_steps():
    """Members of a pair play the same, not because sigma is small, but because the weights have become large."""
    es = eggroll.EvolutionStrategy(learning, population_size=8, sigma=0.1, optimizer=optax.sgd(0.1))
    plan = es.plan(es.init({"w": jnp.ones((3, 3))}, key=jax.random.key(0)), ())
    _, history = run(learning, generations=1)
    first, last = (dataclasses.replace(history[0], **FINE | {"weight_norm": norm}) for norm in (3.0, 30.0))
    last = dataclasses.replace(last, pair_correlation=0.9999)
    (found,) = find_unusual([first, last, last], plan).items()
    assert found[0] == "weight_norm" and re.search(r"from 3 to 30 \(weight_norm\).*Lower the learning rate\.$", found[1])
    assert list(find_unusual([last, last], plan)) == ["pair_correlation"]


def test_held_out_scores_are_compared_with_the_mean_of_the_population():
    es = eggroll.EvolutionStrategy(learning, population_size=8, sigma=0.1, optimizer=optax.sgd(0.1))
    state = es.init({"w": jnp.ones((3, 2))}, key=jax.random.key(0))
    check = lambda state, record: record.extra.update(held_out_fitness=float(learning(state.params, None, None)))  # noqa: E731
    _, history = eggroll.train(es, state, generations=1, callbacks=[check])
    extra = history[0].extra
    assert extra["held_out_minus_mean"] == extra["held_out_fitness"] - history[0].mean_fitness > 0
