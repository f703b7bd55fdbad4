"""Zeroth-order optimisation: against an independent NumPy MeZO, the gradient, and what each recipe promises."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import eggroll
from eggroll import zo
from eggroll.noise.draws import draw_pair
from eggroll.zo.blocks import total_and_weight
from eggroll.zo.estimators import ESTIMATORS, coefficients
from tests.tables import by_default, covering

PARAMS = {
    "dense": {"kernel": 0.5 * jax.random.normal(jax.random.key(3), (4, 6)), "bias": jnp.zeros(6)},
    "out": jnp.ones((6, 2)),
}
X = jax.random.normal(jax.random.key(1), (8, 4))
KEY = jax.random.key(7)


def loss(params, batch, key):
    hidden = jnp.tanh(batch @ params["dense"]["kernel"] + params["dense"]["bias"])
    return jnp.mean((hidden @ params["out"] - 1.0) ** 2)


def start(tuner, params=PARAMS):
    return tuner.init(params, key=KEY)


def run(tuner, steps, params=PARAMS, batch=X):
    state = start(tuner, params)
    for _ in range(steps):
        state, metrics = tuner.step(state, batch)
    return state, metrics


def flat(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def noise_of(tuner, state, direction):
    """E of a direction, built."""
    plan = tuner.plan(state, X)
    options = dict(sign=1.0, sigma=1.0, lazy=False)
    zeros = jax.tree.map(jnp.zeros_like, state.params)
    from eggroll.population.members import member_params

    return flat(member_params(plan, zeros, draw_pair(plan, state.key, state.generation, direction), **options))


# --- MeZO against NumPy ------------------------------------------------------------------------------------------------


def numpy_loss(params, x):
    kernel, bias, out = params
    return np.mean((np.tanh(x @ kernel + bias) @ out - 1.0) ** 2)


def test_mezo_is_numpy_mezo():
    """20 steps with warm-up and decoupled weight decay, from the same noise: float64 NumPy, from the paper's formula."""
    warmup, sigma, decay = optax.linear_schedule(1e-4, 3e-3, 10), 1e-2, 0.1
    tuner = zo.mezo(loss, learning_rate=warmup, sigma=sigma, weight_decay=decay)
    state = start(tuner)
    leaves = [np.float64(PARAMS["dense"]["kernel"]), np.float64(PARAMS["dense"]["bias"]), np.float64(PARAMS["out"])]
    x = np.float64(X)
    for step in range(20):
        plan = tuner.plan(state, X)
        bias, kernel, out = (np.float64(z) for z in draw_pair(plan, state.key, state.generation, 0))
        z = [kernel, bias, out]
        plus, minus = (numpy_loss([w + s * sigma * e for w, e in zip(leaves, z, strict=True)], x) for s in (1, -1))
        projected = (plus - minus) / (2 * sigma)
        rate = 1e-4 + (3e-3 - 1e-4) * min(step, 10) / 10
        decays = (decay, 0.0, decay)  # not the bias
        leaves = [w - rate * (projected * e + d * w) for w, e, d in zip(leaves, z, decays, strict=True)]
        state, metrics = tuner.step(state, X)
        np.testing.assert_allclose(-metrics.coefficients[0] / (2 * sigma), projected, rtol=2e-3, atol=1e-4)
        np.testing.assert_allclose(-metrics.mean_fitness, (plus + minus) / 2, rtol=1e-5)
    ours = [state.params["dense"]["kernel"], state.params["dense"]["bias"], state.params["out"]]
    for mine, theirs in zip(ours, leaves, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-5)


# --- estimators against the gradient ----------------------------------------------------------------------------------------


def estimates(tuner, count):
    """The gradient that steps of plain SGD with rate 1 show, at the same parameters, with fresh noise."""
    state = start(tuner)
    tuner.plan(state, X)
    at = jax.jit(lambda generation: tuner.step(state._replace(generation=generation), X)[0].params)
    return np.stack([flat(state.params) - flat(at(jnp.int32(generation))) for generation in range(count)])


LINEAR = jnp.arange(1.0, 49.0)


def linear(params, batch, key):
    return sum(jnp.vdot(LINEAR[: leaf.size].reshape(leaf.shape), leaf) for leaf in jax.tree.leaves(params))


