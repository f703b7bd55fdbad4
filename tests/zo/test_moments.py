"""Moments that are rebuilt or live in a subspace: against NumPy written from the papers' formulas, and what the state holds."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh

import eggroll
from eggroll import zo
from eggroll.generation import update_parameters
from eggroll.noise.draws import draw_pair
from tests.tables import by_default
from tests.zo.tiny_blocks import BATCH, PIECES, end, init

PARAMS = {"bias": jnp.zeros(6), "kernel": 0.5 * jax.random.normal(jax.random.key(3), (4, 6)), "out": jnp.ones((6, 2))}
X = jax.random.normal(jax.random.key(1), (8, 4))
SICK = jnp.full((8, 4), jnp.nan)  # no loss is finite: the step changes nothing
KEY = jax.random.key(7)
SIGMA, DECAY = 0.05, 0.1


def loss(params, batch, key):
    return jnp.mean((jnp.tanh(batch @ params["kernel"] + params["bias"]) @ params["out"] - 1.0) ** 2)


def flat(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def run(tuner, batches, params=PARAMS):
    state = tuner.init(params, key=KEY, batch=X)
    for batch in batches:
        state, _ = tuner.step(state, batch)
    return state


# --- NumPy ---------------------------------------------------------------------------------------------------------------


def numpy_loss(leaves, x):
    bias, kernel, out = leaves
    return np.mean((np.tanh(x @ kernel + bias) @ out - 1.0) ** 2)


def drawn_factors(tuner):
    """A function (step, direction) to float64 z of the bias, and (U [m, r], V [n, r]) of both matrices."""
    state = tuner.init(PARAMS, key=KEY, batch=X)
    draw = jax.jit(lambda step, k: draw_pair(tuner.plan(state, X), state.key, step, k))

    def factors(step, k):
        bias, *matrices = draw(step, k)
        return [np.float64(bias), *[(np.float64(drawn.left.T), np.float64(drawn.right.T)) for drawn in matrices]]

    return functools.cache(factors)


def built(factors):
    return [factors[0], *[u @ v.T / np.sqrt(u.shape[1]) for u, v in factors[1:]]]


def numpy_run(tuner, draw, batches, descent):
    """The steps of MeZO with `descent(step, projected gradients, factors) -> [one array per leaf]` in place of the estimate."""
    leaves = [np.float64(PARAMS[name]) for name in ("bias", "kernel", "out")]
    for step, batch in enumerate(batches):
        x = np.float64(batch)
        if np.isnan(x).any():
            continue
        factors = [draw(step, k) for k in range(tuner.directions)]
        projected = []
        for own in factors:
            plus, minus = (numpy_loss([w + s * SIGMA * e for w, e in zip(leaves, built(own), strict=True)], x) for s in (1, -1))
            projected.append((plus - minus) / (2 * SIGMA))
        moves = descent(step, projected, factors)
        decays = (0.0, DECAY, DECAY)  # not the bias
        leaves = [w - tuner.optimizer.learning_rate * (m + d * w) for w, m, d in zip(leaves, moves, decays, strict=True)]
    return np.concatenate([np.ravel(leaf) for leaf in leaves])


def numpy_adam(b1, b2, history):
    """Every estimate of the last steps is kept, as the memory of NumPy allows."""
    seen = []

    def descent(step, projected, factors):
        n = len(projected)
        seen.append(
            [
                sum(p * z for p, z in zip(projected, per_leaf, strict=True)) / n
                for per_leaf in zip(*map(built, factors), strict=True)
            ]
        )
        last, moves = seen[-history:][::-1], []
        for leaf in range(3):
            m = sum(b1**j * g[leaf] for j, g in enumerate(last)) / sum(b1**j for j in range(len(last)))
            v = sum(b2**j * g[leaf] ** 2 for j, g in enumerate(last)) / sum(b2**j for j in range(len(last)))
            moves.append(m / (np.sqrt(v) + 1e-8))
        return moves

    return descent


def numpy_subspace(b, refresh, *, projects=True):
    """N [m, r] of every matrix and direction, m of the bias."""
    kept = {}

    def descent(step, projected, factors):
        n, moves = len(projected), []
        old, kept["bias"] = kept.get("bias", 0.0), 0.0
        kept["bias"] = b * old + (1 - b) * sum(p * own[0] for p, own in zip(projected, factors, strict=True)) / n
        moves.append(kept["bias"])
        for leaf in (1, 2):
            total = 0.0
            for k, own in enumerate(factors):
                u, v = own[leaf]
                before, v_before, then = kept.get((leaf, k), (np.zeros_like(u), v, step))
                if projects and then // refresh != step // refresh:
                    before = before @ (v_before.T @ v) / v.shape[0]
                now = b * before + (1 - b) * projected[k] / n * u / np.sqrt(u.shape[1])
                kept[leaf, k] = now, v, step
                total = total + now @ v.T
            moves.append(total)
        return moves

    return descent


MIXED = [X] * 4 + [SICK] + [X] * 9  # the step that is skipped is one where the right factors change
ADAM = zo.RebuiltAdam(0.8, 0.95, history=5)
METHODS = {
    "adamezo": dict(adam=ADAM),
    "lozo_m": dict(momentum=0.9, perturbation=eggroll.LowRank(2, "normal", refresh=3)),
}


@pytest.mark.slow
def test_adamezo_is_adam_over_the_last_estimates():
    """14 steps, 5 in the history, one skipped; NumPy that forgets nothing (the control) goes elsewhere."""
    noise = eggroll.LowRank(2, "normal", refresh=4)
    tuner = zo.mezo(loss, learning_rate=0.02, adam=ADAM, perturbation=noise, sigma=SIGMA, directions=2, weight_decay=DECAY)
    found, draw = flat(run(tuner, MIXED).params), drawn_factors(tuner)
    np.testing.assert_allclose(found, numpy_run(tuner, draw, MIXED, numpy_adam(0.8, 0.95, 5)), atol=2e-4)
    assert np.abs(found - numpy_run(tuner, draw, MIXED, numpy_adam(0.8, 0.95, 14))).max() > 2e-3


@pytest.mark.slow
@pytest.mark.parametrize("distribution", by_default(["normal", "rademacher"], "normal"))
def test_lozo_m_is_momentum_in_the_subspace(distribution):
    """14 steps, V new at 4 (skipped: the next one projects), 8 and 12; without the projection (the control) elsewhere."""
    options = dict(refresh=4, sigma=SIGMA, directions=2, weight_decay=DECAY, distribution=distribution)
    tuner = zo.lozo_m(loss, learning_rate=0.1, **options)
    found, draw = flat(run(tuner, MIXED).params), drawn_factors(tuner)
    np.testing.assert_allclose(found, numpy_run(tuner, draw, MIXED, numpy_subspace(0.9, 4)), atol=2e-5)
    assert np.abs(found - numpy_run(tuner, draw, MIXED, numpy_subspace(0.9, 4, projects=False))).max() > 1e-3


@pytest.mark.slow
@pytest.mark.usefixtures("standard_promotion")
def test_dense_noise_has_the_moments_of_optax():
    """Adam while the history is not full, and momentum, which optax does not weigh by 1 - b; optax's own go on working."""
    stored = {"adam": optax.adam(0.02, 0.8, 0.95), "momentum": optax.sgd(0.02, momentum=0.9)}
    rates = {"adam": dict(learning_rate=0.02, adam=ADAM), "momentum": dict(learning_rate=0.2, momentum=0.9)}
    for name, optimizer in stored.items():
        theirs = run(zo.ZerothOrder(loss, directions=2, sigma=SIGMA, optimizer=optimizer), [X] * 5)
        ours = run(zo.mezo(loss, directions=2, sigma=SIGMA, perturbation=eggroll.Dense("normal"), **rates[name]), [X] * 5)
        np.testing.assert_allclose(flat(ours.params), flat(theirs.params), atol=1e-5, err_msg=name)
        assert np.abs(flat(ours.params) - flat(PARAMS)).max() > 0.01


