"""Offloading and meshes change where a zeroth-order step runs, not what it does."""

import gc

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import eggroll
from eggroll import programs, zo
from eggroll.journal.fingerprint import fingerprint
from eggroll.zo.offload import passes
from eggroll.zo.offload.devices import hash_words
from tests.tables import by_default
from tests.zo.tiny_blocks import BATCH, PIECES, begin, block, end, init

KEY = jax.random.key(9)
WARMUP = optax.linear_schedule(1e-3, 3e-2, 10)


def flat(tree):
    return np.concatenate([np.ravel(np.asarray(leaf, np.float32)) for leaf in jax.tree.leaves(tree)])


def tuner(**options):
    return zo.mezo(PIECES, **dict(learning_rate=WARMUP, sigma=1e-2, weight_decay=0.1) | options)


def offloaded(own, steps, *, params=None, **options):
    own = zo.Offload(own, **options)
    state, seen = own.init(params or init(), key=KEY), []
    for _ in range(steps):
        state, metrics = own.step(state, BATCH)
        seen.append(metrics)
    return own, state, seen


SETTINGS = {
    "mezo": {},
    "directions in chunks": dict(directions=5, chunk_directions=2),
    "low-rank": dict(perturbation=eggroll.LowRank(2)),
    "lozo": dict(perturbation=eggroll.LowRank(2, "normal", refresh=3), directions=2),
    "fzoo": dict(estimator="fzoo", directions=4, perturbation=eggroll.Dense("rademacher")),
    "curvature": dict(estimator="curvature", directions=3),
    "grzo": dict(estimator="grzo", directions=4, chunk_directions=3, perturbation=eggroll.Flipout(), learning_rate=1e-4),
    "meazo": dict(second_moment=0.9, learning_rate=1e-3),
    "adamezo": dict(
        adam=zo.RebuiltAdam(history=6), learning_rate=1e-3, directions=2, perturbation=eggroll.LowRank(2, refresh=3)
    ),
    "frozen": dict(perturbation=[("resident/embed", eggroll.Frozen()), (".*/up", eggroll.Frozen()), (".*", eggroll.Dense())]),
}


@pytest.mark.parametrize("name", by_default(SETTINGS, "low-rank"))
def test_an_offloaded_run_is_the_resident_run(name):
    """20 steps with warm-up, weight decay and tied embeddings; the deferred update has its own learning rate."""
    own = tuner(**SETTINGS[name])
    state = own.init(init(), key=KEY)
    away, moved, seen = offloaded(own, 20)
    for step in range(20):
        state, metrics = own.step(state, BATCH)
        np.testing.assert_allclose(seen[step].mean_fitness, metrics.mean_fitness, rtol=2e-5, err_msg=str(step))
        if step == 0:
            np.testing.assert_allclose(seen[step].coefficients, metrics.coefficients, rtol=1e-3, atol=2e-6)
    flushed = away.flush(moved)
    np.testing.assert_allclose(flat(away.parameters(flushed)), flat(state.params), atol=5e-5)
    whole, _ = own._weighted(state.params, BATCH, KEY), None
    np.testing.assert_allclose(away.loss(flushed, BATCH, key=KEY), whole[0] / whole[1], rtol=1e-5)


@pytest.mark.slow
def test_the_learning_rate_of_another_step_gives_other_parameters():
    """The negative control: the deferred update with the rate of the next step, as the first implementations had it."""
    own = tuner()
    away = zo.Offload(own)
    state, late = away.init(init(), key=KEY), away.init(init(), key=KEY)
    for step in range(20):
        state, _ = away.step(state, BATCH)
        late, _ = away.step(late, BATCH)
        late = late._replace(pending=late.pending._replace(rate=jnp.float32(WARMUP(step + 1))))
    difference = np.abs(flat(away.parameters(away.flush(late))) - flat(away.parameters(away.flush(state)))).max()
    assert difference > 1e-3