NOISES = [eggroll.Dense(), eggroll.LowRank(2, "normal"), eggroll.LowRank(1, refresh=7)]


@pytest.mark.parametrize(("noise", "estimator"), covering(NOISES, ["two_point", "one_sided"], strength=1))
def test_the_mean_of_the_estimate_is_the_gradient(estimator, noise):
    """A linear loss: within 5 standard errors in every entry, and along the gradient, where a factor of 1.5 (the control)
    is not.
    """
    options = dict(directions=4, sigma=0.1, optimizer=optax.sgd(1.0), estimator=estimator, perturbation=noise)
    found = estimates(zo.ZerothOrder(linear, **options), 700)
    truth = flat(jax.grad(linear)(PARAMS, X, KEY))
    shared = math.sqrt(getattr(noise, "refresh", 1))  # so many estimates have the same right factors
    mean, error = found.mean(axis=0), shared * found.std(axis=0, ddof=1) / math.sqrt(len(found))
    assert (np.abs(mean - truth) < 5 * error).all()
    along = found @ truth / (truth @ truth)
    error = shared * along.std(ddof=1) / math.sqrt(len(along))
    assert abs(along.mean() - 1) < 5 * error < 0.5 - 5 * error / 10
    assert abs(1.5 * along.mean() - 1) > 5 * error


@pytest.mark.slow
def test_the_squared_error_of_n_directions_is_d_over_n():
    """E |g_hat - g|^2 = |g|^2 (d + 1) / n for a linear loss and normal noise: two n, within 5 standard errors of the mean."""
    truth = flat(jax.grad(linear)(PARAMS, X, KEY))
    for n in (1, 8):
        options = dict(directions=n, sigma=0.1, optimizer=optax.sgd(1.0))
        squares = ((estimates(zo.ZerothOrder(linear, **options), 400) - truth) ** 2).sum(axis=1) / (truth**2).sum()
        error = squares.std(ddof=1) / math.sqrt(len(squares))
        assert abs(squares.mean() - (truth.size + 1) / n) < 5 * error
        assert abs(squares.mean() - (truth.size + 1) / (2 * n)) > 5 * error


def test_coefficients_by_hand():
    plus, minus, base = jnp.float32([1.0, 3.0]), jnp.float32([2.0, 2.5]), jnp.float32(1.5)
    give = {name: np.asarray(coefficients(ESTIMATORS[name], plus, minus, base, sigma=jnp.float32(0.1))) for name in ESTIMATORS}
    np.testing.assert_allclose(give["two_point"], [-1.0, 0.5], rtol=1e-6)
    np.testing.assert_allclose(give["one_sided"], [-2.0, 1.0], rtol=1e-6)
    np.testing.assert_allclose(give["fzoo"], [2 * 0.1 * -1.0, 2 * 0.1 * 0.5], rtol=1e-6)  # the standard deviation is 1
    np.testing.assert_allclose(give["grzo"], [-0.5 / 0.375, 0.25 / 0.375], rtol=1e-6)  # the mean is -0.125
    curvature = np.array([1.0 - 3.0 + 2.0, 3.0 - 3.0 + 2.5]) / 0.01
    np.testing.assert_allclose(give["curvature"], np.array([-1.0, 0.5]) / np.maximum(1, np.abs(curvature) ** 0.1), rtol=1e-5)


def test_equal_losses_have_no_spread():
    """The mean of eight float32 values of 0.3 is not 0.3."""
    losses, sigma = jnp.full(8, 0.3, jnp.float32).at[3].set(jnp.nan), jnp.float32(1e-4)
    for name in ("fzoo", "grzo"):
        found = coefficients(ESTIMATORS[name], losses, jnp.full(8, 0.2, jnp.float32), jnp.float32(0.2), sigma=sigma)
        np.testing.assert_array_equal(found, 0.0)