@pytest.mark.slow
def test_without_decay_it_is_lozo_also_where_the_right_factor_is_new():
    """The factors of the update are those of the perturbation, on every step: 7 steps, new at 3 and 6; blocks are stacked."""
    ends = []
    for momentum in (None, 0.0):
        tuner = zo.lozo(PIECES, learning_rate=0.05, sigma=SIGMA, refresh=3, directions=2, momentum=momentum)
        state = tuner.init(init(), key=KEY, batch=BATCH)
        for _ in range(7):
            state, _ = tuner.step(state, BATCH)
        ends.append(flat(state.params))
    np.testing.assert_allclose(ends[0], ends[1], atol=1e-5)
    assert np.abs(ends[0] - flat(init())).max() > 0.01


# --- the state -------------------------------------------------------------------------------------------------------------


def values(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


@pytest.mark.slow
def test_the_history_is_all_that_is_kept_and_memory_does_not_grow_with_it():
    """Temporary memory of an update of 8 equal matrices: the moves, and the moments of one matrix; all moments would be 16."""
    params, size = {f"w{index}": jnp.ones((64, 64)) for index in range(8)}, 64 * 64 * 4
    chain = lambda params, batch, key: functools.reduce(lambda x, w: jnp.tanh(x @ w), params.values(), batch).mean()  # noqa: E731
    temporary = {}
    for history in (None, 2, 40):
        adam = history and zo.RebuiltAdam(history=history)
        tuner = zo.mezo(chain, learning_rate=0.1, directions=3, perturbation=eggroll.Dense("normal"), adam=adam)
        state = tuner.init(params, key=KEY, batch=jnp.ones((2, 64)))
        assert values(state.opt_state) == (history * (3 + 2) + 1 if history else 0)
        plan = tuner.plan(state)
        update = functools.partial(update_parameters, tuner, plan, optimizer=tuner.optax_optimizer(plan))
        program = jax.jit(update).lower(state, jnp.ones(3)).compile()
        temporary[history] = program.memory_analysis().temp_size_in_bytes / size
    assert abs(temporary[40] - temporary[2]) < 0.2
    assert temporary[40] - temporary[None] < 8 + 8


@pytest.mark.parametrize("name", list(METHODS))
def test_parameters_are_updated_block_by_block(name):
    tuner = zo.mezo(loss, learning_rate=0.05, sigma=SIGMA, weight_decay=DECAY, **METHODS[name])
    assert tuner.plan_of(PARAMS, X).update == "block by block"


def test_momentum_of_a_matrix_is_r_m_values_a_direction():
    state = run(zo.lozo_m(loss, learning_rate=0.1, rank=2, directions=3), [])
    shapes = {path: leaf.shape for path, leaf in state.opt_state[0].momenta.items()}
    assert shapes == {"bias": (6,), "kernel": (3, 2, 4), "out": (3, 2, 6)}
    assert values(state.opt_state) == 1 + 6 + 3 * 2 * (4 + 6)


@pytest.mark.slow
@pytest.mark.parametrize("name", by_default(METHODS, "lozo_m"))
def test_a_skipped_step_leaves_the_state_as_it_was(name):
    tuner = zo.mezo(loss, learning_rate=0.05, sigma=SIGMA, **METHODS[name])
    state = run(tuner, [X] * 3)
    after, metrics = tuner.step(eggroll.copy_state(state), SICK)
    assert metrics.skipped and int(after.generation) == 4
    np.testing.assert_array_equal(flat(after.opt_state), flat(state.opt_state))
    np.testing.assert_array_equal(flat(after.params), flat(state.params))


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_replay_and_resuming_give_the_same_bits(name, tmp_path):
    """From the journal alone, and from a checkpoint and the rest of the journal."""
    tuner = zo.mezo(loss, learning_rate=0.05, sigma=SIGMA, **METHODS[name])

    def go(folder, steps, every):
        state = tuner.init(PARAMS, key=KEY, batch=X)
        durable = eggroll.DurableRun(folder, tuner, state, config={}, checkpoint_every=every)
        left = steps - int(durable.state.generation)
        state, _ = eggroll.train(tuner, durable.state, X, generations=left, durable=durable)
        durable.close()
        return state

    with jax.numpy_dtype_promotion("standard"):  # orbax
        whole = go(tmp_path / "whole", 8, 100)
        go(tmp_path / "parts", 5, 3)
        parts = go(tmp_path / "parts", 8, 3)
    for one, other in zip(jax.tree.leaves(whole.opt_state), jax.tree.leaves(parts.opt_state), strict=True):
        np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(flat(whole.params), flat(parts.params))


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_frozen_parameters_stay_and_short_floats_have_masters(name):
    options = dict(METHODS[name])
    options["perturbation"] = [("out", eggroll.Frozen()), (".*", options.get("perturbation", eggroll.Dense()))]
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), PARAMS)
    cast = lambda params, batch, key: loss(params, batch.astype(jnp.bfloat16), key).astype(jnp.float32)  # noqa: E731
    state = run(zo.mezo(cast, learning_rate=1e-3, sigma=SIGMA, weight_decay=0.1, **options), [X] * 5, half)
    np.testing.assert_array_equal(state.params["out"], half["out"])
    assert not np.array_equal(state.masters[1], half["kernel"].astype(jnp.float32))


