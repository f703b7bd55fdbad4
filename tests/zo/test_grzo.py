"""GRZO: every example of a batch sees a direction of its own; against NumPy, the gradient, and over two devices."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import eggroll
from eggroll import zo
from eggroll.noise.draws import draw_pair

KEY, EXAMPLES = jax.random.key(7), 6
PARAMS = {
    "bias": 0.1 * jnp.arange(5.0),
    "kernel": 0.5 * jax.random.normal(jax.random.key(3), (4, 5)),
    "out": jax.random.normal(jax.random.key(4), (5, 2)),
    "table": jax.random.normal(jax.random.key(5), (7, 4)),
}
BATCH = {
    "words": jax.random.randint(jax.random.key(1), (EXAMPLES, 3), 0, 7),
    "targets": jax.random.normal(jax.random.key(2), (EXAMPLES, 2)),
}


def loss(params, batch, key):
    """Mean over the examples."""
    hidden = jnp.tanh(params["table"][batch["words"]].mean(axis=1) @ params["kernel"] + params["bias"])
    return jnp.mean(jnp.sum((hidden @ params["out"] - batch["targets"]) ** 2, axis=1))


def grzo(function=loss, **options):
    return zo.grzo(function, **(dict(learning_rate=2e-4, sigma=1e-2, directions=EXAMPLES) | options))


def run(tuner, steps, batch=BATCH):
    state = tuner.init(PARAMS, key=KEY)
    for _ in range(steps):
        state, metrics = tuner.step(state, batch)
    return state, metrics


def flat(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def numpy_loss(params, words, targets):
    """Of one example."""
    hidden = np.tanh(params["table"][words].mean(axis=0) @ params["kernel"] + params["bias"])
    return np.sum((hidden @ params["out"] - targets) ** 2)


def test_grzo_is_numpy_grzo():
    """12 steps from the same signs and shared noise: float64 NumPy, from the paper's formulas."""
    tuner, sigma, rate = grzo(), 1e-2, 2e-4
    state = tuner.init(PARAMS, key=KEY)
    plan = tuner.plan(state, BATCH)
    assert [leaf.role for leaf in plan.leaves] == ["dense", "flipout", "flipout", "flipout"]
    drawn_at = jax.jit(lambda step: [draw_pair(plan, KEY, step, example) for example in range(EXAMPLES)])
    ours = {name: np.float64(leaf) for name, leaf in PARAMS.items()}
    for step in range(12):
        drawn = drawn_at(jnp.int32(step))
        z = np.float64([own[0] for own in drawn])  # of the bias
        signs = [[own[leaf].signs.unpack(jnp.float32) for own in drawn] for leaf in (1, 2, 3)]
        r = [np.float64([left[0] for left, _ in of_leaf]) for of_leaf in signs]
        s = [np.float64([right[0] for _, right in of_leaf]) for of_leaf in signs]
        u = [np.float64(drawn[0][leaf].shared) for leaf in (1, 2, 3)]
        losses = np.zeros((EXAMPLES, 2))
        for i in range(EXAMPLES):
            noise = dict(zip(("kernel", "out", "table"), (u[k] * np.outer(r[k][i], s[k][i]) for k in range(3)), strict=True))
            noise["bias"] = z[i]
            for column, sign in enumerate((1, -1)):
                member = {name: leaf + sign * sigma * noise[name] for name, leaf in ours.items()}
                losses[i, column] = numpy_loss(member, BATCH["words"][i], np.float64(BATCH["targets"][i]))
        delta = (losses[:, 0] - losses[:, 1]) / 2
        a = delta / (delta.std() + 1e-8)
        gradient = {"bias": a @ z / (2 * sigma * EXAMPLES)}
        for k, name in enumerate(("kernel", "out", "table")):
            gradient[name] = u[k] * (r[k].T @ np.diag(a) @ s[k]) / (2 * sigma * EXAMPLES)
        ours = {name: leaf - rate * gradient[name] for name, leaf in ours.items()}
        state, metrics = tuner.step(state, BATCH)
        np.testing.assert_allclose(-metrics.coefficients, a, rtol=1e-3, atol=1e-3)
        np.testing.assert_allclose(-metrics.mean_fitness, losses.mean(), rtol=1e-5)
    for name, leaf in ours.items():
        np.testing.assert_allclose(state.params[name], leaf, rtol=1e-4, atol=2e-5)
        assert np.abs(leaf - PARAMS[name]).max() > 1e-2


