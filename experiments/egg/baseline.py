"""Training a model of bytes on the streams of text that EGG in integers reads: by backprop, or by EGGROLL in float32.

Both take one update from the same pieces, uint8 [streams, T + 1], and carry states from piece to piece. Backprop is truncated
there. The loss is the mean of -log2 p over the bytes; evolution takes its negative as fitness.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

import eggroll
from eggroll.experiments.egg.models.byte_models import ByteModel

SCORED_AT_A_TIME = 128  # streams


class Learner(NamedTuple):
    """One way to train; compiled once, run with any number of keys."""

    start: Callable[[Array], Any]  # key -> run
    update: Callable[[Any, np.ndarray], tuple[Any, float]]  # run, pieces -> run, bits per byte before the update
    params: Callable[[Any], Any]  # run -> parameters


def backprop(model: ByteModel, optimizer: optax.GradientTransformation, *, streams: int) -> Learner:
    """Train with the gradient of the loss within a piece of text."""

    def start(key: Array) -> Any:
        params = model.init(key)
        states = jax.tree.map(lambda value: jnp.broadcast_to(value, (streams, *value.shape)), model.state)
        return params, optimizer.init(params), states

    def loss(params: Any, states: Any, pieces: Array) -> tuple[Array, Any]:
        states, known = jax.vmap(model.sequence, (None, 0, 0))(params, states, pieces)
        return -jnp.mean(known), states

    @jax.jit
    def update(run: Any, pieces: Array) -> tuple[Any, Array]:
        params, moments, states = run
        (bits, states), gradient = jax.value_and_grad(loss, has_aux=True)(params, states, pieces)
        updates, moments = optimizer.update(gradient, moments, params)
        return (optax.apply_updates(params, updates), moments, states), bits

    def updated(run: Any, pieces: np.ndarray) -> tuple[Any, float]:
        run, bits = update(run, pieces)
        return run, float(bits)

    return Learner(start, updated, lambda run: run[0])


def evolution(
    model: ByteModel,
    optimizer: optax.GradientTransformation,
    *,
    population_size: int,
    streams: int,
    sigma: float,
    chunk_size: int | None = None,
) -> Learner:
    """Train by EGGROLL at rank 1, as EGG in integers: equal groups of members read the streams, the better of a pair counts.

    Args:
        model: what is trained.
        optimizer: gets the estimate.
        population_size: members, an even number of them for every stream.
        streams: of text.
        sigma: standard deviation of a weight's noise.
        chunk_size: members evaluated at a time; None: all.
    """

    def fitness(params: Any, piece: Array, key: Array, state: Any) -> tuple[Array, Any]:
        state, known = model.sequence(params, state, piece)
        return jnp.mean(known), state

    es = eggroll.EvolutionStrategy(
        fitness,
        population_size=population_size,
        sigma=sigma,
        optimizer=optimizer,
        perturbation=eggroll.LowRank(rank=1, distribution="normal"),
        shaping="pair_sign",
        members_per_batch=population_size // streams,
        chunk_size=chunk_size,
    )

    def start(key: Array) -> eggroll.ESState:
        init_key, run_key = jax.random.split(key)
        return es.init(model.init(init_key), key=run_key, member_state=model.state)

    def update(state: eggroll.ESState, pieces: np.ndarray) -> tuple[eggroll.ESState, float]:
        state, metrics = es.step(state, pieces)
        return state, -float(metrics.mean_fitness)

    return Learner(start, update, lambda state: state.params)


def bits_per_byte(model: ByteModel, text: np.ndarray) -> Callable[[Any], float]:
    """Return the function from parameters to bits per byte of `text`, uint8 [streams, T + 1], read from fresh states."""

    @jax.jit
    def scores(params: Any) -> Array:
        def score(stream: Array) -> Array:
            return jnp.sum(model.sequence(params, model.state, stream)[1])

        return jax.lax.map(score, jnp.asarray(text), batch_size=min(SCORED_AT_A_TIME, len(text)))

    return lambda params: float(-np.asarray(scores(params), np.float64).sum() / (text.size - len(text)))
