"""What is stored stays finite, memory is reused, counts do not overflow."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import eggroll
from eggroll import generation, zo
from eggroll.journal import replay
from eggroll.noise import regions
from eggroll.update.blocks import BASE, carry_over
from tests.tables import slow

X = jnp.linspace(-1, 1, 12).reshape(4, 3)
PARAMS = {"used": jnp.ones((3, 2)), "unused": jnp.ones(5)}


def fitness(params, batch, key):
    return -jnp.mean((batch.astype(params["used"].dtype) @ params["used"]).astype(jnp.float32) ** 2)


def strategy(**options):
    settings = {"population_size": 16, "sigma": 0.1, "optimizer": optax.sgd(0.1)} | options
    return eggroll.EvolutionStrategy(fitness, **settings)


def all_finite(state):
    floats = [leaf for leaf in jax.tree.leaves((state.params, state.opt_state, state.masters)) if leaf.dtype.kind == "f"]
    return all(np.isfinite(np.asarray(leaf, np.float32)).all() for leaf in floats)


def nan_after_the_first(step):
    return jnp.where(step < 1, 0.1, jnp.nan)


@pytest.mark.parametrize(
    ("optimizer", "kept"),
    [
        (optax.adam(0.1, eps=0.0), [1, 1, 1]),  # 0 / 0 of the unused parameter
        (optax.sgd(nan_after_the_first), [0, 2, 2]),
        (optax.inject_hyperparams(optax.sgd)(nan_after_the_first), [0, 2, 2]),  # the rate is part of the state
        (optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.1, eps=0.0)), [1, 1, 1]),
    ],
)
def test_a_block_that_would_not_be_finite_keeps_its_values_and_is_counted(optimizer, kept, standard_promotion):
    es = strategy(optimizer=optimizer)
    state, found = es.init(PARAMS, key=jax.random.key(0)), []
    for _ in range(3):
        state, metrics = es.step(state, X)
        found.append(int(metrics.kept))
        assert all_finite(state) and not metrics.skipped
    assert found == kept and (state.params["unused"] == 1).all() and (state.params["used"] != 1).all()


@pytest.mark.parametrize("precision", ["nearest", "stochastic", "master"])
def test_float16_never_becomes_infinite(precision):
    es = strategy(optimizer=optax.sgd(1e9), precision=precision)
    state = es.init(jax.tree.map(lambda x: x.astype(jnp.float16), PARAMS), key=jax.random.key(0))
    state, metrics = es.step(state, X)
    assert metrics.kept == 1 and all_finite(state) and (state.params["used"] == 1).all()


def test_a_training_run_reports_kept_blocks(standard_promotion):
    es = strategy(optimizer=optax.adam(0.1, eps=0.0))
    with pytest.warns(UserWarning, match="1 blocks of parameters kept their old values"):
        _, history = eggroll.train(es, es.init(PARAMS, key=jax.random.key(0)), X, generations=2)
    assert [record.kept for record in history] == [1, 1]


def test_a_consumed_state_is_refused_by_name_and_a_copy_lives(tmp_path):
    es = strategy()
    first = es.init(PARAMS, key=jax.random.key(0))
    population, copy = es.ask(first), eggroll.copy_state(first)
    state, metrics = es.step(first, X)
    for use in (
        lambda: es.step(first, X),
        lambda: es.tell(first, np.zeros(16)),
        lambda: es.replay(first, metrics.coefficients),
        lambda: population.apply(lambda params, x: x @ params["used"], X),
        lambda: population.member(0),
        lambda: es.parameters(first),
        lambda: replay(es, first, iter([])),
        lambda: eggroll.DurableRun(tmp_path, es, first, config={}),
    ):
        with pytest.raises(ValueError, match=r"the state was consumed: .*eggroll\.copy_state"):
            use()
    again = es.replay(copy, metrics.coefficients)
    np.testing.assert_array_equal(again.params["used"], state.params["used"])
    assert first.generation == 0 and metrics.generation == 0  # scalars stay


def test_a_state_shares_no_memory_with_the_caller_or_within_itself():
    tied, key = jnp.ones((3, 2)), jax.random.key(0)
    es = strategy(optimizer=optax.contrib.schedule_free_sgd(0.1))  # its state begins as the parameters
    state = es.init({"used": tied, "unused": tied}, key=key)
    places = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves((state.params, state.opt_state)) if leaf.size > 1]
    assert len({*places, tied.unsafe_buffer_pointer()}) == len(places) + 1
    es.step(state, X)
    assert (tied == 1).all() and jax.random.key_data(key).shape == (2,)


def test_arrays_that_the_optimizer_holds_are_not_consumed(standard_promotion):
    rate, anchor = jnp.float32(0.1), jnp.ones((3, 2))
    held = optax.GradientTransformation(lambda params: anchor, lambda u, state, params=None: (u, state))
    for optimizer in (
        optax.inject_hyperparams(optax.sgd)(learning_rate=rate),
        optax.noisy_sgd(0.1, key=jax.random.key(1)),
        held,
    ):
        es = strategy(optimizer=optimizer)
        for seed in range(2):
            es.step(es.init(PARAMS, key=jax.random.key(seed)), X)
    assert rate == 0.1 and (anchor == 1).all()


@pytest.mark.parametrize("rules", [eggroll.LowRank(), [("third", eggroll.Frozen()), (".*", eggroll.LowRank())]])
def test_moments_stay_with_a_parameter_that_is_kept_also_when_the_optimizer_mixes(rules, standard_promotion):
    optimizer = optax.chain(optax.trace(0.9), optax.clip_by_global_norm(1.0), optax.scale(1e9), optax.sgd(1.0))
    es = strategy(optimizer=optimizer, precision="nearest", perturbation=rules)
    params = PARAMS | {"third": jnp.ones(2)}
    state = es.init(jax.tree.map(lambda x: x.astype(jnp.float16), params), key=jax.random.key(0))
    before = eggroll.copy_state(state)
    state, metrics = es.step(state, X)
    assert metrics.kept == 1 and "all parameters at once" in es.plan(state).update
    np.testing.assert_array_equal(state.opt_state[0].trace["used"], before.opt_state[0].trace["used"])


def test_an_infinity_that_was_there_does_not_stop_a_block():
    es = strategy(optimizer=optax.sgd(0.1))
    params = {"used": jnp.ones((3, 2)), "unused": jnp.array([1.0, -jnp.inf])}
    state, metrics = es.step(es.init(params, key=jax.random.key(0)), X)
    assert metrics.kept == 0 and state.params["unused"][1] == -jnp.inf


def test_moments_keep_their_dtype():
    drifting = optax.GradientTransformation(
        lambda params: jax.tree.map(lambda x: x.astype(jnp.bfloat16), params), lambda u, state, params=None: (u, u)
    )
    es = strategy(optimizer=drifting)
    state, _ = es.step(es.init(PARAMS, key=jax.random.key(0)), X)
    assert {leaf.dtype for leaf in jax.tree.leaves(state.opt_state)} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize("kind", ["evolution", "zeroth order"])
def test_donated_parameters_are_consumed(kind):
    params = {"used": jnp.ones((3, 2)), "unused": jnp.ones(5)}
    es = strategy() if kind == "evolution" else zo.mezo(lambda p, b, key: -fitness(p, b, key), learning_rate=0.1)
    state = es.init(params, key=jax.random.key(0), donate=True)
    assert state.params["used"] is params["used"]
    es.step(state, X)
    assert params["used"].is_deleted()
    with pytest.raises(ValueError, match="donate=True"):
        es.step(state, X)
    with pytest.raises(ValueError, match="donate=True"):
        es.init(params, key=jax.random.key(0))


def state_shapes(es, params):
    return jax.eval_shape(lambda: es.init(jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), params), key=jax.random.key(0)))


def update_of(es, params, batch):
    state = state_shapes(es, params)
    plan = es.plan(state, batch)
    update = functools.partial(generation.update_parameters, es, plan, optimizer=es.optimizer)
    kind = jnp.int32 if plan.is_integer else jnp.float32
    return jax.jit(update, donate_argnums=0).lower(state, jax.ShapeDtypeStruct((es.population_size // 2,), kind))


def decoder(params, batch, key):
    def layer(x, weights):
        return x + jax.nn.relu(x @ weights[0].astype(x.dtype)) @ weights[1].astype(x.dtype), None

    x = params["embed"][batch].astype(jnp.bfloat16)
    x, _ = jax.lax.scan(layer, x, (params["up"], params["down"]))
    return (x @ params["embed"].astype(x.dtype).T).mean(dtype=jnp.float32)


def decoder_shapes(layers, width, vocabulary, dtype=jnp.bfloat16):
    shapes = {"embed": (vocabulary, width), "up": (layers, width, 4 * width), "down": (layers, 4 * width, width)}
    return {name: jax.ShapeDtypeStruct(shape, dtype) for name, shape in shapes.items()}


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.int8])
@pytest.mark.parametrize("size", [(42, 2560, 100_000), (60, 4096, 256_000)])
def test_counts_beyond_two_to_the_31_do_not_overflow(size, dtype):
    """2.5 and 9.1 billion parameters, traced from shapes alone."""
    shapes = decoder_shapes(*size, dtype)
    assert sum(math.prod(leaf.shape) for leaf in shapes.values()) > 2**31
    es = eggroll.EvolutionStrategy(decoder, population_size=64, sigma=1e-3, optimizer=optax.sgd(0.1), precision="stochastic")
    update_of(es, shapes, jax.ShapeDtypeStruct((1,), jnp.int32))


def test_integer_noise_of_nine_billion_parameters_lowers():
    def recurrent(params, batch, key):
        def layer(x, w):
            total = jax.lax.dot_general(x, w, (((0,), (0,)), ((), ())), preferred_element_type=jnp.int32)
            return jnp.clip(total >> 8, -127, 127).astype(jnp.int8), None

        return jax.lax.scan(layer, batch, params["layers"])[0].astype(jnp.int32).sum()

    es = eggroll.EvolutionStrategy(
        recurrent,
        population_size=64,
        sigma=None,
        optimizer=eggroll.threshold(0.1),
        perturbation=eggroll.Integer(),
        shaping="pair_sign",
    )
    update_of(es, {"layers": jax.ShapeDtypeStruct((560, 4096, 4096), jnp.int8)}, jax.ShapeDtypeStruct((4096,), jnp.int8))


@pytest.mark.optimized
@pytest.mark.parametrize(
    ("dtype", "precision", "optimizer", "most"),
    [
        (jnp.bfloat16, "stochastic", optax.sgd(0.1), 1.25),
        slow(jnp.bfloat16, "stochastic", optax.adam(0.1), 1.15),
        slow(jnp.bfloat16, "master", optax.sgd(0.1), 1.15),
        slow(jnp.int8, "master", optax.sgd(0.1), 1.15),
        slow(jnp.int8, eggroll.Feedback(), optax.sgd(0.1), 1.25),
    ],
)
def test_the_peak_of_an_update_is_the_state_and_a_small_working_set(
    dtype, precision, optimizer, most, monkeypatch, standard_promotion
):
    monkeypatch.setattr(regions, "LIMIT", 4 << 10)  # a model of 1.4 million parameters instead of a billion
    es = eggroll.EvolutionStrategy(decoder, population_size=16, sigma=1e-3, optimizer=optimizer, precision=precision)
    shapes = decoder_shapes(4, 128, 8192, dtype)
    memory = update_of(es, shapes, jax.ShapeDtypeStruct((1,), jnp.int32)).compile().memory_analysis()
    peak = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes + memory.temp_size_in_bytes
    state = state_shapes(es, shapes)
    held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves((state.params, state.opt_state, state.masters)))
    assert peak <= most * held


def test_two_digits_count_more_than_int32():
    moved = jnp.array([2**31 // BASE * 3, BASE - 1], jnp.int32)
    carried = carry_over(moved + jnp.array([0, 2], jnp.int32))
    assert int(carried[0]) * BASE + int(carried[1]) == 3 * 2**31 + BASE + 1


@pytest.mark.parametrize("limit", [10**6, 7])
def test_an_update_is_measured_in_sigmas(limit, monkeypatch):
    monkeypatch.setattr(regions, "LIMIT", limit)
    rules = [("still", eggroll.Frozen()), ("w", eggroll.LowRank(sigma_multiplier=0.5)), (".*", eggroll.LowRank())]
    params = {"still": jnp.full(9, 100.0), "v": jnp.ones(5), "w": jnp.ones((4, 6))}
    es = eggroll.EvolutionStrategy(
        lambda p, batch, key: -jnp.sum(p["w"] ** 2) - jnp.sum(p["v"] ** 2) + p["still"][0],
        population_size=16,
        sigma=0.1,
        optimizer=optax.sgd(0.1),
        perturbation=rules,
    )
    state, metrics = es.step(es.init(params, key=jax.random.key(0)))
    steps = [(state.params[name] - params[name]) / sigma for name, sigma in (("v", 0.1), ("w", 0.05))]
    sigmas = np.sqrt(sum(float((step**2).sum()) for step in steps) / 29)
    np.testing.assert_allclose(metrics.update_over_sigma, sigmas, rtol=1e-5)
    norm = np.sqrt(sum(float((state.params[name] ** 2).sum()) for name in "vw"))
    np.testing.assert_allclose(metrics.weight_norm, norm, rtol=1e-6)
    moved = np.sqrt(sum(float(((state.params[name] - params[name]) ** 2).sum()) for name in "vw"))
    np.testing.assert_allclose(metrics.update_over_weights, moved / norm, rtol=1e-5)