@pytest.mark.slow
def test_an_evolution_strategy_takes_the_rebuilt_moments():
    optimizer = optax.chain(zo.scale_by_rebuilt_adam(ADAM, directions=4), optax.scale(-0.05))
    es = eggroll.EvolutionStrategy(
        lambda params, batch, key: -loss(params, batch, key), population_size=8, sigma=0.1, optimizer=optimizer
    )
    state = es.init(PARAMS, key=KEY)
    for _ in range(40):
        state, metrics = es.step(state, X)
    assert float(loss(state.params, X, KEY)) < 0.5 * float(loss(PARAMS, X, KEY))


# --- elsewhere ---------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_offloaded_moments_pass_over_skipped_steps():
    sick = PIECES._replace(end=lambda r, x, b: tuple(jnp.where(b[0, 0] < 0, jnp.nan, part) for part in end(r, x, jnp.abs(b))))
    away, bad = zo.Offload(zo.mezo(sick, learning_rate=1e-3, sigma=1e-2, adam=ADAM)), BATCH.at[0, 0].set(-1)
    state, _ = away.step(away.init(init(), key=KEY), bad)
    np.testing.assert_array_equal(flat(away.parameters(state := away.flush(state))), flat(init()))
    for batch, steps in ((BATCH, 1), (bad, 1), (BATCH, 2)):
        state, _ = away.step(state, batch)
        assert int(state.pending.history.steps) == steps and bool(state.pending.rate) == (batch is BATCH)
    moved = np.abs(flat(away.parameters(away.flush(state))) - flat(init()))
    assert 1e-3 < moved.max() < 2.1e-3  # two steps of Adam


