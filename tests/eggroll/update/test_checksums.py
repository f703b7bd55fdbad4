"""Checksums are those of the definition, do not depend on blocks or pieces, and see what a plain sum misses."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import eggroll
from eggroll.noise import regions
from eggroll.update.checksums import OtherState, sum_array
from tests.tables import covering

PARAMS = {"w": jnp.arange(60.0).reshape(3, 20) / 60, "b": jnp.arange(7.0)}
X = jnp.linspace(-1, 1, 12).reshape(4, 3)
U = np.uint32


def by_definition(array):
    """The formula of `eggroll.update.checksums`, in NumPy."""
    data = np.asarray(array)
    words = data.view(f"u{data.dtype.itemsize}").reshape(-1).astype(U)
    place = np.arange(words.size, dtype=U) * U(0x9E3779B9)
    return int(((words ^ (words >> U(16))) * ((place ^ (place >> U(16))) | U(1))).sum(dtype=U))


@pytest.mark.parametrize(
    ("dtype", "shape"),
    covering(["float32", "bfloat16", "float16", "int8", "int32", "uint32", "bool"], [(), (0, 3), (5,), (3, 4, 5)], strength=1),
)
def test_a_checksum_is_that_of_the_definition_and_of_the_pieces(dtype, shape):
    array = jnp.asarray(np.random.default_rng(0).normal(size=shape) * 50, dtype)
    assert int(sum_array(array)) == by_definition(array)
    if len(shape) == 3:
        pieces = [sum_array(array[:, k : k + 2, 1:], shape=shape, starts=(0, k, 1)) for k in (0, 2)]
        pieces += [sum_array(array[..., :1], shape=shape, starts=(0, 0, 0))]
        assert int(sum(pieces)) == int(sum_array(array))


@pytest.mark.parametrize("size", [1 << 5, 1 << 12, 1 << 16])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_changes_that_a_plain_sum_misses_are_seen(size, dtype):
    array = jnp.asarray(np.random.default_rng(1).normal(size=size), dtype)
    swapped = array.at[0].set(1.0).at[size // 2].set(2.0)
    found = [array, 2 * array, -array, jnp.roll(array, 1), array[::-1], swapped, swapped.at[0].set(2.0).at[size // 2].set(1.0)]
    assert len({int(sum_array(one)) for one in found}) == len(found)


def test_keys_and_complex_numbers_have_checksums():
    assert int(sum_array(jax.random.key(1))) == int(sum_array(jax.random.key_data(jax.random.key(1))))
    assert int(sum_array(jnp.array([1 + 2j]))) != int(sum_array(jnp.array([2 + 1j])))


def fitness(params, batch, key):
    return -jnp.mean((batch.astype(params["w"].dtype) @ params["w"]).astype(jnp.float32) ** 2)


OPTIMIZERS = {
    "elements": optax.inject_hyperparams(optax.adam)(learning_rate=0.1),
    "leaves": optax.adafactor(0.1),
    "whole": optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1, momentum=0.9)),
}


@pytest.mark.parametrize(
    ("limit", "optimizer", "rules"),
    covering([16, 1 << 20], OPTIMIZERS, [eggroll.LowRank(), [("w", eggroll.LowRank()), (".*", eggroll.Frozen())]], strength=1),
)
def test_an_update_reports_the_checksums_of_the_states(limit, optimizer, rules, monkeypatch, standard_promotion):
    monkeypatch.setattr(regions, "LIMIT", limit)
    es = eggroll.EvolutionStrategy(
        fitness, population_size=8, sigma=0.1 + limit / 2**30, optimizer=OPTIMIZERS[optimizer], perturbation=rules
    )
    state = es.init(jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS), key=jax.random.key(0))
    es.plan(state, X)
    before, copy = es.checksums(state), eggroll.copy_state(state)
    state, metrics = es.step(state, X)
    after = es.checksums(state)
    assert [*before.values()] == metrics.checksums[0].tolist() and [*after.values()] == metrics.checksums[1].tolist()
    assert {"params/w", "params/b", "masters/w", "key"} <= before.keys() == after.keys()
    assert before["params/w"] == by_definition(copy.params["w"]) and after["masters/w"] == by_definition(state.masters[1])
    es.replay(eggroll.copy_state(copy), metrics.coefficients, checksums=metrics.checksums[1])
    with pytest.raises(OtherState, match="params/w"):
        es.replay(copy, -metrics.coefficients, checksums=[*after.values()])


def test_collections_are_the_users_to_replace():
    params = {"params": {"w": jnp.ones((3, 2))}, "batch_stats": {"mean": jnp.ones(3)}}
    es = eggroll.EvolutionStrategy(
        lambda own, x, key: (x @ own["params"]["w"]).sum(), population_size=4, sigma=0.1, optimizer=optax.sgd(0.1)
    )
    state = es.init(params, key=jax.random.key(0))
    es.plan(state, X)
    checksums = es.checksums(state)
    assert checksums["params/batch_stats/mean"] == 0 and checksums["params/params/w"] != 0
    assert es.step(state, X)[1].checksums[:, 0].tolist() == [0, 0]
