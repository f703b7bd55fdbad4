"""A checkpoint is read back with the bytes that were written, or refused."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import eggroll
from eggroll.journal import checkpoint
from eggroll.journal.checkpoint import Checkpoints


def make_state(weight):
    es = eggroll.EvolutionStrategy(None, population_size=2, sigma=0.1, optimizer=optax.sgd(0.1))
    return es.init({"w": weight * jnp.ones((2, 2))}, key=jax.random.key(0))


def test_bytes_that_differ_from_the_fingerprint_are_refused(tmp_path, monkeypatch):
    checkpoints, state = Checkpoints(tmp_path, config={}), make_state(1.0)
    checkpoints.save(state)
    checkpoints.wait()
    restored, _ = checkpoints.restore(make_state(0.0))
    np.testing.assert_array_equal(restored.params["w"], state.params["w"])
    written = checkpoint.fingerprint
    monkeypatch.setattr(checkpoint, "fingerprint", lambda tree: written(tree)[::-1])  # of other bytes, when they were written
    checkpoints.save(state._replace(generation=jnp.int32(1)))
    checkpoints.wait()
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"generation 1 .* cannot be read: its bytes differ from those written"):
        checkpoints.restore(make_state(0.0))
    checkpoints.close()
