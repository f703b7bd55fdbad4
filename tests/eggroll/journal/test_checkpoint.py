"""A checkpoint is read back with the bytes that were written, or refused; arrays are hashed and written in pieces."""

import hashlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import eggroll
from eggroll.journal import checkpoint
from eggroll.journal import fingerprint as fingerprints
from eggroll.journal.checkpoint import Checkpoints
from eggroll.journal.fingerprint import fingerprint
from eggroll.journal.integrity import find_damage


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


def test_a_score_that_is_not_a_number_is_never_the_best_and_no_damage(tmp_path):
    checkpoints, state = Checkpoints(tmp_path, config={}), make_state(1.0)
    for generation, score in enumerate((1.0, float("nan"))):
        checkpoints.save(state._replace(generation=jnp.int32(generation)), score=score)
    assert checkpoints.best == 0
    checkpoints.close()
    again = Checkpoints(tmp_path, config={})
    assert again.generations == [0, 1]
    again.close()
    for name in ("metrics/metrics", "check/metadata"):  # as earlier versions wrote it
        path = tmp_path / "states/1" / name
        path.write_text(path.read_text().replace("-Infinity", "NaN"))
    assert find_damage(tmp_path / "states/1") is None


def test_the_best_checkpoint_survives_one_that_replaces_it(tmp_path):
    checkpoints, state = Checkpoints(tmp_path, config={}, keep=1), make_state(1.0)

    def save(generation, weight, **options):
        checkpoints.save(make_state(weight)._replace(generation=jnp.int32(generation)), **options)

    save(2, 1.0, score=10)
    for weight in (2.0, 3.0):  # the second one replaces one that was never the best
        save(2, weight, replace=True)
    assert checkpoints.best == 2 and float(checkpoints.restore(state)[0].params["w"][0, 0]) == 3
    save(4, 4.0, score=0)
    save(6, 5.0, score=0)
    checkpoints.close()
    checkpoints = Checkpoints(tmp_path, config={}, keep=1)
    assert checkpoints.best == 2 and checkpoints.generations == [6]
    assert float(checkpoints.restore_best(state)[0].params["w"][0, 0]) == 1
    assert not [*tmp_path.glob("replaced/*")]
    save(8, 6.0, score=11)
    checkpoints.wait()
    assert checkpoints.best == 8 and float(checkpoints.restore_best(state)[0].params["w"][0, 0]) == 6
    checkpoints.close()
    Checkpoints(tmp_path, config={}).close()
    assert not (tmp_path / "best").exists()


def test_arrays_above_the_limit_are_written_and_read(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "IN_FLIGHT", 15)  # bytes; the matrix has 16
    monkeypatch.setattr(checkpoint, "CHUNK", 8)
    checkpoints, state = Checkpoints(tmp_path, config={}), make_state(1.0)
    checkpoints.save(state)
    checkpoints.save(state._replace(generation=jnp.int32(1)), np.arange(100))
    checkpoints.close()
    again = Checkpoints(tmp_path, config={})
    restored, carried = again.restore(make_state(0.0), np.zeros(100, int))
    assert int(restored.generation) == 1 and fingerprint(restored.params) == fingerprint(state.params)
    np.testing.assert_array_equal(carried, np.arange(100))
    again.close()
    other = Checkpoints(tmp_path, config={})
    with pytest.raises(checkpoint.OtherModel, match="of another model or optimizer"):
        other.restore(make_state(0.0), np.zeros(1, int))
    other.close()


def test_pieces_have_the_fingerprint_of_the_whole(monkeypatch):
    values = np.arange(8 * 6, dtype=np.float32).reshape(8, 6)
    mesh = jax.make_mesh((2,), ("x",), devices=jax.devices()[:2])
    sharded = jax.device_put(values, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x")))
    expected = hashlib.sha256(b"['w'] float32 (8, 6);" + values.tobytes()).hexdigest()
    assert fingerprint({"w": jnp.asarray(values)}) == expected
    monkeypatch.setattr(fingerprints, "PIECE", 3 * 24)  # bytes: three of eight rows
    monkeypatch.setattr(fingerprints, "_is_on_host", lambda array: False)
    assert [len(piece) for piece in fingerprints._pieces(jnp.asarray(values))] == [3, 3, 2]
    for array in (values, values.T.copy().T, jnp.asarray(values), sharded):
        assert fingerprint({"w": array}) == expected
    assert fingerprint(jnp.zeros((0, 2))) != fingerprint(jnp.zeros((2, 0)))
    scalar, key = fingerprint({"w": jnp.float32(1)}), fingerprint({"w": jax.random.key(0)})
    assert scalar == hashlib.sha256(b"['w'] float32 ();" + np.float32(1).tobytes()).hexdigest()
    assert key == fingerprint({"w": jax.random.key_data(jax.random.key(0))}) and key != scalar


def test_orbax_is_named_where_it_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "orbax.checkpoint", None)
    with pytest.raises(ModuleNotFoundError, match=r"^checkpoints need orbax, .* pip install orbax-checkpoint installs it\.$"):
        Checkpoints(tmp_path, config={})