@pytest.mark.slow
def test_the_mean_of_the_estimate_is_along_the_gradient():
    """The update times 2 (std(delta) + e) estimates the gradient of the batch: within 5 standard errors in every entry, and
    along it, where a factor of 1.5 and the gradient of other targets (the controls) are not.
    """
    options = dict(directions=EXAMPLES, sigma=1e-2, optimizer=optax.sgd(1.0), perturbation=eggroll.Flipout())
    tuner = zo.ZerothOrder(loss, estimator="grzo", **options)
    state = tuner.init(PARAMS, key=KEY)
    tuner.plan(state, BATCH)

    def estimate(generation):
        moved, metrics = tuner.step(state._replace(generation=generation), BATCH)
        losses = metrics.fitness.reshape(-1, 2)
        update = jnp.concatenate([jnp.ravel(a - b) for a, b in zip(*map(jax.tree.leaves, (PARAMS, moved.params)), strict=True)])
        return 2 * (jnp.std((losses[:, 0] - losses[:, 1]) / 2) + 1e-8) * update

    found = np.asarray(jax.jit(lambda: jax.lax.map(estimate, jnp.arange(3000, dtype=jnp.int32)))())
    truth = flat(jax.grad(loss)(PARAMS, BATCH, KEY))
    mean, error = found.mean(axis=0), found.std(axis=0, ddof=1) / math.sqrt(len(found))
    assert (np.abs(mean - truth) < 5 * error).all()
    along = found @ truth / (truth @ truth)
    error_along = along.std(ddof=1) / math.sqrt(len(along))
    assert abs(along.mean() - 1) < 5 * error_along < 0.25
    shifted = BATCH | {"targets": jnp.roll(BATCH["targets"], 1, axis=0)}
    other = flat(jax.grad(loss)(PARAMS, shifted, KEY))
    assert abs(1.5 * along.mean() - 1) > 5 * error_along and not (np.abs(mean - other) < 5 * error).all()


def test_an_example_that_is_not_finite_is_left_out():
    broken = BATCH | {"targets": BATCH["targets"].at[2].set(jnp.nan)}
    state, metrics = run(grzo(), 1, broken)
    delta = -(metrics.fitness[0::2] - metrics.fitness[1::2]) / 2
    rest = np.delete(np.asarray(delta), 2)
    expected = np.insert(rest / (rest.std() + 1e-8), 2, 0) * EXAMPLES / (EXAMPLES - 1)
    np.testing.assert_allclose(-metrics.coefficients, expected, rtol=1e-4)
    assert metrics.invalid == 2 and not metrics.skipped and np.isfinite(flat(state.params)).all()


def test_chunks_of_directions():
    whole, chunked = run(grzo(), 3)[0], run(grzo(chunk_directions=4), 3)[0]
    np.testing.assert_allclose(flat(chunked.params), flat(whole.params), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.usefixtures("standard_promotion")
def test_durable_runs_replay_it(tmp_path):
    def go(folder, steps):
        tuner = grzo()
        state = tuner.init(PARAMS, key=KEY)
        tuner.plan(state, BATCH)
        durable = eggroll.DurableRun(folder, tuner, state, config={}, checkpoint_every=3)
        left = steps - int(durable.state.generation)
        state, _ = eggroll.train(tuner, durable.state, BATCH, generations=left, durable=durable, run_folder=folder)
        durable.close()
        return state

    whole = go(tmp_path / "whole", 8)
    go(tmp_path / "parts", 4)
    np.testing.assert_array_equal(flat(go(tmp_path / "parts", 8).params), flat(whole.params))


def test_wrong_use_is_refused():
    for batch, got in [
        (jax.tree.map(lambda x: x[:4], BATCH), r"got \(4, "),
        (jnp.float32(1), r"got \(\)"),
        (None, "got no arrays"),
    ]:
        with pytest.raises(ValueError, match=f"batch leaves need a leading axis of directions, 6, {got}"):
            run(grzo(), 1, batch)
    with pytest.raises(ValueError, match="estimator grzo divides by the spread of the losses: directions must be >= 2, got 1"):
        grzo(directions=1)


# --- two devices -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("directions", [EXAMPLES, 5], ids=["even", "uneven"])
def test_two_devices_give_the_same_run(directions):
    batch = jax.tree.map(lambda x: x[:directions], BATCH)
    meshes = None, jax.make_mesh((2,), ("population",), devices=jax.devices()[:2])
    (alone, expected), (spread, metrics) = (run(grzo(directions=directions, mesh=on), 10, batch) for on in meshes)
    np.testing.assert_allclose(metrics.coefficients, expected.coefficients, rtol=0, atol=1e-4)
    np.testing.assert_allclose(flat(spread.params), flat(alone.params), rtol=0, atol=5e-5)
    assert np.abs(flat(alone.params) - flat(PARAMS)).max() > 1e-2
    for leaf in jax.tree.leaves(spread.params):
        assert len({np.asarray(part.data).tobytes() for part in leaf.addressable_shards}) == 1


def test_examples_are_not_spread_over_data():
    with pytest.raises(ValueError, match="use mesh axis 'population', not 'data'"):
        grzo(mesh=jax.make_mesh((2,), ("data",), devices=jax.devices()[:2]))
