"""A run with member state: generations after the last checkpoint are evaluated again and must reproduce the journal."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import eggroll
from eggroll.journal import JournalError

PARAMS = {"w": 0.3 * jnp.ones((4, 4)), "b": jnp.zeros(4)}


def recurrent(params, batch, key, memory):
    memory = jnp.tanh(memory + batch @ params["w"]) + params["b"]
    return jnp.where(batch[0] > 1e3, jnp.nan, memory.sum()), memory


def batch_of(generation, *, other=False):
    batch = jax.random.normal(jax.random.key(generation + 100 * other), (4,))
    return batch.at[0].set(2e3) if generation == 4 else batch  # in which no member is valid


def go(folder, generations, **options):
    """Resume training in a folder, with a checkpoint every three generations."""
    es = eggroll.EvolutionStrategy(recurrent, population_size=8, sigma=0.1, optimizer=optax.sgd(0.1), shaping="z_score")
    initial = es.init(PARAMS, key=jax.random.key(0), member_state=jnp.zeros(4))
    es.plan(initial, batch_of(0))
    run = eggroll.DurableRun(folder, es, initial, config={}, checkpoint_every=3)
    start, left = int(run.state.generation), generations - int(run.state.generation)
    state = run.state
    try:
        if left:
            batches = lambda generation: batch_of(generation, **options)  # noqa: E731
            state, _ = eggroll.train(es, state, batches, generations=left, run_folder=folder, durable=run)
    finally:
        run.close()
    return start, state


@pytest.mark.filterwarnings("ignore:generation 4 was skipped")
def test_a_run_with_member_state_resumes_bit_for_bit_even_over_a_generation_without_valid_members(tmp_path):
    _, whole = go(tmp_path / "whole", 8)
    go(tmp_path / "parts", 5)
    start, resumed = go(tmp_path / "parts", 8)
    assert start == 3  # the last checkpoint; generations 3 and 4 are evaluated once more
    for one, other in zip(jax.tree.leaves(whole), jax.tree.leaves(resumed), strict=True):
        if not jnp.issubdtype(one.dtype, jax.dtypes.prng_key):
            np.testing.assert_array_equal(one, other)


@pytest.mark.filterwarnings("ignore:generation 4 was skipped")
def test_generations_with_other_coefficients_than_the_journal_are_an_error(tmp_path):
    go(tmp_path, 5)
    with pytest.raises(JournalError, match="generation 3, evaluated again, gave other coefficients than"):
        go(tmp_path, 8, other=True)
