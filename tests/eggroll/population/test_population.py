"""Layout of the population: chunks, sharing of the batch, keys, carried state, aux and the byte budget."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import eggroll
from eggroll import programs
from eggroll.devices import chunking
from eggroll.population.metrics import report_fitness

PARAMS = {"w": 0.3 * jax.random.normal(jax.random.key(1), (4, 3)), "b": jnp.zeros(3)}
X = jax.random.normal(jax.random.key(2), (5, 4))


def model(params, x):
    return jnp.tanh(x @ params["w"] + params["b"])


def fitness(params, batch, key):
    return -jnp.mean((model(params, batch) - 1.0) ** 2)


def strategy(function=fitness, *, population_size=12, **options):
    options = dict(sigma=0.1, optimizer=optax.sgd(0.1)) | options
    return eggroll.EvolutionStrategy(function, population_size=population_size, **options)


def fitness_of(es, batch=X, **init):
    state = es.init(PARAMS, key=jax.random.key(0), **init)
    return es.step(state, batch)[1].fitness


def test_members_are_pairs_with_opposite_signs():
    es = strategy()
    state = es.init(PARAMS, key=jax.random.key(0))
    es.plan(state, X)
    population = es.ask(state)
    plus, minus = population.member(4), population.member(5)
    for p, m, base in zip(*map(jax.tree.leaves, (plus, minus, PARAMS)), strict=True):
        np.testing.assert_allclose(p + m, 2 * base, atol=1e-6)
        assert np.abs(p - base).max() > 0.05


def test_chunked_equals_unchunked_equals_one_by_one():
    whole = fitness_of(strategy())
    for chunk_size in (2, 8, 100):
        np.testing.assert_allclose(fitness_of(strategy(chunk_size=chunk_size)), whole, rtol=1e-6)
    es = strategy()
    state = es.init(PARAMS, key=jax.random.key(0))
    es.plan(state, X)
    alone = jax.jit(lambda i: fitness(es.ask(state).member(i), X, None))
    alone = [alone(i) for i in range(12)]
    np.testing.assert_allclose(whole, alone, rtol=1e-5)


def test_a_batch_per_member_and_per_group():
    per_member = jax.random.normal(jax.random.key(3), (12, 5, 4))
    es = strategy(members_per_batch=1, chunk_size=4)
    state = es.init(PARAMS, key=jax.random.key(0))
    scores = es.step(eggroll.copy_state(state), per_member)[1].fitness
    expected = [fitness(es.ask(state).member(i), per_member[i], None) for i in range(12)]
    np.testing.assert_allclose(scores, expected, rtol=1e-5)
    groups = strategy(members_per_batch=4, chunk_size=4)
    scores = groups.step(eggroll.copy_state(state), per_member[:3])[1].fitness
    expected = [fitness(es.ask(state).member(i), per_member[i // 4], None) for i in range(12)]
    np.testing.assert_allclose(scores, expected, rtol=1e-5)


def test_pairs_share_their_evaluation_key_and_differ_from_others():
    def noisy(params, batch, key):
        return jax.random.normal(key) + 0.0 * fitness(params, batch, key)

    es = strategy(noisy)
    first = es.init(PARAMS, key=jax.random.key(0))
    second, metrics = es.step(first, X)
    drawn = metrics.fitness.reshape(-1, 2)
    np.testing.assert_array_equal(drawn[:, 0], drawn[:, 1])
    assert len(set(drawn[:, 0].tolist())) == 6
    assert not set(drawn[:, 0].tolist()) & set(es.step(second, X)[1].fitness.tolist())


def test_aux_is_reduced_over_the_valid_members():
    def with_aux(params, batch, key):
        score = fitness(params, batch, key)
        count = jnp.int32(2)
        return jnp.where(score > -1.0, score, jnp.nan), {"count": count, "score": score, "all": score}

    es = strategy(with_aux, sigma=0.5, aux={"count": "sum", "score": "max", "all": "all"})
    metrics = es.step(es.init(PARAMS, key=jax.random.key(0)), X)[1]
    valid = np.isfinite(metrics.fitness)
    assert 0 < valid.sum() < 12 and metrics.invalid == 12 - valid.sum()
    assert metrics.aux["count"] == 2 * valid.sum()
    assert metrics.aux["all"].shape == (12,)
    np.testing.assert_allclose(metrics.aux["score"], metrics.aux["all"][valid].max(), rtol=1e-6)


def test_aux_of_short_floats_and_booleans():
    """float16 would overflow and bfloat16 lose the small addends; any and all, over the valid members."""

    def with_aux(params, batch, key):
        score = fitness(params, batch, key)
        is_valid = score > -1.0
        aux = {"large": jnp.float16(20000), "close": jnp.bfloat16(1.0078125), "any": ~is_valid, "all": is_valid}
        return jnp.where(is_valid, score, jnp.nan), aux | {"sum": jnp.float16(20000)}

    es = strategy(with_aux, sigma=0.5, aux={"large": "mean", "close": "mean", "any": "max", "all": "min", "sum": "sum"})
    metrics = es.step(es.init(PARAMS, key=jax.random.key(0)), X)[1]
    found, valid = metrics.aux, 12 - int(metrics.invalid)
    assert 0 < valid < 12
    assert (float(found["large"]), float(found["close"]), float(found["sum"])) == (20000, 1.0078125, 20000 * valid)
    assert found["any"].dtype == bool and (bool(found["any"]), bool(found["all"])) == (False, True)


def test_a_pair_with_one_valid_member_is_not_tied_and_the_rank_has_no_unit():
    fitness = jnp.array([0, jnp.nan, 0, 0, 1, 0, jnp.nan, jnp.nan])
    report = report_fitness(fitness, jnp.array([1.0, 0, 2, 0]), rank=3, aux=None)
    assert report.tied_pairs == 0.5 and report.invalid == 3
    ranks = [report_fitness(fitness, x * jnp.array([1.0, 0, 2, 0]), rank=3, aux=None).effective_rank for x in (1, 1e-15, 1e15)]
    np.testing.assert_allclose(ranks, 3 * 25 / 17, rtol=1e-6)
    assert report_fitness(fitness, jnp.zeros(4), rank=3, aux=None).effective_rank == 0


def test_a_sigma_and_entries_that_are_numbers():
    es = strategy(lambda p, b, k: b["c"] * fitness(p, b["x"], k), memory_budget=1 << 30)
    batch = {"x": X, "c": 2.0}
    state, first = es.step(es.init(PARAMS, key=jax.random.key(0)), batch)
    entries = programs.num_entries()
    for sigma in (0.05, jnp.float32(0.05)):
        assert es.step(eggroll.copy_state(state)._replace(sigma=sigma), batch)[1].sigma == jnp.float32(0.05)
    assert programs.num_entries() == entries, "another sigma is no other program"


@pytest.mark.parametrize("index", [-1, 12, np.int64(12), jnp.int32(-1)])
def test_members_outside_the_population_are_refused(index):
    es = strategy()
    state = es.init(PARAMS, key=jax.random.key(0))
    es.plan(state, X)
    with pytest.raises(ValueError, match=rf"index must be in \[0, 12\), got {index}"):
        es.ask(state).member(index)


@pytest.mark.parametrize("name", ["sum", "mean", "max", "min"])
def test_reductions_by_name(name):
    es = strategy(lambda p, b, k: (fitness(p, b, k), model(p, b)), aux=name)
    state = es.init(PARAMS, key=jax.random.key(0))
    metrics = es.step(eggroll.copy_state(state), X)[1]
    outputs = np.stack([model(es.ask(state).member(i), X) for i in range(12)])
    np.testing.assert_allclose(metrics.aux, getattr(outputs, name)(axis=0), rtol=1e-4, atol=1e-6)


def test_member_state_is_carried_per_member():
    def recurrent(params, batch, key, memory):
        memory = memory + batch.mean(axis=0) @ params["w"]
        return jnp.sum(memory + params["b"]), memory

    es = strategy(recurrent, chunk_size=4)
    state = es.init(PARAMS, key=jax.random.key(0), member_state=jnp.ones(3))
    assert state.member_state.shape == (6, 2, 3)
    members = [es_member for es_member in range(12)]
    expected = np.ones((12, 3), np.float32)
    for _ in range(2):
        es.plan(state, X)
        population = es.ask(state)
        expected = expected + np.stack([X.mean(axis=0) @ population.member(i)["w"] for i in members])
        state, _ = es.step(state, X)
        np.testing.assert_allclose(state.member_state.reshape(12, 3), expected, rtol=1e-5, atol=1e-6)


def test_aux_and_member_state_together():
    es = strategy(lambda p, b, k, s: (fitness(p, b, k), s.sum(), s + 1.0), aux="mean")
    state = es.init(PARAMS, key=jax.random.key(0), member_state=jnp.zeros(2))
    state, first = es.step(state, X)
    assert float(first.aux) == 0.0 and float(es.step(state, X)[1].aux) == 2.0


def test_vector_fitness_over_prompts():
    es = strategy(lambda p, b, k: -((model(p, b) - 1.0) ** 2).mean(axis=1), shaping="group_relative")
    state, metrics = es.step(es.init(PARAMS, key=jax.random.key(0)), X)
    assert metrics.fitness.shape == (12, 5)
    np.testing.assert_allclose(metrics.best_fitness, metrics.fitness.mean(axis=1).max(), rtol=1e-6)


def test_memory_budget_picks_chunks_says_so_and_changes_nothing(caplog):
    options = dict(population_size=512, members_per_batch=1)
    batch = jax.random.normal(jax.random.key(3), (512, 5, 4))
    whole = strategy(**options)
    state = whole.init(PARAMS, key=jax.random.key(0))
    expected = whole.step(eggroll.copy_state(state), batch)[1].fitness
    tight = strategy(**options, memory_budget=20_000)
    np.testing.assert_allclose(tight.step(eggroll.copy_state(state), batch)[1].fitness, expected, rtol=1e-6)
    assert 1 <= tight.chunked_layout(state, batch).chunk_pairs < 256 and "512 members would need about" in caplog.text
    outputs = tight.ask(state).apply(model, batch)
    np.testing.assert_allclose(outputs, whole.ask(state).apply(model, batch), rtol=1e-6)
    assert 1 <= tight.chunked_layout(state, batch, function=model).chunk_pairs < 256
    roomy = strategy(**options, memory_budget=1 << 30)
    roomy.step(eggroll.copy_state(state), batch)
    assert roomy.chunked_layout(state, batch).chunk_pairs is None
    with pytest.raises(ValueError, match="memory_budget of 10 bytes is too small"):
        strategy(**options, memory_budget=10).step(state, batch)
    for wrong in ("1GB", 0, 2.5):
        with pytest.raises(ValueError, match="memory_budget must be bytes > 0, 'device' or None"):
            strategy(**options, memory_budget=wrong)


def test_the_budget_of_the_device_is_half_of_what_is_free(monkeypatch):
    monkeypatch.setattr(chunking, "free_bytes", lambda: 40_000)
    options = dict(population_size=512, members_per_batch=1)
    by_device, by_bytes = (strategy(**options, memory_budget=budget) for budget in ("device", 20_000))
    batch, layouts = jnp.ones((512, 5, 4)), []
    for es in (by_device, by_bytes):
        state = es.init(PARAMS, key=jax.random.key(0))
        es.plan(state, batch)
        layouts.append(es.chunked_layout(state, batch))
    assert layouts[0] == layouts[1] != by_bytes.layout


def test_a_compiler_without_an_account_of_memory_is_a_clear_error(monkeypatch):
    monkeypatch.setattr(jax.stages.Compiled, "memory_analysis", lambda self: None)
    es = strategy(memory_budget=20_000)
    with pytest.raises(ValueError, match="memory_budget needs the compiler's account of memory, which cpu lacks"):
        es.step(es.init(PARAMS, key=jax.random.key(0)), X)


@pytest.mark.optimized
def test_chunks_bound_the_memory():
    """Temporary memory of an evaluation does not grow with the population when it is chunked."""

    def temporary(population_size):
        es = strategy(population_size=population_size, chunk_size=32)
        state = es.init(PARAMS, key=jax.random.key(0))
        es.plan(state, X)
        run = jax.jit(lambda state, batch: es.evaluate(state, batch, function=lambda p, b, k, s: fitness(p, b, k)))
        return run.lower(state, X).compile().memory_analysis().temp_size_in_bytes

    small, large = temporary(1 << 10), temporary(1 << 14)
    assert large - small < 16 * ((1 << 14) - (1 << 10))  # a few scalars per member, against 500 bytes unchunked


@pytest.mark.parametrize("changed", [lambda s: s.astype(jnp.bfloat16), lambda s: s[:1], lambda s: (s, s)])
def test_a_member_state_of_another_kind_is_refused(changed):
    es = strategy(lambda p, b, k, s: (fitness(p, b, k), changed(s)))
    state = es.init(PARAMS, key=jax.random.key(0), member_state=jnp.zeros(2))
    with pytest.raises(ValueError, match="fitness must return member_state as it came"):
        es.step(state, X)
