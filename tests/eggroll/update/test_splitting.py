"""How far optax's updates split, and that an update in parts is the update in one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

import eggroll
from eggroll import digests
from eggroll.noise import regions
from eggroll.noise.regions import Region
from eggroll.update.per_block import per_block
from eggroll.update.split_update import SplitUpdate
from eggroll.update.splitting import Reading
from tests.tables import by_default, covering

PARAMS = {"b": jnp.arange(8.0) / 8 + 0.1, "s": jnp.float32(2.0), "w": jnp.ones((6, 8))}
SCHEDULE = optax.cosine_decay_schedule(0.1, 100)
BY_ELEMENT = (
    "adabelief adadelta adagrad adam adamax adamaxw adamw adan amsgrad lion nadam nadamw optimistic_adam_v2 radam rmsprop "
    "rprop sgd sign_sgd signum yogi"
)
OPTIMIZERS = {  # name: (optimizer, how far it splits)
    **{name: (getattr(optax, name)(0.1), "elements") for name in BY_ELEMENT.split()},
    **{name: (getattr(optax, name)(0.1), "leaves") for name in ("adafactor", "fromage", "lamb", "lars")},
    "noisy_sgd": (optax.noisy_sgd(0.1, key=jax.random.key(0)), "leaves"),
    "polyak_sgd": (optax.polyak_sgd(0.1), "whole"),
    "nesterov": (optax.sgd(SCHEDULE, 0.9, nesterov=True), "elements"),
    "short moments": (optax.adam(0.1, mu_dtype=jnp.bfloat16), "elements"),
    "clip": (optax.chain(optax.clip(0.1), optax.adam(0.1)), "elements"),
    "clip_by_global_norm": (optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.1)), "whole"),
    "clip_by_block_rms": (optax.chain(optax.clip_by_block_rms(1.0), optax.adam(0.1)), "leaves"),
    "trust ratio": (optax.chain(optax.scale_by_trust_ratio(), optax.sgd(0.1)), "leaves"),
    "centralize": (optax.chain(optax.centralize(), optax.sgd(0.1)), "leaves"),
    "ema": (optax.chain(optax.adam(0.1), optax.ema(0.9)), "elements"),
    "hyperparameters": (optax.inject_hyperparams(optax.adamw)(SCHEDULE), "elements"),
    "groups": (optax.multi_transform({"a": optax.adam(0.1), "b": optax.sgd(0.1)}, {"b": "b", "s": "b", "w": "a"}), "elements"),
    "masked": (optax.masked(optax.adam(0.1), {"b": False, "s": True, "w": True}), "elements"),
    "decay by dimension": (optax.adamw(0.1, mask=lambda p: jax.tree.map(lambda x: x.ndim > 1, p)), "elements"),
    "anchored": (optax.chain(optax.adam(0.1), eggroll.anchored_decay(0.1), optax.scale(-1.0)), "elements"),
    "standardised": (optax.chain(eggroll.standardised_sign(1.0), optax.scale(-1.0)), "leaves"),
    "apply_if_finite": (optax.apply_if_finite(optax.adam(0.1), 3), "whole"),
    "multi steps": (optax.MultiSteps(optax.adam(0.1), 2).gradient_transformation(), "whole"),
    "ademamix": (optax.contrib.ademamix(0.1), "elements"),
    "adopt": (optax.contrib.adopt(0.1), "elements"),
    "cocob": (optax.contrib.cocob(0.1), "elements"),
    "dadapt_adamw": (optax.contrib.dadapt_adamw(), "whole"),
    "dog": (optax.contrib.dog(0.1), "whole"),
    "momo": (optax.contrib.momo(0.1), "whole"),
    "muon": (optax.contrib.muon(0.1), "leaves"),
    "prodigy": (optax.contrib.prodigy(), "whole"),
    "schedule_free": (optax.contrib.schedule_free_adamw(0.1), "elements"),
}
SOME = ("adam", "lamb", "short moments", "clip_by_global_norm", "hyperparameters", "masked", "anchored", "noisy_sgd", "muon")


def values(leaf):
    is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(leaf) if is_key else leaf).astype(np.float64)


def gradients(step):
    keys = jax.random.split(jax.random.key(step), len(PARAMS))
    return {name: jax.random.normal(key, leaf.shape) for key, (name, leaf) in zip(keys, PARAMS.items(), strict=True)}


def whole(array):
    return Region((0,) * array.ndim, array.shape)


@pytest.mark.parametrize("name", by_default(list(OPTIMIZERS), *SOME))
def test_an_update_in_parts_is_the_update_in_one(name, standard_promotion):
    optimizer, split = OPTIMIZERS[name]
    optimizer = optax.with_extra_args_support(optimizer)
    extra = {"value": jnp.float32(1.0)} if name in ("polyak_sgd", "momo") else {}
    state = optimizer.init(PARAMS)
    for step in range(2):
        _, state = optimizer.update(gradients(step), state, PARAMS, **extra)
    reading = Reading(optimizer, gradients(2), state, PARAMS, extra)
    assert reading.split == split
    assert bool(reading.reason) == (split != "elements")
    if split == "whole":
        return
    expected, expected_state = optimizer.update(gradients(2), state, PARAMS, **extra)
    flat = jax.tree.leaves(state)
    parts, of_leaves = SplitUpdate(reading, flat, extra), []
    for index, (gradient, param) in enumerate(zip(*map(jax.tree.leaves, (gradients(2), PARAMS)), strict=True)):
        own = reading.states_of(index, flat)
        update, new = parts.of_leaf(index, whole(gradient), gradient, param, own)
        of_leaves.append((update, new))
        if reading.elementwise[index] and gradient.ndim == 2:  # a block is what it is in the whole
            rows = Region((2, 0), (2, gradient.shape[1]))
            block, _ = parts.of_leaf(index, rows, gradient[2:4], param[2:4], [moment[2:4] for moment in own])
            np.testing.assert_allclose(block, update[2:4], rtol=1e-5, atol=1e-7)
    joined = reading.join_states([new for _, new in of_leaves], parts.shared_states())
    assert jax.tree.structure(joined) == jax.tree.structure(expected_state)
    for got, known in zip(jax.tree.leaves(joined), jax.tree.leaves(expected_state), strict=True):
        np.testing.assert_allclose(values(got), values(known), rtol=1e-5, atol=1e-6)
    for (got, _), known in zip(of_leaves, jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(got, known, rtol=1e-5, atol=1e-6)


def of_places(scales, *, of_gradient=False):
    """An optimizer that adds to every entry its place in the first axis, times the sum of what is given."""

    def function(region, given):
        if not region.sizes:
            return jnp.zeros(())
        rows = jnp.float32(region.starts[0]) + jnp.arange(float(region.sizes[0]))
        return given.sum() * jnp.broadcast_to(rows.reshape(-1, *(1 for _ in region.sizes[1:])), region.sizes)

    def update(updates, state, params=None, **extra):
        given = (lambda u: u) if of_gradient else (lambda _: scales * state)
        return jax.tree.map(lambda u: u + per_block(function, u, given(u)), updates), state + 1

    return optax.GradientTransformationExtraArgs(lambda params: jnp.float32(2), update)


def test_a_function_of_blocks_is_evaluated_where_they_are(standard_promotion):
    optimizer = of_places(jnp.arange(3.0))
    reading, state = Reading(optimizer, gradients(2), jnp.float32(2), PARAMS, {}), [jnp.float32(2)]
    assert reading.split == "elements"
    (b, _, w), parts = jax.tree.leaves(gradients(2)), SplitUpdate(reading, state, {})
    np.testing.assert_allclose(parts.of_leaf(0, whole(b), b, b, ())[0], b + 6 * jnp.arange(8))
    np.testing.assert_allclose(
        parts.of_leaf(2, Region((2, 3), (2, 4)), w[2:4, 3:7], w[2:4, 3:7], ())[0], w[2:4, 3:7] + np.array([[12], [18]])
    )
    expected = jax.tree.leaves(optimizer.update(gradients(2), jnp.float32(2))[0])[2]
    np.testing.assert_allclose(expected, w + 6 * jnp.arange(6)[:, None])
    batched = jax.vmap(lambda state: optimizer.update(gradients(2), state)[0])(jnp.arange(2.0))
    np.testing.assert_allclose(batched["w"], w + jnp.arange(2)[:, None, None] * 3 * jnp.arange(6)[:, None])
    assert parts.shared_states() == [3]


def test_a_function_of_blocks_may_be_given_equal_entries_that_are_used_elsewhere(standard_promotion):
    def update(updates, state, params=None):
        ones = jax.tree.map(lambda u: state * jnp.ones(u.shape), updates)
        return jax.tree.map(lambda u, own: own * u + per_block(_sum_of, u, own), updates, ones), state

    optimizer, w = optax.GradientTransformationExtraArgs(lambda params: jnp.float32(2), update), gradients(2)["w"]
    reading = Reading(optax.with_extra_args_support(optimizer), gradients(2), jnp.float32(2), PARAMS, {})
    assert reading.split == "elements"
    rows, parts = Region((2, 0), (2, 8)), SplitUpdate(reading, [jnp.float32(2)], {})
    np.testing.assert_allclose(parts.of_leaf(2, rows, w[2:4], w[2:4], ())[0], 2 * w[2:4] + 2 * w.size, rtol=1e-6)


def _sum_of(region, given):
    return jnp.broadcast_to(given.sum(), region.sizes)


def test_a_function_of_blocks_is_given_what_is_traced():
    def update(updates, state, params=None):
        return jax.tree.map(lambda u: per_block(lambda region: _sum_of(region, state), u), updates), state

    with pytest.raises(ValueError, match="traced values that it is not given: pass them as `given`"):
        Reading(optax.GradientTransformationExtraArgs(None, update), gradients(2), jnp.float32(2), PARAMS, {})


def test_the_text_of_a_function_of_blocks_is_not_what_it_closes_over():
    def digest_with(reason):
        function = lambda u: per_block(functools.partial(_sum_with, reason), u, u.sum())  # noqa: E731
        return digests.digest(function, jnp.ones(3))

    assert digest_with("one reason") == digest_with("another") != digests.digest(lambda u: u, jnp.ones(3))


def _sum_with(reason, region, given):
    return _sum_of(region, given)


def test_a_function_of_blocks_that_is_given_values_of_a_parameter_is_of_the_whole():
    assert Reading(of_places(jnp.float32(1), of_gradient=True), gradients(2), jnp.float32(2), PARAMS, {}).split == "leaves"


def transformation(update, init=lambda params: ()):
    return optax.GradientTransformationExtraArgs(init, lambda u, state, params=None, **extra: update(u, state))


def swapped(u, state):
    return state, {"b": u["b"], "s": u["s"], "v": u["w"], "w": u["v"]}


TWO = PARAMS | {"v": jnp.full((6, 8), 0.5)}
CROSSING = {  # name: (optimizer of TWO, how far it splits)
    "one's update is another's": (transformation(lambda u, state: (u | {"v": u["w"]}, state)), "whole"),
    "states change places": (transformation(swapped, lambda params: params), "whole"),
    "a delayed update": (
        transformation(lambda u, state: (state[1], (u, state[0])), lambda params: (params, params)),
        "elements",
    ),
    "muon of two matrices": (optax.contrib.muon(0.1), "leaves"),
    "a rate that is an array": (optax.adam(jnp.float32(0.1)), "elements"),
    "a sum of a shared state": (
        transformation(lambda u, state: (u | {"s": jnp.sum(state)}, state + 1), lambda params: jnp.arange(5.0)),
        "elements",
    ),
}


@pytest.mark.parametrize("name", list(CROSSING))
def test_what_crosses_between_parameters_is_seen(name, standard_promotion):
    optimizer, split = CROSSING[name]
    gradient = gradients(2) | {"v": gradients(3)["w"]}
    state = optimizer.init(TWO)
    reading = Reading(optax.with_extra_args_support(optimizer), gradient, state, TWO, {})
    assert reading.split == split
    if split != "whole":
        flat = jax.tree.leaves(state)
        parts, expected = SplitUpdate(reading, flat, {}), jax.tree.leaves(optimizer.update(gradient, state, TWO)[0])
        for index, known in enumerate(expected):
            leaf = jax.tree.leaves(gradient)[index], jax.tree.leaves(TWO)[index], reading.states_of(index, flat)
            leaf = whole(leaf[0]), *leaf
            np.testing.assert_allclose(parts.of_leaf(index, *leaf)[0], known, rtol=1e-5, atol=1e-7)


def fitness(params, batch, key):
    return -jnp.mean((jnp.tanh(batch @ params["w"]) @ params["v"][0] + params["b"]) ** 2)


@pytest.mark.parametrize(("precision", "optimizer"), covering(["master", "stochastic"], ["adam", "lamb"], strength=1))
def test_blocks_of_any_size_are_one_update(precision, optimizer, monkeypatch, standard_promotion):
    params = {"w": jnp.ones((7, 40), jnp.bfloat16), "v": jnp.ones((3, 40, 5), jnp.bfloat16), "b": jnp.ones(5)}
    batch, results = jnp.full((4, 7), 0.1, jnp.bfloat16), []
    for limit in (10**6, 64, 7):
        monkeypatch.setattr(regions, "LIMIT", limit)
        es = eggroll.EvolutionStrategy(
            lambda p, b, key: fitness(jax.tree.map(lambda x: x.astype(jnp.float32), p), b.astype(jnp.float32), key),
            population_size=8,
            sigma=0.1,
            optimizer=getattr(optax, optimizer)(0.01),
            precision=precision,
        )
        state = es.init(params, key=jax.random.key(0))
        state, metrics = es.step(state, batch)
        results.append((state.params, state.opt_state, metrics.leaf_norms, metrics.moved))
    for other in results[1:]:
        for a, b in zip(jax.tree.leaves(results[0]), jax.tree.leaves(other), strict=True):
            np.testing.assert_allclose(values(a), values(b), rtol=1e-5, atol=1e-7)