def test_directions_that_are_not_finite_are_left_out_and_renormalised():
    plus, minus = jnp.float32([1.0, jnp.nan, 3.0, 4.0]), jnp.float32([2.0, 1.0, jnp.inf, 2.0])
    found = coefficients(ESTIMATORS["two_point"], plus, minus, jnp.float32(jnp.nan), sigma=jnp.float32(0.1))
    np.testing.assert_allclose(found, [-2.0, 0.0, 0.0, 4.0])
    nothing = coefficients(ESTIMATORS["one_sided"], plus[:1], plus[:1], jnp.float32(jnp.nan), sigma=jnp.float32(0.1))
    assert np.isnan(nothing).all()


def test_a_step_without_a_finite_loss_changes_nothing():
    tuner = zo.mezo(lambda params, batch, key: jnp.nan * loss(params, batch, key), learning_rate=0.1, weight_decay=0.1)
    state, metrics = run(tuner, 1)
    assert metrics.skipped and metrics.invalid == 2
    np.testing.assert_array_equal(flat(state.params), flat(PARAMS))
    assert int(state.generation) == 1


@pytest.mark.parametrize("recipe", by_default(sorted(zo.RECIPES), "mezo", "fzoo"))
def test_losses_that_are_all_equal_move_nothing_and_key_zero_is_a_key(recipe):
    options = dict(learning_rate=0.1) | ({"directions": 8} if recipe == "grzo" else {})
    tuner = zo.RECIPES[recipe](lambda params, batch, key: 0.0 * loss(params, batch, key) + 1.0, **options)
    state, metrics = tuner.step(tuner.init(PARAMS, key=jax.random.key(0), batch=X), X)
    assert not metrics.skipped
    np.testing.assert_array_equal(flat(state.params), flat(PARAMS))


# --- recipes -----------------------------------------------------------------------------------------------------------

SETTINGS = {
    "mezo": dict(learning_rate=0.02, sigma=1e-2),
    "adamezo": dict(learning_rate=0.01, sigma=1e-2, history=5),
    "lozo": dict(learning_rate=0.02, sigma=1e-2, refresh=5),
    "lozo_m": dict(learning_rate=0.02, sigma=1e-2, refresh=5),
    "fzoo": dict(learning_rate=0.02, sigma=1e-2),
    "spsa15": dict(learning_rate=0.1, sigma=1e-2, directions=8),
    "grzo": dict(learning_rate=4e-4, sigma=1e-2, directions=8),  # an example each
}


@pytest.mark.parametrize("recipe", by_default(sorted(zo.RECIPES), "mezo", "fzoo"))
def test_recipes_learn_and_replay_bit_for_bit(recipe):
    tuner = zo.RECIPES[recipe](loss, **SETTINGS[recipe], weight_decay=1e-3, second_moment=None if recipe != "mezo" else 0.9)
    state, replayed = (tuner.init(PARAMS, key=KEY, batch=X) for _ in range(2))
    before = float(loss(PARAMS, X, KEY))
    for _ in range(150):
        state, metrics = tuner.step(state, X)
        replayed = tuner.replay(replayed, np.asarray(metrics.coefficients))
    assert float(loss(state.params, X, KEY)) < 0.6 * before
    np.testing.assert_array_equal(flat(replayed.params), flat(state.params))


def test_the_right_factor_lasts_for_its_steps_and_the_left_is_fresh():
    tuner = zo.lozo(loss, learning_rate=0.1, rank=2, refresh=3)
    state = start(tuner)
    plan = tuner.plan(state, X)
    drawn = [draw_pair(plan, state.key, jnp.int32(step), 0)[1] for step in range(4)]
    assert plan.leaves[1].role == "low-rank"
    for step in (1, 2):
        np.testing.assert_array_equal(drawn[step].right, drawn[0].right)
        assert not np.array_equal(drawn[step].left, drawn[0].left)
    assert not np.array_equal(drawn[3].right, drawn[0].right)


