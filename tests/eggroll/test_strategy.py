"""One generation: ask/tell, compilation, schedules, invalid fitness, precision, a golden step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import eggroll
from eggroll import programs

PARAMS = {"w": 0.3 * jax.random.normal(jax.random.key(1), (4, 3)), "b": jnp.zeros(3)}
X = jax.random.normal(jax.random.key(2), (5, 4))


def model(params, x):
    return jnp.tanh(x @ params["w"] + params["b"])


def score(outputs):
    return -jnp.mean((outputs - 1.0) ** 2)


def fitness(params, batch, key):
    return score(model(params, batch))


def strategy(function=fitness, **options):
    options = dict(population_size=16, sigma=0.1, optimizer=optax.sgd(0.1)) | options
    return eggroll.EvolutionStrategy(function, **options)


def start(es):
    return es.init(PARAMS, key=jax.random.key(0))


def assert_trees_equal(one, other):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        np.testing.assert_array_equal(a, b)


def test_fitness_improves():
    es = strategy(optimizer=optax.sgd(1.0))
    state = start(es)
    first = es.step(eggroll.copy_state(state), X)[1].mean_fitness
    for _ in range(60):
        state, metrics = es.step(state, X)
    assert metrics.mean_fitness > 0.3 * first and int(state.generation) == 60


def test_ask_tell_equals_step():
    es, outside = strategy(), strategy(None)
    state, stepped = start(es), start(es)
    for _ in range(3):
        outputs = outside.ask(state).apply(model, X)
        state, told = outside.tell(state, [float(score(outputs[i])) for i in range(16)])
        stepped, metrics = es.step(stepped, X)
        np.testing.assert_allclose(told.fitness, metrics.fitness, rtol=1e-6)
        for one, other in zip(jax.tree.leaves(state.params), jax.tree.leaves(stepped.params), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-7)


def test_golden_step():
    """Pins noise, shaping, estimator and update together; computed by the dense formula in NumPy."""
    es = strategy(shaping="z_score", perturbation=eggroll.LowRank(2, "normal"))
    state = start(es)
    es.plan(state, X)
    population = es.ask(state)
    noise = [jax.tree.map(lambda m, p: (m - p) / 0.1, population.member(2 * p), PARAMS) for p in range(8)]
    raw = np.array([fitness(population.member(i), X, None) for i in range(16)])
    shaped = (raw - raw.mean()) / (raw.std() + 1e-8)
    new, metrics = es.step(state, X)
    for name in PARAMS:
        gradient = sum((shaped[2 * p] - shaped[2 * p + 1]) * np.asarray(noise[p][name]) for p in range(8)) / (16 * 0.1)
        np.testing.assert_allclose(new.params[name], PARAMS[name] + 0.1 * gradient, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(float(metrics.mean_fitness), -1.0171713, rtol=1e-5)
    np.testing.assert_allclose(float(new.params["w"][0, 0]), -0.0165160, rtol=1e-5)


def test_nothing_recompiles_over_generations_and_sigma_changes():
    traces = []

    def counted(params, batch, key):
        traces.append(1)
        return fitness(params, batch, key)

    es = strategy(counted)
    state = start(es)
    state, _ = es.step(state, X)
    after_first = len(traces)
    for sigma in (0.1, 0.2, 0.05):
        state, metrics = es.step(state._replace(sigma=jnp.float32(sigma)), X)
        assert float(metrics.sigma) == np.float32(sigma)
    assert len(traces) == after_first
    assert [program._cache_size() for name in ("score", "update") for program in programs.find_all(name, es)] == [1, 1]


def test_sigma_schedule_follows_the_generation():
    es = strategy(sigma=optax.linear_schedule(0.2, 0.1, 2))
    state, seen = start(es), []
    for _ in range(4):
        state, metrics = es.step(state, X)
        seen.append(float(metrics.sigma))
    np.testing.assert_allclose(seen, [0.2, 0.15, 0.1, 0.1], rtol=1e-6)
    np.testing.assert_allclose(state.sigma, 0.1, rtol=1e-6)


def test_step_scans_and_jits():
    es = strategy()
    state = start(es)
    scanned, history = jax.lax.scan(lambda state, _: es.step(state, X), state, None, length=3)
    for _ in range(3):
        state, metrics = es.step(state, X)
    np.testing.assert_allclose(history.mean_fitness[-1], metrics.mean_fitness, rtol=1e-6)
    np.testing.assert_allclose(scanned.params["w"], state.params["w"], rtol=1e-5)


def test_noise_reuse_repeats_the_perturbation():
    def members(es, generation):
        state = start(es)._replace(generation=jnp.int32(generation))
        es.plan(state, X)
        return es.ask(state).member(0)["w"]

    fresh, reused = strategy(), strategy(noise_reuse=3)
    np.testing.assert_array_equal(members(reused, 0), members(reused, 2))
    assert np.abs(members(reused, 2) - members(reused, 3)).max() > 0.05
    assert np.abs(members(fresh, 0) - members(fresh, 1)).max() > 0.05


def invalid(*, at):
    def function(params, batch, key, memory):
        index = memory["index"]
        bad = jnp.isin(index, jnp.asarray(at, jnp.int32))
        return jnp.where(bad, jnp.nan, fitness(params, batch, key)), {"index": index}

    return function


def with_indices(es):
    state = es.init(PARAMS, key=jax.random.key(0), member_state={"index": jnp.int32(0)})
    return state._replace(member_state={"index": jnp.arange(16, dtype=jnp.int32).reshape(8, 2)})


def test_an_invalid_member_counts_as_worst_and_is_reported():
    es, clean = strategy(invalid(at=[3])), strategy(invalid(at=[]))
    state, metrics = es.step(with_indices(es), X)
    assert metrics.invalid == 1 and not metrics.skipped
    assert np.isfinite(metrics.mean_fitness) and np.isfinite(state.params["w"]).all()
    valid = np.delete(np.asarray(clean.step(with_indices(clean), X)[1].fitness), 3)
    np.testing.assert_allclose(metrics.mean_fitness, valid.mean(), rtol=1e-6)


@pytest.mark.parametrize("value", [jnp.nan, jnp.inf, -jnp.inf])
def test_an_all_invalid_generation_changes_nothing_and_says_so(value):
    es = strategy(lambda p, b, k: value + 0.0 * fitness(p, b, k), optimizer=optax.sgd(0.1, momentum=0.9))
    before = start(es)
    after, metrics = es.step(eggroll.copy_state(before), X)
    assert metrics.skipped and metrics.invalid == 16 and np.isnan(metrics.mean_fitness)
    assert_trees_equal(after._replace(generation=before.generation), before)
    assert int(after.generation) == 1


def test_all_equal_fitness_moves_nothing():
    es = strategy(lambda p, b, k: jnp.float32(0.1) + 0.0 * fitness(p, b, k))
    before = start(es)
    after, metrics = es.step(eggroll.copy_state(before), X)
    assert_trees_equal(after.params, before.params)
    assert float(metrics.gradient_norm) == 0.0


def test_frozen_parameters_do_not_move_and_hold_no_optimizer_state():
    es = strategy(perturbation=[("b", eggroll.Frozen()), (".*", eggroll.LowRank())], optimizer=optax.trace(0.9))
    state = start(es)
    assert sum(leaf.size for leaf in jax.tree.leaves(state.opt_state)) == PARAMS["w"].size
    after, _ = es.step(state, X)
    np.testing.assert_array_equal(after.params["b"], PARAMS["b"])
    assert np.abs(after.params["w"] - PARAMS["w"]).max() > 0


def test_the_state_of_the_optimizer_is_the_users_own_also_with_frozen_parameters(standard_promotion):
    optimizer = optax.inject_hyperparams(optax.adam)(0.1)
    es = strategy(perturbation=[("b", eggroll.Frozen()), (".*", eggroll.LowRank())], optimizer=optimizer)
    state, _ = es.step(start(es), X)
    assert isinstance(state.opt_state, type(optimizer.init(PARAMS))) and state.opt_state.hyperparams["learning_rate"] == 0.1
    state.opt_state.hyperparams["learning_rate"] = jnp.float32(0.0)  # as a user's schedule does
    after, metrics = es.step(eggroll.copy_state(state), X)
    np.testing.assert_array_equal(after.params["w"], state.params["w"])
    groups = optax.multi_transform({"fast": optax.sgd(1.0), "slow": optax.sgd(0.1)}, {"w": "fast", "b": "slow"})
    grouped = strategy(perturbation=[("b", eggroll.Frozen()), (".*", eggroll.LowRank())], optimizer=groups)
    moved, _ = grouped.step(start(grouped), X)
    np.testing.assert_array_equal(moved.params["b"], PARAMS["b"])


def test_integer_parameters_may_be_frozen():
    params = PARAMS | {"steps": jnp.int32(3)}
    es = strategy(
        lambda p, b, k: fitness({"w": p["w"], "b": p["b"]}, b, k),
        perturbation=[("steps", eggroll.Frozen()), (".*", eggroll.LowRank())],
    )
    state, _ = es.step(es.init(params, key=jax.random.key(0)), X)
    assert state.params["steps"] == 3 and state.params["steps"].dtype == jnp.int32


def test_the_optimizer_sees_the_parameters():
    decay = optax.chain(optax.add_decayed_weights(0.5), optax.sgd(0.1))
    es = strategy(lambda p, b, k: jnp.float32(1.0) + 0.0 * fitness(p, b, k), optimizer=decay)
    after, _ = es.step(start(es), X)
    np.testing.assert_allclose(after.params["w"], 0.95 * PARAMS["w"], rtol=1e-6)


def test_optimizer_masks_and_groups_see_the_user_tree():
    groups = optax.multi_transform({"fast": optax.sgd(1.0), "still": optax.set_to_zero()}, {"w": "fast", "b": "still"})
    after, _ = (es := strategy(optimizer=groups)).step(start(es), X)
    np.testing.assert_array_equal(after.params["b"], PARAMS["b"])
    assert np.abs(after.params["w"] - PARAMS["w"]).max() > 0


def test_dense_perturbation_is_classical_es():
    es = strategy(perturbation=eggroll.Dense())
    state, metrics = es.step(start(es), X)
    assert all(leaf.role == "dense" for leaf in es.plan(state, X).leaves)
    difference = es.ask(state).member(0)["w"] - state.params["w"]
    assert np.linalg.matrix_rank(np.asarray(difference)) == 3


BAD_ARGUMENTS = [
    (dict(population_size=7), "population_size must be an even integer >= 2 .*, got 7"),
    (dict(population_size=0), "population_size must be an even integer >= 2 .*, got 0"),
    (dict(population_size=8.0), "population_size must be an even integer >= 2 .*, got 8.0"),
    (dict(sigma=0.0), "sigma must be a finite number > 0 or a schedule, got 0.0"),
    (dict(sigma=-1), "sigma must be .* got -1"),
    (dict(sigma=float("nan")), "sigma must be .* got nan"),
    (dict(shaping="rank"), "shaping must be one of centered_ranks, .* got 'rank'"),
    (dict(noise_reuse=0), "noise_reuse must be an integer >= 1, got 0"),
    (dict(members_per_batch=3), "members_per_batch must be None, 1 or even and divide population_size 16, got 3"),
    (dict(members_per_batch=6), "members_per_batch must be .* got 6"),
    (dict(chunk_size=3), "chunk_size must be an even integer >= 2 or None, got 3"),
    (dict(precision="float64"), "precision must be one of master, stochastic, nearest, or a Feedback, got 'float64'"),
    (dict(aux="median"), "aux must name reductions out of sum, .* got 'median'"),
    (dict(optimizer=0.1), "optimizer must be an optax transformation, got float"),
    (dict(perturbation=eggroll.LowRank(0)), "rank must be an integer >= 1, got 0"),
    (dict(perturbation=eggroll.LowRank(1, "uniform")), "distribution must be one of normal, rademacher, got 'uniform'"),
    (dict(perturbation=eggroll.Dense(sigma_multiplier=0.0)), "sigma_multiplier must be > 0, got 0.0"),
    (dict(perturbation="low-rank"), "perturbation must be LowRank"),
    (dict(perturbation=[("(", eggroll.Frozen())]), r"perturbation pattern '\(' is not a regular expression"),
    (
        dict(perturbation=[(".*", "frozen")]),
        "perturbation rule '.*' must map to LowRank, Dense, Flipout, Integer or Frozen, got 'frozen'",
    ),
]


@pytest.mark.parametrize(("options", "message"), BAD_ARGUMENTS)
def test_wrong_arguments_are_refused_when_called(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        strategy(**options)


def test_a_fitness_that_is_no_function_is_refused():
    with pytest.raises(TypeError, match="fitness must be a function or None, got int"):
        strategy(3)


BAD_FITNESS = [
    (lambda p, b, k: model(p, b), r"fitness must return a float scalar, or a float vector .*, got float32\[5, 3\]"),
    (lambda p, b, k: jnp.int32(1), r"fitness must return a float scalar.* got int32\[\]"),
    (lambda p, b, k: 1.0, "fitness must return a float scalar.* got float"),
    (lambda p, b, k: (fitness(p, b, k), 1.0), "fitness must return fitness, got 2 values"),
]


@pytest.mark.parametrize(("function", "message"), BAD_FITNESS)
def test_a_fitness_of_the_wrong_kind_is_refused_before_compilation(function, message):
    es = strategy(function)
    with pytest.raises(ValueError, match=message):
        es.step(start(es), X)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (
            lambda params, batch: jnp.float32(0),
            r"fitness is called as fitness\(params, batch, key\), but <lambda>\(params, batch\)",
        ),
        (lambda params, batch, key, more: 0, r"fitness\(params, batch, key\), but .* is missing a required argument: 'more'"),
    ],
)
def test_a_fitness_of_the_wrong_signature_is_told_the_right_one(function, message):
    es = strategy(function)
    with pytest.raises(TypeError, match=message):
        es.step(start(es), X)


def test_missing_aux_and_state_are_named():
    es = strategy(aux="sum")
    with pytest.raises(ValueError, match=r"fitness must return \(fitness, aux\), got 1 value;"):
        es.step(start(es), X)
    carried = strategy(lambda p, b, k, s: fitness(p, b, k))
    state = carried.init(PARAMS, key=jax.random.key(0), member_state=jnp.zeros(2))
    with pytest.raises(ValueError, match=r"fitness must return \(fitness, member_state\), got 1 value;"):
        carried.step(state, X)


def test_group_relative_without_groups_is_refused():
    es = strategy(shaping="group_relative")
    with pytest.raises(ValueError, match="group_size must be even and divide population_size 16, got None"):
        es.step(start(es), X)


@pytest.mark.parametrize(
    ("params", "error", "message"),
    [
        ({}, ValueError, "params has no array leaves"),
        ({"w": "weights"}, TypeError, "params leaf 'w' is a str, expected an array"),
        ({"w": jnp.zeros(3, jnp.int32)}, ValueError, "parameter 'w' has dtype int32, .* eggroll.Frozen"),
    ],
)
def test_wrong_parameters_are_refused(params, error, message):
    es = strategy(lambda p, b, k: jnp.float32(0))
    with pytest.raises(error, match=message):
        es.step(es.init(params, key=jax.random.key(0)), X)


def test_wrong_key_is_refused():
    with pytest.raises(TypeError, match=r"key must be a typed key from jax.random.key\(seed\)"):
        strategy().init(PARAMS, key=jnp.zeros(2, jnp.uint32))


@pytest.mark.parametrize("scores", [[1.0] * 15, 1.0, [[[1.0]]] * 16])
def test_tell_refuses_another_length(scores):
    es = strategy()
    state = start(es)
    es.plan(state, X)
    with pytest.raises(ValueError, match=r"fitness must have shape \(16,\) or \(16, K\), got"):
        es.tell(state, scores)


def test_tell_and_member_need_a_plan():
    es = strategy(None)
    with pytest.raises(ValueError, match="tell needs the plan"):
        es.tell(start(es), [0.0] * 16)
    with pytest.raises(ValueError, match="member needs the plan"):
        es.ask(start(es)).member(0)


def test_step_without_fitness_is_refused():
    es = strategy(None)
    with pytest.raises(ValueError, match="fitness is None"):
        es.step(start(es), X)


def test_a_batch_without_its_leading_axis_is_refused():
    es = strategy(members_per_batch=4)
    with pytest.raises(ValueError, match=r"batch leaves need a leading axis of 4 .* got shape \(5, 4\)"):
        es.step(start(es), X)


def test_parameters_of_other_shapes_get_a_plan_of_their_own():
    es = strategy()
    es.step(start(es), X)
    other = es.init({"w": jnp.zeros((4, 7)), "b": jnp.zeros(7)}, key=jax.random.key(0))
    with pytest.raises(ValueError, match="replay needs the plan"):
        es.replay(other, jnp.zeros(es.population_size // 2))
    assert es.plan(other, X).leaves[1].shape == (4, 7)


def test_a_sigma_that_reaches_zero_changes_nothing_and_says_so():
    es = strategy(sigma=optax.linear_schedule(0.1, 0.0, 1))
    state, first = es.step(start(es), X)
    after, second = es.step(eggroll.copy_state(state), X)
    assert not first.skipped and second.skipped
    assert_trees_equal(after.params, state.params)


def test_a_column_that_is_always_invalid_does_not_stop_the_run():
    es = strategy(lambda p, b, k: jnp.stack([fitness(p, b, k), jnp.nan * fitness(p, b, k)]))
    state, metrics = es.step(start(es), X)
    assert not metrics.skipped and metrics.invalid == 0
    np.testing.assert_allclose(metrics.mean_fitness, metrics.fitness[:, 0].mean(), rtol=1e-6)
    assert np.abs(state.params["w"] - PARAMS["w"]).max() > 0


def test_an_invalid_member_keeps_its_old_state():
    def spike(params, batch, key, memory):
        bad = memory["index"] == 3
        return jnp.where(bad, jnp.nan, fitness(params, batch, key)), {"index": jnp.where(bad, -1, memory["index"] + 16)}

    es = strategy(spike)
    state, _ = es.step(with_indices(es), X)
    expected = [3 if i == 3 else i + 16 for i in range(16)]
    assert state.member_state["index"].reshape(-1).tolist() == expected


def test_a_shaping_of_the_user_sees_finite_fitness_and_must_return_one_value_a_member():
    es = strategy(invalid(at=[3]), shaping=lambda f: f - f.mean())
    state, metrics = es.step(with_indices(es), X)
    assert metrics.invalid == 1 and np.isfinite(state.params["w"]).all()
    short = strategy(shaping=lambda f: f[:4])
    with pytest.raises(ValueError, match=r"shaping must return shape \(16,\), got \(4,\)"):
        short.step(start(short), X)


def test_a_parameter_that_is_not_used_stays():
    params = PARAMS | {"unused": jnp.ones((30, 30))}
    es = strategy(lambda p, b, k: fitness({"w": p["w"], "b": p["b"]}, b, k))
    state, metrics = es.step(es.init(params, key=jax.random.key(0)), X)
    np.testing.assert_array_equal(state.params["unused"], params["unused"])
    assert metrics.gradient_norm < 10


def test_a_frozen_key_stays():
    params = PARAMS | {"rng": jax.random.key(3)}
    rules = [("rng", eggroll.Frozen()), (".*", eggroll.LowRank())]
    es = strategy(lambda p, b, k: fitness({"w": p["w"], "b": p["b"]}, b, k), perturbation=rules)
    state, _ = es.step(es.init(params, key=jax.random.key(0)), X)
    assert_trees_equal(state.params["rng"], params["rng"])


def test_a_plan_is_made_from_shapes():
    es = strategy()
    shapes = jax.eval_shape(lambda params: es.init(params, key=jax.random.key(0)), PARAMS)
    assert es.plan(shapes, jax.ShapeDtypeStruct(X.shape, X.dtype)) == es.plan(es.init(PARAMS, key=jax.random.key(0)), X)


def test_small_misuses_are_refused_by_a_clear_error():
    es = strategy()
    state = start(es)
    with pytest.raises(TypeError, match="state must be an ESState from init, got dict"):
        es.step(PARAMS, X)
    es.plan(state, jax.ShapeDtypeStruct(X.shape, X.dtype))
    with pytest.raises(ValueError, match=r"index must be in \[0, 16\), got 99"):
        es.ask(state).member(99)
    with pytest.raises(ValueError, match=r"shaping must be one of .* got 3"):
        strategy(shaping=3)
    with pytest.raises(ValueError, match="two parameters have the path 'a/b'"):
        es.init({"a": {"b": jnp.zeros((2, 2))}, "a/b": jnp.zeros((2, 2))}, key=jax.random.key(0))
    with pytest.raises(ValueError, match="parameter 'n' has dtype int32"):
        es.init({"n": jnp.zeros(3, jnp.int32)}, key=jax.random.key(0))
    assert strategy(population_size=np.int64(8), sigma=np.float32(0.1)).population_size == 8


@pytest.mark.slow
def test_noise_does_not_depend_on_jax_options():
    es = strategy()
    state = start(es)
    es.plan(state, X)
    before = es.ask(state).member(0)
    with jax.threefry_partitionable(False):
        assert_trees_equal(es.ask(state).member(0), before)