def test_blocks_stay_in_host_memory_and_are_consumed():
    away = zo.Offload(tuner())
    first = away.init(init(), key=KEY)
    state, _ = away.step(first, BATCH)
    kinds = {leaf.sharding.memory_kind for own in state.blocks for leaf in jax.tree.leaves(own)}
    assert kinds == {"pinned_host"}
    assert all(leaf.is_deleted() for own in first.blocks for leaf in jax.tree.leaves(own))  # the host holds them once
    for use in (away.parameters, lambda state: away.loss(state, BATCH, key=KEY)):
        with pytest.raises(ValueError, match="consumed"):
            use(first)


def live_bytes():
    """Bytes of the arrays on the device."""
    arrays = [x for x in jax.live_arrays() if x.sharding.memory_kind == "device" and not x.is_deleted()]
    return sum(x.nbytes for x in arrays if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key))


def bytes_of(lowered):
    """Arguments, temporaries and outputs of a program."""
    memory = lowered.compile().memory_analysis()
    return memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.output_size_in_bytes


@pytest.mark.optimized
@pytest.mark.slow
def test_memory_of_the_device_does_not_grow_with_the_blocks(monkeypatch):
    """Live arrays whenever a block has arrived, and the programs that work on it: 4 against 16 blocks."""
    upload, found = passes._upload, {}
    for blocks in (4, 16):
        own, peak = zo.Offload(tuner()), []
        state, _ = own.step(own.init(init(blocks), key=KEY), BATCH)
        gc.collect()
        before = live_bytes()

        def counted(block, peak=peak):
            arrived = upload(block)
            peak.append(live_bytes())
            return arrived

        monkeypatch.setattr(passes, "_upload", counted)
        state, _ = own.step(state, BATCH)
        monkeypatch.setattr(passes, "_upload", upload)
        carry, aux = programs.find_all("begin")[-1](state._replace(blocks=()), BATCH)
        arrived, index = upload(state.blocks[0]), jnp.int32(0)
        calls = {"update_block": (state.pending, state.key, arrived, index)}
        calls["visit"] = (state._replace(blocks=()), arrived, index, carry, aux)
        program = [bytes_of(programs.find_all(name)[-1].lower(*arguments)) for name, arguments in calls.items()]
        found[blocks] = (max(peak) - before, program, sum(leaf.nbytes for leaf in jax.tree.leaves(state.blocks)))
    assert abs(found[16][0] - found[4][0]) <= 0.05 * found[4][0] and found[16][1] == found[4][1]
    assert found[16][2] == 4 * found[4][2]  # the blocks themselves did grow


@pytest.mark.slow
def test_short_floats_are_transferred_and_small_updates_accumulate():
    """bfloat16 transfers: 30 updates smaller than its spacing. The slope of the actual on the exact change is 1, and not 0,
    within 5 standard errors.
    """
    push = zo.Blocks(lambda r, b, k: (r["s"] * jnp.ones(()), ()), lambda p, x, a: x + p["w"].sum(), lambda r, x, b: x)
    params = {"resident": {"s": jnp.ones(1).sum()}, "blocks": {"w": jnp.ones((2, 4096)), "n": jnp.full((2, 3), 1001)}}
    rules = [(".*/n", eggroll.Frozen()), (".*", eggroll.Dense("rademacher"))]
    own = zo.mezo(push, learning_rate=1.5e-6, sigma=1e-2, perturbation=rules)
    away = zo.Offload(own, transfer_dtype=jnp.bfloat16)
    state, plain = away.init(params, key=KEY), own.init(params, key=KEY)
    for _ in range(30):
        state, _ = away.step(state)
        plain, _ = own.step(plain)
    assert state.blocks[0]["w"].values.dtype == jnp.bfloat16
    blocks = away.parameters(away.flush(state))["blocks"]
    np.testing.assert_array_equal(blocks["n"], params["blocks"]["n"])  # integers are transferred unchanged
    arrived, wanted = np.ravel(blocks["w"]) - 1, np.ravel(plain.params["blocks"]["w"]) - 1
    assert blocks["w"].dtype == np.float32 and np.abs(wanted).max() < 2**-8  # less than one step of bfloat16
    slope = arrived @ wanted / (wanted @ wanted)
    error = (arrived - slope * wanted).std() / np.linalg.norm(wanted)
    assert abs(slope - 1) < 5 * error < slope