@pytest.mark.parametrize("step", by_default([0, 1, 3], 3))  # 0 and 3 are refresh steps
def test_lozo_perturbs_and_updates_with_the_same_factors(step):
    tuner = zo.ZerothOrder(
        loss, directions=1, sigma=0.01, optimizer=optax.sgd(1.0), perturbation=eggroll.LowRank(2, "normal", refresh=3)
    )
    state = start(tuner)._replace(generation=jnp.int32(step))
    moved, metrics = tuner.step(eggroll.copy_state(state), X)
    noise = noise_of(tuner, state, 0)
    plus, minus = (
        loss(jax.tree.unflatten(jax.tree.structure(PARAMS), _cut(flat(PARAMS) + s * 0.01 * noise)), X, KEY) for s in (1, -1)
    )
    np.testing.assert_allclose(-metrics.coefficients[0], plus - minus, rtol=1e-3)
    update = flat(state.params) - flat(moved.params)
    np.testing.assert_allclose(update, (plus - minus) / 0.02 * noise, rtol=2e-3, atol=1e-5)


def _cut(vector):
    leaves, start = [], 0
    for leaf in jax.tree.leaves(PARAMS):
        leaves.append(jnp.asarray(vector[start : start + leaf.size]).reshape(leaf.shape))
        start += leaf.size
    return leaves


def test_fzoo_steps_by_the_normalised_losses():
    """Losses that are 1,000 times as large move the parameters as far."""
    moves = []
    for scale in (1.0, 1000.0):
        state, _ = run(zo.fzoo(lambda p, b, k, s=scale: s * loss(p, b, k), learning_rate=0.01, sigma=0.01), 1)
        moves.append(flat(state.params) - flat(PARAMS))
    np.testing.assert_allclose(moves[0], moves[1], rtol=1e-2, atol=1e-5)


def test_a_reward_without_a_gradient_is_tuned():
    """Accuracy of a linear classifier: piecewise constant, gradient 0."""
    labels = X[:, 0] > 0

    def error(params, batch, key):
        return 1.0 - jnp.mean(((batch @ params["w"])[:, 0] > 0) == labels)

    tuner = zo.mezo(error, learning_rate=0.5, sigma=0.5, directions=16)
    params = {"w": jnp.array([[-1.0], [1.0], [0.5], [0.0]])}
    assert flat(jax.grad(error)(params, X, KEY)).any() == 0
    state, _ = run(tuner, 60, params)
    assert float(error(state.params, X, KEY)) <= 0.125 < float(error(params, X, KEY))


def test_a_loss_as_total_and_weight_is_their_ratio():
    tuner, summed = zo.mezo(loss, learning_rate=0.01), zo.mezo(lambda p, b, k: (8 * loss(p, b, k), 8), learning_rate=0.01)
    np.testing.assert_allclose(run(tuner, 3)[1].coefficients, run(summed, 3)[1].coefficients, rtol=1e-3, atol=1e-6)


def test_meazo_divides_by_the_root_of_one_moment():
    tuner = zo.ZerothOrder(
        linear, directions=2, sigma=0.1, optimizer=optax.chain(zo.scale_by_projected_gradient(0.5), optax.sgd(1.0))
    )
    plain = zo.ZerothOrder(linear, directions=2, sigma=0.1, optimizer=optax.sgd(1.0))
    state, metrics = run(tuner, 1)
    projected = np.asarray(metrics.coefficients) / 0.2
    plain_move = flat(run(plain, 1)[0].params) - flat(PARAMS)
    np.testing.assert_allclose(
        flat(state.params) - flat(PARAMS), plain_move / np.sqrt(np.mean(projected**2)), rtol=1e-3, atol=1e-6
    )


def test_bfloat16_parameters_keep_small_updates_in_masters():
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    state, _ = run(
        zo.mezo(lambda p, b, k: loss(p, b.astype(jnp.bfloat16), k).astype(jnp.float32), learning_rate=1e-6, sigma=0.1), 5, half
    )
    masters = flat([master for master in state.masters if master is not None])
    assert np.abs(masters - np.float32(flat(half))).max() > 0
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(state.params))


