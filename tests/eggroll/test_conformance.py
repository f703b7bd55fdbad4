"""Every perturbation, shaping and optimizer reaches a threshold on every objective: one row each, the same properties."""

import jax
import jax.numpy as jnp
import optax
import pytest

import eggroll
from tests.tables import covering

PERTURBATIONS = {
    "rademacher-1": eggroll.LowRank(1),
    "normal-1": eggroll.LowRank(1, "normal"),
    "normal-4": eggroll.LowRank(4, "normal"),
    "dense": eggroll.Dense(),
    "flipout": eggroll.Flipout(),
}
SHAPINGS = ["centered_ranks", "z_score", "pair_sign"]
TARGET = jax.random.normal(jax.random.key(5), (6, 4))
X = jax.random.normal(jax.random.key(6), (16, 6))


def quadratic(params, batch, key):
    return -jnp.mean((jnp.eye(6) @ params["w"] - TARGET) ** 2)


def regression(params, batch, key):
    return -jnp.mean((jnp.tanh(X @ params["w"]) - jnp.tanh(X @ TARGET)) ** 2)


def noisy_quadratic(params, batch, key):
    return quadratic(params, batch, key) + 0.1 * jax.random.normal(key)


def plateau(params, batch, key):
    """Not differentiable: the share of signs that are right."""
    return jnp.mean((jnp.sign(jnp.eye(6) @ params["w"]) == jnp.sign(TARGET)).astype(jnp.float32))


OBJECTIVES = {"quadratic": -0.05, "regression": -0.02, "noisy_quadratic": -0.1, "plateau": 0.9}  # from -1.1, -0.5, -1.1, 0.5


@pytest.mark.parametrize(("perturbation", "shaping", "objective"), covering(PERTURBATIONS, SHAPINGS, OBJECTIVES, strength=1))
def test_reaches_the_threshold(perturbation, shaping, objective, standard_promotion):
    es = eggroll.EvolutionStrategy(
        globals()[objective],
        population_size=64,
        sigma=0.1,
        optimizer=optax.adam(0.05),
        perturbation=PERTURBATIONS[perturbation],
        shaping=shaping,
    )
    state = es.init({"w": jnp.zeros((6, 4)) + 0.01}, key=jax.random.key(0))
    state, history = jax.lax.scan(lambda state, _: es.step(state), state, None, length=150)
    exact = {"noisy_quadratic": quadratic}.get(objective, globals()[objective])
    assert exact(state.params, None, None) > OBJECTIVES[objective]