def moments(words):
    """z-scores of 8 x 16 keys of words at 2^14 places: of the mean, of the bits, of products with the next place and key."""
    uniform = np.asarray(words & 0xFFFF, np.float64) / 2**16 - 0.5 + 2.0**-17
    n, variance = uniform.size, (1 - 2.0**-32) / 12
    bits = np.unpackbits(np.asarray(words).view(np.uint8)).reshape(n, 32).mean(axis=0) - 0.5
    products = [(uniform * np.roll(uniform, 1, axis=axis)).mean() / variance * np.sqrt(n) for axis in (0, 1, 2)]
    return np.array([uniform.mean() * np.sqrt(n / variance), *(2 * bits * np.sqrt(n)), *products])


def test_words_of_rounding_are_random():
    """Generations and leaves have keys of their own: 36 z-scores, each within 5."""
    split = jax.vmap(jax.random.fold_in, (None, 0))
    keys = jax.vmap(split, (0, None))(split(KEY, jnp.arange(8)), jnp.arange(16))
    places = jnp.arange(1 << 14, dtype=jnp.uint32)
    words = jax.jit(jax.vmap(jax.vmap(lambda key: hash_words(key, places))))(keys)
    assert np.abs(moments(words)).max() < 5
    apart = jax.vmap(jax.vmap(lambda key: hash_words(key, jnp.uint32(7) + places[:64])))(keys)
    np.testing.assert_array_equal(apart, words[..., 7:71])  # a word belongs to its place
    counted = (places * jnp.uint32(0x9E3779B9) + jax.random.key_data(keys)[..., :1]).reshape(words.shape)
    assert np.abs(moments(counted)).max() > 5  # the control: counters that are not mixed


@pytest.mark.slow
def test_dropout_is_the_same_for_all_forwards_of_a_step():
    """A loss whose key adds much noise: the differences are those without it."""
    for estimator in zo.ESTIMATORS:
        plain = zo.ZerothOrder(_square, directions=4, sigma=1e-3, optimizer=optax.sgd(1e-3), estimator=estimator)
        noisy = zo.ZerothOrder(
            lambda p, b, k: _square(p, b, k) + jax.random.normal(k),
            directions=4,
            sigma=1e-3,
            optimizer=optax.sgd(1e-3),
            estimator=estimator,
        )
        batch = jnp.zeros((4, 1))  # an example for every direction, where the estimator wants that
        found = [own.step(own.init({"w": jnp.ones(8)}, key=KEY), batch)[1].coefficients for own in (plain, noisy)]
        np.testing.assert_allclose(found[0], found[1], rtol=0.02, atol=1e-5, err_msg=estimator)


def _square(params, batch, key):
    return jnp.sum(params["w"] ** 2)


@pytest.mark.slow
def test_dropout_within_the_blocks_equals_that_of_the_resident_step():
    def dropping(params, x, key):
        return block(params, x, jnp.ones(())) * jax.random.bernoulli(key, 0.7, x.shape).astype(x.dtype)

    pieces = zo.Blocks(lambda resident, batch, key: (resident["embed"][batch], key), dropping, end)
    own = zo.mezo(pieces, learning_rate=1e-3, sigma=1e-2, directions=3)
    state, metrics = own.step(own.init(init(), key=KEY), BATCH)
    away = zo.Offload(own)
    _, found = away.step(away.init(init(), key=KEY), BATCH)
    np.testing.assert_allclose(found.coefficients, metrics.coefficients, rtol=1e-3, atol=2e-6)