@pytest.mark.slow
@pytest.mark.usefixtures("standard_promotion")
def test_train_and_durable_runs_take_a_tuner(tmp_path):
    def go(folder, steps):
        tuner = zo.mezo(loss, learning_rate=0.01, sigma=1e-2, second_moment=0.9)
        state = start(tuner)
        tuner.plan(state, X)
        durable = eggroll.DurableRun(folder, tuner, state, config={}, checkpoint_every=3)
        left = steps - int(durable.state.generation)
        state, history = eggroll.train(tuner, durable.state, X, generations=left, durable=durable, run_folder=folder)
        durable.close()
        return state, history

    whole, history = go(tmp_path / "whole", 8)
    go(tmp_path / "parts", 4)
    parts, _ = go(tmp_path / "parts", 8)
    np.testing.assert_array_equal(flat(parts.params), flat(whole.params))
    assert len(history) == 8 and history[-1].mean_fitness < 0


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        (dict(directions=0), ValueError, "directions must be an integer >= 1, got 0"),
        (dict(chunk_directions=0), ValueError, "chunk_directions must be an integer >= 1, got 0"),
        (dict(sigma=0.0), ValueError, "sigma must be a finite number > 0"),
        (dict(estimator="three_point"), ValueError, "estimator must be one of two_point, one_sided, fzoo, curvature"),
        (dict(estimator="fzoo"), ValueError, "directions must be >= 2"),
        (dict(weight_decay=-1.0), ValueError, "weight_decay must be a finite number >= 0"),
        (dict(weight_decay=None), ValueError, "weight_decay must be a finite number >= 0, got None"),
        (dict(second_moment="x"), ValueError, r"second_moment must be in \[0, 1\), got 'x'"),
        (dict(learning_rate="x"), ValueError, "learning_rate must be a finite number > 0 or a schedule, got 'x'"),
        (dict(adam=0.9), TypeError, "adam must be a zo.RebuiltAdam, got 0.9"),
        (dict(second_moment=1.0), ValueError, r"second_moment must be in \[0, 1\)"),
        (dict(learning_rate=0.0), ValueError, "learning_rate must be a finite number > 0"),
        (dict(lerning_rate=0.0), TypeError, "lerning_rate"),
        (dict(perturbation=eggroll.LowRank(refresh=0)), ValueError, "refresh must be an integer >= 1, got 0"),
    ],
)
def test_wrong_settings_are_refused(options, error, words):
    with pytest.raises(error, match=words):
        run(zo.mezo(loss, **({"learning_rate": 0.1} | options)), 1)


@pytest.mark.parametrize("rate", [np.float32(0.1), np.array(0.1), jnp.float32(0.1), jnp.bfloat16(0.1), 1])
def test_a_number_may_be_one_of_numpy_or_jax(rate):
    assert zo.mezo(loss, learning_rate=rate, weight_decay=rate).optimizer.learning_rate is rate


def test_wrong_use_is_refused():
    tuner = zo.mezo(loss, learning_rate=0.1)
    with pytest.raises(ValueError, match=r"replay needs the plan: call plan\(state, batch\)$"):
        tuner.replay(start(tuner), jnp.zeros(1))
    with pytest.raises(ValueError, match=r"coefficients must have shape \(1,\), got \(2,\)"):
        tuner.replay(start(tuner), jnp.zeros(2))
    with pytest.raises(TypeError, match="loss must be a function or Blocks"):
        zo.mezo(None, learning_rate=0.1)
    with pytest.raises(ValueError, match=r"decay must be in \[0, 1\), got 2.0"):
        zo.scale_by_projected_gradient(2.0)
    with pytest.raises(TypeError, match="loss must be a function or Blocks of functions"):
        zo.mezo(zo.Blocks(1, 2, 3), learning_rate=0.1)
    with pytest.raises(TypeError, match=r"optimizer must be a zo\.Descent or an optax transformation, got 3"):
        zo.ZerothOrder(loss, directions=1, sigma=0.1, optimizer=3)


@pytest.mark.parametrize(
    ("result", "got"),
    [
        (lambda x: x, "float32[2]"),
        (lambda x: (x.sum(), 1.0, 2.0), "float32[], a float, a float"),
        (lambda x: [x.sum(), 1.0], "a list"),
        (lambda x: {"loss": x.sum()}, "a dict"),
        (lambda x: x.sum().astype(complex), "complex64[]"),
        (lambda x: (), "an empty tuple"),
    ],
)
def test_what_is_no_loss_is_refused(result, got):
    with pytest.raises(ValueError, match=re.escape(f"loss must be a scalar or (total, weight), got {got}.")):
        total_and_weight(result(jnp.ones(2, jnp.float32)))
