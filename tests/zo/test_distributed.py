"""A mesh changes where a zeroth-order step runs, not what it does: the oracle is the resident run on one device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh

import eggroll
from eggroll import programs, zo
from eggroll.experiments.bench.collectives import collective_bytes
from eggroll.noise.factored import LowRankLeaf
from eggroll.noise.leaves import DenseLeaf
from eggroll.noise.plan import Plan
from eggroll.noise.rules import Dense, LowRank
from eggroll.update.estimator import gradient
from eggroll.zo.offload.devices import part_of_gradient
from tests.tables import slow
from tests.zo.tiny_blocks import BATCH, PIECES, init

RATE = optax.linear_schedule(1e-3, 3e-2, 10)
STEPS = 20


def flat(tree):
    return np.concatenate([np.ravel(np.asarray(leaf, np.float32)) for leaf in jax.tree.leaves(tree)])


def run(on=None, *, offload=False, transfer_dtype=None, steps=STEPS, **options):
    """Losses and coefficients of every step, the parameters, whether replicas are equal to the bit, the first step's scale."""
    options = dict(learning_rate=RATE, sigma=1e-2, weight_decay=0.1, directions=4, mesh=on) | options
    tuner = zo.mezo(PIECES, **options)
    runner = zo.Offload(tuner, transfer_dtype=transfer_dtype) if offload else tuner
    state, seen, scale = runner.init(init(), key=jax.random.key(9)), [], 0.0
    for step in range(steps):
        state, metrics = runner.step(state, BATCH)
        if step == 0:
            pairs = np.asarray(metrics.fitness).reshape(-1, 2)
            scale = float(np.abs(metrics.coefficients).max() / np.abs(pairs[:, 0] - pairs[:, 1]).max())
        seen.append([-float(metrics.mean_fitness), *np.asarray(metrics.coefficients).tolist()])
    kept = state.resident if offload else state.params
    replicas = [[np.asarray(part.data).tobytes() for part in leaf.addressable_shards] for leaf in jax.tree.leaves(kept)]
    same = all(len(set(parts)) == 1 for parts in replicas)
    params = runner.parameters(state)
    return np.array(seen), flat(params), same, scale


def mesh(**sizes):
    return Mesh(np.array(jax.devices()[: int(np.prod(list(sizes.values())))]).reshape(*sizes.values()), tuple(sizes))


MESHES = {
    "population 2": mesh(population=2),
    "population 4": mesh(population=4),
    "data 2": mesh(data=2),
    "data 4": mesh(data=4),
    "population 2, data 2": mesh(population=2, data=2),
    "data 2, population 2": mesh(data=2, population=2),
}
BOTH = MESHES["population 2, data 2"]
OPTIONS = {
    "mezo": {},
    "fzoo": {"estimator": "fzoo"},
    "one direction": {"directions": 1},
    "three directions": {"directions": 3, "chunk_directions": 1},
    "grzo": {"estimator": "grzo", "chunk_directions": 1, "perturbation": eggroll.Flipout(), "learning_rate": 1e-4},
    "low rank": {"perturbation": eggroll.LowRank(2, "normal", refresh=3), "directions": 2},
}
CASES = [
    *[("mezo", name) for name in MESHES if name != "data 2, population 2"],
    ("fzoo", "population 2, data 2"),
    ("one direction", "population 2"),
    ("one direction", "data 2, population 2"),
    ("three directions", "population 2"),
    ("three directions", "population 4"),
    ("grzo", "population 2"),
    ("low rank", "population 2, data 2"),
    *[(name, None) for name in OPTIONS],
]
DEFAULT = {("mezo", "population 2, data 2", True), ("one direction", "population 2", False)}  # the others are slow


@functools.cache
def alone(name, **options):
    return run(None, **OPTIONS[name], **options)


def compare(found, expected):
    losses = np.abs(found[0][:, 0] - expected[0][:, 0]).max()
    # In units of a difference of losses, whose rounding is what the coefficients differ by: estimators scale it.
    coefficients = np.abs(found[0][0, 1:] - expected[0][0, 1:]).max() / expected[3]
    assert np.abs(found[1] - expected[1]).max() <= 5e-5 and losses <= 2e-5 and coefficients <= 2e-6
    assert found[2]  # replicas are equal to the bit


@pytest.mark.parametrize(
    ("name", "on", "offload"),
    [
        pytest.param(*case, marks=[] if case in DEFAULT else [pytest.mark.slow])
        for name, on in CASES
        for case in ((name, on, False), (name, on, True))
        if on or case[2]
    ],
)
def test_directions_signs_and_batches_over_devices_are_the_same_run(name, on, offload):
    """20 steps, resident and offloaded: perturbation parallelism, of the two signs of one direction too, data parallelism with
    shares of different weight, both.
    """
    compare(run(MESHES[on] if on else None, offload=offload, **OPTIONS[name]), alone(name))