def test_a_restored_state_needs_the_plan_and_other_shapes_have_their_own():
    away, state, _ = offloaded(tuner(), 1)
    fresh = zo.Offload(tuner(sigma=2e-2))
    with pytest.raises(ValueError, match="a pending update needs the plan"):
        fresh.flush(state)
    fresh.plan(state, BATCH)
    assert float(fresh.flush(state).pending.rate) == 0
    other = away.init(jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), init()), key=KEY)
    other, _ = away.step(other, BATCH)
    assert {leaf.dtype for leaf in jax.tree.leaves(away.parameters(other))} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.slow
def test_a_bad_direction_and_an_overflow_are_handled_as_in_the_resident_step():
    sick = PIECES._replace(end=lambda r, x, b: (jnp.where(r["norm"][0] > 1, jnp.inf, 1.0) * end(r, x, b)[0], end(r, x, b)[1]))
    huge = PIECES._replace(end=lambda r, x, b: (1e25 * end(r, x, b)[0], end(r, x, b)[1]))
    for pieces, skips in ((sick, False), (huge, True)):
        own = zo.mezo(pieces, learning_rate=1e-3, sigma=1e-2, directions=6, estimator="one_sided", second_moment=0.9)
        state, metrics = own.step(own.init(init(), key=KEY), BATCH)
        away = zo.Offload(own)
        moved, found = away.step(away.init(init(), key=KEY), BATCH)
        assert bool(found.skipped) == bool(metrics.skipped) == skips
        np.testing.assert_allclose(found.mean_fitness, metrics.mean_fitness, rtol=1e-5)
        np.testing.assert_allclose(flat(away.parameters(away.flush(moved))), flat(state.params), atol=1e-4)


def test_a_step_without_a_finite_loss_changes_nothing_and_the_next_step_is_normal():
    sick = PIECES._replace(end=lambda r, x, b: tuple(jnp.where(b[0, 0] < 0, jnp.nan, part) for part in end(r, x, jnp.abs(b))))
    own = zo.mezo(sick, learning_rate=1e-2, weight_decay=0.1)
    away, bad = zo.Offload(own), BATCH.at[0, 0].set(-1)
    state = away.init(init(), key=KEY)
    state, metrics = away.step(state, bad)
    assert metrics.skipped and float(state.pending.rate) == 0
    np.testing.assert_array_equal(flat(away.parameters(away.flush(state))), flat(init()))
    state, metrics = away.step(state, BATCH)
    assert not metrics.skipped and float(state.pending.rate) > 0


def test_values_that_would_not_be_finite_stay_as_they_were():
    """A schedule that gives NaN, and a weight that the transfer dtype cannot hold any more."""
    own = tuner(learning_rate=lambda step: jnp.where(step == 0, jnp.nan, 1e-3))
    away, state, _ = offloaded(own, 1)
    np.testing.assert_array_equal(flat(away.parameters(away.flush(state))), flat(init()))
    params = init()
    params["blocks"]["bias"] = params["blocks"]["bias"].at[0].set(65504.0)
    grow = zo.mezo(PIECES, learning_rate=1e3, sigma=1e-2)
    away, state, _ = offloaded(grow, 1, params=params, transfer_dtype=jnp.float16)
    after = away.parameters(away.flush(state))["blocks"]["bias"]
    assert np.isfinite(after).all() and np.abs(after[1:]).min() > 16  # half of the others would be beyond float16


def test_a_number_as_sigma_is_that_sigma():
    away = zo.Offload(tuner())
    state, metrics = away.step(away.init(init(), key=KEY)._replace(sigma=2e-3), BATCH)
    assert metrics.sigma.item() == state.sigma.item() == np.float32(2e-3)


def test_parameters_and_loss_include_the_pending_update_and_keep_the_state():
    away, state, _ = offloaded(tuner(), 2)
    before, stored = away.loss(state, BATCH, key=KEY), fingerprint(state)
    parameters = away.parameters(state)
    assert fingerprint(state) == stored and fingerprint(parameters) == fingerprint(away.parameters(state))
    flushed = away.flush(state)
    assert fingerprint(away.parameters(flushed)) == fingerprint(parameters)
    assert away.loss(flushed, BATCH, key=KEY) == before
    assert away.flush(flushed) is flushed
    first = away.loss(away.init(init(), key=KEY), BATCH, key=KEY)
    assert abs(first - before) > 1e-5  # the control: the updates move the loss