def spread(name, on):
    """The parameters after 12 steps, and whether replicas are equal to the bit."""
    options = {
        "adamezo": dict(adam=zo.RebuiltAdam(history=4), learning_rate=1e-3),
        "lozo_m": dict(momentum=0.9, learning_rate=3e-2, perturbation=eggroll.LowRank(2, "normal", refresh=5)),
    }
    tuner = zo.mezo(PIECES, sigma=1e-2, weight_decay=0.1, directions=4, mesh=on, **options[name])
    state = tuner.init(init(), key=jax.random.key(9), batch=BATCH)
    for _ in range(12):
        state, _ = tuner.step(state, BATCH)
    kept = jax.tree.leaves((state.params, state.opt_state))
    replicas = [[np.asarray(part.data).tobytes() for part in leaf.addressable_shards] for leaf in kept]
    return flat(state.params), all(len(set(parts)) == 1 for parts in replicas)


@pytest.mark.slow
@pytest.mark.parametrize("axis", ["population", "data"])
@pytest.mark.parametrize("name", METHODS)
def test_two_devices_do_the_same(name, axis):
    (alone, _), (found, same) = spread(name, None), spread(name, Mesh(np.array(jax.devices()[:2]), (axis,)))
    assert np.abs(found - alone).max() <= 5e-5 < 1e-3 < np.abs(found - flat(init())).max()
    assert same


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: zo.RebuiltAdam(b1=1.0), r"b1 must be in \[0, 1\), got 1.0"),
        (lambda: zo.RebuiltAdam(b2=-0.1), r"b2 must be in \[0, 1\), got -0.1"),
        (lambda: zo.adamezo(loss, learning_rate=0.1, history=0), "history must be an integer >= 1, got 0"),
        (lambda: zo.RebuiltAdam(epsilon=0.0), "epsilon must be a finite number > 0, got 0.0"),
        (lambda: zo.RebuiltAdam("x"), r"b1 must be in \[0, 1\), got 'x'"),
        (lambda: zo.lozo_m(loss, learning_rate=0.1, momentum=1.0), r"momentum must be in \[0, 1\), got 1.0"),
        (lambda: zo.adamezo(loss, learning_rate=0.1, momentum=0.9), "only one of second_moment, adam and momentum"),
        (lambda: zo.lozo_m(loss, learning_rate=0.1).init(PARAMS, key=KEY), "momentum follows the plan: give init a batch"),
        (
            lambda: run(zo.lozo_m(loss, learning_rate=0.1, refresh=1), []),
            "'kernel' needs LowRank\\(refresh=...\\) above 1",
        ),
        (
            lambda: run(zo.mezo(loss, learning_rate=0.1, perturbation=eggroll.Flipout(), momentum=0.9), []),
            "momentum is for low-rank and dense noise: 'kernel' has Flipout noise",
        ),
    ],
)
def test_wrong_use_is_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()