def test_losses_that_are_subtracted_see_the_same_shares_and_the_same_dropout():
    """Shares of the batch have dropout of their own: with an unperturbed loss of another mask the coefficients are 2.5."""

    def loss(params, batch, key):
        kept = jax.random.bernoulli(key, 0.5, batch.shape).astype(jnp.float32)
        return jnp.mean(jnp.square((batch * kept) @ params["w"]))

    own = zo.mezo(loss, learning_rate=0.1, sigma=1e-4, directions=2, estimator="one_sided", mesh=MESHES["data 2"])
    _, metrics = own.step(own.init({"w": jnp.ones(8)}, key=jax.random.key(9)), jnp.ones((4, 8)))
    # At most 2 sigma |E| |gradient|, with |E| = sqrt(8) and |gradient| <= 2 * 8 * sqrt(8), and a little for the curvature.
    assert 0 < np.abs(metrics.coefficients).max() <= 2 * 1e-4 * 8 * 16 * 1.01


@pytest.mark.slow
def test_blocks_that_cross_as_bfloat16_are_the_same_run():
    short = dict(offload=True, transfer_dtype="bfloat16", steps=3)
    compare(run(BOTH, **short), run(None, **short))


def test_a_block_is_stored_once_and_crosses_once():
    """In slices, not in copies; a device gathers the block, and nothing else crosses."""
    away = zo.Offload(zo.mezo(PIECES, learning_rate=0.1, directions=4, mesh=BOTH))
    params = init(2)
    params["blocks"] |= {"w": jnp.ones((2, 8, 8)), "up": jnp.ones((2, 8, 8)), "bias": jnp.zeros((2, 8))}
    state = away.init(params, key=jax.random.key(0))
    leaves = jax.tree.leaves(state.blocks)
    stored = sum(leaf.nbytes for leaf in leaves)
    host = sum(part.data.nbytes for leaf in leaves for part in leaf.addressable_shards)
    state, _ = away.step(state, BATCH)
    small, batch = state._replace(blocks=()), away.devices.batch(BATCH)
    carry, aux = programs.find_all("begin")[-1](small, batch)
    on_device = jax.device_put(state.blocks[0], jax.tree.map(lambda x: x.sharding.with_memory_kind("device"), state.blocks[0]))
    hlo = programs.find_all("visit")[-1].lower(small, on_device, jnp.int32(0), carry, aux).compile().as_text()
    assert host == stored and collective_bytes(hlo) == {"all-gather": stored // 2}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: zo.Offload(zo.mezo(PIECES, learning_rate=0.1, mesh=mesh(model=2))),
            "blocks are offloaded over mesh axes population and data, got 'model'.",
        ),
        (
            lambda: zo.mezo(PIECES, learning_rate=0.1, mesh=mesh(population=4)),
            "directions 1 can be shared by at most 2 devices; mesh axis 'population' has 4.",
        ),
        (
            lambda: run(mesh(data=3), offload=True, steps=1),
            r"in a multiple of the devices of mesh axis 'data', 3, got shape \(4, 6\).",
        ),
    ],
)
def test_what_cannot_be_sharded_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("spec", [slow(Dense("normal")), Dense("rademacher"), slow(LowRank(2))])
def test_a_part_of_the_gradient_equals_a_slice_of_all_of_it(spec):
    """Every part draws its own dense noise only."""
    about = "w", (5, 33), jnp.dtype("float32"), spec, ""
    leaf = LowRankLeaf(*about, rows=(0,), columns=(1,)) if isinstance(spec, LowRank) else DenseLeaf(*about)
    where = dict(noise_key=jax.random.key(3), noise_generation=jnp.int32(2), sigma=jnp.float32(0.1), first_index=1)
    d = jnp.array([0.5, -2.0, 1.0], jnp.float32)
    expected = np.ravel(gradient(Plan((leaf,), jax.tree.structure(0)), d, **where))
    for count in (192, 64):
        starts = range(0, 192, count)
        parts = [part_of_gradient(leaf, d, first=first, count=count, padded=192, **where) for first in starts]
        np.testing.assert_allclose(np.concatenate(parts)[: expected.size], expected, rtol=1e-6, atol=1e-6)


def test_blocks_of_any_shape_are_stored_and_restored():
    away = zo.Offload(zo.mezo(PIECES, learning_rate=0.1))
    params = init()
    params["blocks"]["deep"] = jax.random.normal(jax.random.key(1), (4, 3, 5, 7))
    state = away.init(params, key=jax.random.key(0))
    assert state.blocks[0]["deep"].values.shape == (128,) and state.blocks[0]["deep"].shape == (3, 5, 7)
    jax.tree.map(np.testing.assert_array_equal, away.parameters(state), params)