@pytest.mark.parametrize("name", by_default(["plain", "short floats", "adamezo"], "short floats"))
def test_flush_and_replay_give_the_bits_of_the_run(name):
    """Six steps, the third skipped: as they are, with a flush after every step, and replayed from their coefficients."""
    sick = PIECES._replace(end=lambda r, x, b: tuple(jnp.where(b[0, 0] < 0, jnp.nan, part) for part in end(r, x, jnp.abs(b))))
    adam = zo.RebuiltAdam(history=3) if name == "adamezo" else None
    own = zo.mezo(sick, learning_rate=WARMUP, sigma=1e-2, weight_decay=0.1, directions=2, adam=adam)
    away = zo.Offload(own, transfer_dtype=jnp.bfloat16 if name == "short floats" else None)
    states = [away.init(init(), key=KEY, batch=BATCH) for _ in range(3)]
    for step in range(6):
        batch = BATCH.at[0, 0].set(-1) if step == 2 else BATCH
        states[0], metrics = away.step(states[0], batch)
        states[1] = away.flush(away.step(states[1], batch)[0])
        states[2] = away.replay(states[2], metrics.coefficients)
        assert fingerprint(states[2]) == fingerprint(states[0]) and metrics.skipped == (step == 2)
        expected = fingerprint(away.parameters(states[0]))
        assert fingerprint(away.parameters(states[1])) == expected
    wrong = away.replay(away.init(init(), key=KEY), -metrics.coefficients)  # the control
    assert fingerprint(wrong) != fingerprint(away.replay(away.init(init(), key=KEY), metrics.coefficients))
    with pytest.raises(ValueError, match=r"coefficients must have shape \(2,\), got \(3,\)"):
        away.replay(states[0], jnp.zeros(3))


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (
            lambda: zo.Offload(zo.mezo(lambda p, b, k: 0.0, learning_rate=0.1)),
            TypeError,
            "the loss of the tuner must be Blocks",
        ),
        (
            lambda: zo.Offload(zo.ZerothOrder(PIECES, directions=1, sigma=0.1, optimizer=optax.sgd(0.1))),
            TypeError,
            "only Descent can be deferred",
        ),
        (lambda: zo.Offload(tuner(momentum=0.9)), ValueError, "momentum cannot be deferred block by block"),
        (
            lambda: zo.Offload(tuner(), transfer_dtype=jnp.int8),
            ValueError,
            "transfer_dtype must be a float of 16 bits or fewer",
        ),
        (
            lambda: zo.Offload(tuner(), transfer_dtype=jnp.float32),
            ValueError,
            "transfer_dtype must be a float of 16 bits or fewer",
        ),
        (lambda: offloaded(tuner(), 1, params={"blocks": {}}), ValueError, "params of Blocks must be"),
        (
            lambda: offloaded(
                tuner(), 1, params={"resident": {"a": jnp.ones(1)}, "blocks": {"a": jnp.ones((2, 3)), "b": jnp.ones(3)}}
            ),
            ValueError,
            "blocks must be stacked, every leaf with the same leading axis",
        ),
    ],
)
def test_what_cannot_be_offloaded_is_refused(make, error, words):
    with pytest.raises(error, match=words):
        make()


def test_pieces_are_one_function():
    x, aux = begin(init()["resident"], BATCH, KEY)
    for index in range(4):
        x = block(jax.tree.map(lambda leaf, i=index: leaf[i], init()["blocks"]), x, aux)
    total, weight = end(init()["resident"], x, BATCH)
    found = tuner()._weighted(init(), BATCH, KEY)
    np.testing.assert_allclose(found, (total, weight), rtol=1e-6)
