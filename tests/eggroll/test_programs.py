"""The memo: what is derived from a strategy is keyed by everything it depends on, bounded, and shared by equal strategies."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import eggroll
from eggroll import programs

PARAMS = {"w": jnp.ones((4, 6)), "b": jnp.zeros(6)}
SGD = optax.sgd(0.1)


def fitness(params, batch, key):
    return -jnp.mean((jnp.tanh(batch @ params["w"] + params["b"]) - 1) ** 2)


def strategy(function=fitness, **options):
    options = {"population_size": 32, "sigma": 0.1, "optimizer": SGD} | options
    return eggroll.EvolutionStrategy(function, **options)


def start(es):
    return es.init(PARAMS, key=jax.random.key(1))


@pytest.fixture(autouse=True)
def empty_memo(monkeypatch):
    monkeypatch.setattr(programs, "_entries", type(programs._entries)())


@pytest.fixture
def small_memo(monkeypatch):
    monkeypatch.setattr(programs, "LIMIT", 6)


@pytest.fixture
def early_warning(monkeypatch):
    monkeypatch.setattr(programs, "MANY", 4)


def test_plan_and_evaluation_trace_the_fitness_once():
    traced = []

    def counted(params, batch, key):
        traced.append(batch.shape)
        return fitness(params, batch, key)

    es = strategy(counted)
    es.step(start(es), jnp.ones((8, 4)))
    assert traced == [(8, 4)]


def test_chunks_are_chosen_for_every_batch_shape():
    """The chunk of a small batch is too large for a large one: it must not be kept."""
    budget, es = 300_000, strategy(population_size=64, memory_budget=300_000)
    state = start(es)
    small, large = jnp.ones((8, 4)), jnp.ones((4096, 4))
    for batch in (small, large):
        es.step(eggroll.copy_state(state), batch)
    layouts = [es.chunked_layout(state, batch) for batch in (small, large)]
    assert not layouts[0].is_chunked and layouts[1].is_chunked

    def temporary_bytes(layout):
        chunked = strategy(population_size=64, chunk_size=layout.chunk_pairs and 2 * layout.chunk_pairs)
        chunked.plan(state, large)
        return jax.jit(lambda s: chunked.evaluate(s, large)).lower(state).compile().memory_analysis().temp_size_in_bytes

    assert temporary_bytes(layouts[1]) < 1.5 * budget < temporary_bytes(layouts[0])  # control: the stale layout is over it


def test_a_function_with_another_plan_is_refused():
    es = strategy(lambda p, x, key: jnp.sort(p["w"], axis=0).sum() + x.sum())
    state, _ = es.step(start(es), jnp.ones((3, 4)))
    population = es.ask(state)
    assert population.apply(lambda p, x: jnp.sort(p["w"], axis=0) @ x.T, jnp.ones((3, 6))).shape == (32, 4, 3)
    with pytest.raises(ValueError, match=r"the function uses parameter 'w' as low-rank .*, but the plan, .*, has it as dense"):
        population.apply(lambda p, x: x @ p["w"], jnp.ones((3, 4)))
    with pytest.raises(ValueError, match="'w'"):
        es.plan(state, jnp.ones((3, 4)), function=lambda p, x: x @ p["w"])


def test_a_fitness_without_a_batch_is_checked_too():
    es = strategy(lambda p, batch, key: -jnp.sum((jnp.ones((1, 4)) @ p["w"]) ** 2))
    state = start(es)
    es.ask(state).apply(lambda p, x: jnp.sort(p["w"], axis=0) + x.sum(), jnp.ones((3, 4)))
    with pytest.raises(ValueError, match=r"uses parameter 'w' as low-rank .* has it as dense"):
        es.step(state)
    with pytest.raises(ValueError, match=r"'b' as dense .* has it as frozen .* Call plan\(state, batch, function=...\) first"):
        es.ask(state).apply(lambda p, x: p["b"] + x.sum(), jnp.ones((3, 4)))  # a rule for `b` would not help


def test_a_fresh_function_in_every_generation_keeps_the_memo_bounded(small_memo, early_warning):
    es = strategy()
    state = start(es)
    with pytest.warns(UserWarning, match="was compiled 4 times: pass the same function object"):
        for _ in range(2 * programs.LIMIT):
            es.ask(state).apply(lambda p, x: x @ p["w"], jnp.ones((1, 4)))
            assert programs.num_entries() <= programs.LIMIT + 1  # and the plan
    with warnings.catch_warnings(record=True) as more:  # said once
        es.ask(state).apply(lambda p, x: x @ p["w"], jnp.ones((1, 4)))
    assert not more


def test_ever_new_shapes_warn_once(small_memo, early_warning):
    es = strategy()
    state = start(es)
    with pytest.warns(UserWarning, match="fitness was compiled 4 times: .* batches of a few shapes") as seen:
        for rows in range(1, programs.MANY + 3):
            state, _ = es.step(state, jnp.ones((rows, 4)))
    assert len(seen) == 1


def test_a_plan_outlives_all_programs(small_memo):
    """Else another function could fix the plan anew, and a replay would silently be of another run."""
    es, other, batch = strategy(lambda p, x, key: jnp.sort(p["w"]).sum() + x.sum()), strategy(sigma=0.2), jnp.ones((3, 4))
    state = start(es)
    after, metrics = es.step(eggroll.copy_state(state), batch)
    other.step(start(other), batch)
    for rows in range(1, 2 * programs.LIMIT):
        other.ask(start(other)).apply(lambda p, x: x @ p["w"], jnp.ones((rows, 4)))
    with pytest.raises(ValueError, match="parameter 'w' as low-rank"):
        es.ask(state).apply(lambda p, x: x @ p["w"], batch)
    np.testing.assert_array_equal(es.replay(state, metrics.coefficients).params["w"], after.params["w"])


def test_equal_strategies_share_their_programs_and_a_different_one_does_not():
    first, second = strategy(perturbation=[("w", eggroll.LowRank(2)), ("b", eggroll.Dense())]), None
    batch = jnp.ones((3, 4))
    expected, _ = first.step(start(first), batch)
    second = strategy(perturbation=[("w", eggroll.LowRank(2)), ("b", eggroll.Dense())])
    before = programs.num_entries()
    same, _ = second.step(start(second), batch)
    assert programs.num_entries() == before
    np.testing.assert_array_equal(same.params["w"], expected.params["w"])
    third = strategy(perturbation=[("w", eggroll.LowRank(3)), ("b", eggroll.Dense())])
    other, _ = third.step(start(third), batch)
    assert programs.num_entries() > before and not np.array_equal(other.params["w"], expected.params["w"])


def test_a_strategy_is_a_plain_value():
    es = strategy()
    state = start(es)
    es.step(state, jnp.ones((3, 4)))
    assert set(vars(es)) == {name for name in es.__dataclass_fields__ if name != "_"}
    assert hash(es) == hash(strategy()) and es == strategy()


def test_values_without_a_hash_are_known_by_identity():
    arrays = [np.ones(3), np.ones(3)]
    keys = [programs.key_of(array) for array in arrays]
    assert keys[0] == programs.key_of(arrays[0]) and keys[0] != keys[1]
    assert programs.key_of([("a", {"b": 1})]) == programs.key_of([("a", {"b": 1})]) != programs.key_of([("a", {"b": 2})])
