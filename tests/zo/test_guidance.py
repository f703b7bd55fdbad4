"""The suggested learning rate: the best one of a quadratic, in the units of every recipe; and where none can be suggested."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eggroll import zo
from eggroll.noise.rules import Dense
from eggroll.zo import guidance
from eggroll.zo.estimators import coefficients
from eggroll.zo.guidance import guide
from eggroll.zo.optimizers.descent import ProjectedMoment, next_moment
from tests.zo.tiny_blocks import BATCH, PIECES, init

DIMENSIONS = 12
HESSIAN = np.linspace(0.1, 3.0, DIMENSIONS).astype(np.float32)
START = {"theta": jnp.linspace(1.0, -1.0, DIMENSIONS)}
SHIFT = 0.3 * np.cos(np.arange(DIMENSIONS)).astype(np.float32)  # of the gradient of a batch


def quadratic(params, batch, key):
    return 0.5 * jnp.sum(HESSIAN * params["theta"] ** 2) + jnp.sum(batch * params["theta"])


def best_rate(directions):
    """The eta that lowers the loss of the other batch most, by the formula, and as the best of many in a simulation."""
    theta, shift = np.asarray(START["theta"], np.float64), SHIFT.astype(np.float64)
    gradient = HESSIAN * theta
    g = gradient + shift, gradient - shift  # of the two batches
    square, curved = sum(map(np.square, g)).sum(), sum((HESSIAN * np.square(own)).sum() for own in g)
    by_formula = 2 * (g[0] @ g[1]) / (square * HESSIAN.sum() / directions + (1 + 1 / directions) * curved)
    z = np.random.default_rng(0).normal(size=(40_000, directions, DIMENSIONS))
    gains = []
    for own, other in (g, g[::-1]):
        step = ((z @ own)[..., None] * z).mean(axis=1)  # downhill, at rate 1
        gains.append(((step @ other).mean(), (HESSIAN * step**2).sum(axis=1).mean()))
    (down, up), (other_down, other_up) = gains
    return by_formula, (down + other_down) / (up + other_up)


@pytest.mark.parametrize("directions", [4, pytest.param(1, marks=pytest.mark.slow)])
def test_a_quadratic_gets_its_best_rate(directions):
    by_formula, simulated = best_rate(directions)
    assert by_formula == pytest.approx(simulated, rel=0.05)
    tuner = zo.mezo(quadratic, learning_rate=1.0, sigma=0.1, directions=directions)
    state = tuner.init(START, key=jax.random.key(0))
    found = zo.suggest_learning_rate(tuner, state, [SHIFT, -SHIFT], directions=4096)
    assert found.best_step == pytest.approx(by_formula, rel=0.15)
    assert found.learning_rate == pytest.approx(found.best_step / 10)
    assert found.loss == pytest.approx(float(quadratic(START, 0 * SHIFT, None)), rel=1e-3)
    assert not found.reason and 0 < found.signal < 1
    tuner.step(state, SHIFT)  # the state was not consumed


def measured():
    """Losses of 8 directions on two batches: l+, l- and l_0."""
    draw = np.random.default_rng(1).normal
    slope, curvature = draw(size=(2, 8)) + 3 * draw(size=8), 40 + draw(size=(2, 8))
    return 1 + 0.01 * slope + 0.5e-4 * curvature, 1 - 0.01 * slope + 0.5e-4 * curvature, np.ones(2)


def guided(make, **options):
    return guide(*measured(), sigma=0.01, tuner=make(quadratic, learning_rate=1.0, **options))


def test_recipes_that_divide_by_the_size_of_the_gradient_get_a_rate_in_their_units():
    plain, plus, minus = guided(zo.mezo, directions=8), *measured()[:2]
    spread = np.mean([np.std(row) for row in plus]) / 0.01
    assert guided(zo.fzoo).learning_rate == pytest.approx(plain.learning_rate * spread, rel=0.05)
    slope = np.sqrt(np.mean(((plus - minus) / 0.02) ** 2))
    assert slope == pytest.approx(plain.projected_gradient)
    scaled = guided(zo.mezo, directions=8, second_moment=0.9)
    assert scaled.learning_rate == pytest.approx(plain.learning_rate * slope)
    assert guided(zo.spsa15, directions=8).learning_rate == pytest.approx(plain.learning_rate * 40**0.1, rel=0.02)
    assert guided(zo.lozo, directions=8).learning_rate == plain.learning_rate


@pytest.mark.parametrize("make", [zo.mezo, zo.fzoo, zo.spsa15])
@pytest.mark.parametrize("second_moment", [None, 0.9])
def test_a_step_at_the_suggested_rate_is_as_long_as_that_of_mezo(make, second_moment):
    """Whatever the estimator makes of the losses, and whether a second moment divides by the size of that."""
    plus, minus, base = (losses[0] for losses in measured())
    plain = guided(zo.mezo, directions=8)
    found = guided(make, directions=8, second_moment=second_moment)
    estimator = zo.ESTIMATORS[make(quadratic, learning_rate=1.0).estimator]
    other = minus if len(estimator.signs) == 2 else np.full_like(plus, base)
    losses = (jnp.asarray(values, jnp.float32) for values in (plus, other, base))
    d = coefficients(estimator, *losses, sigma=jnp.float32(0.01))
    scale = 1.0
    if second_moment is not None:
        scale = next_moment(ProjectedMoment(jnp.int32(0), jnp.float32(0)), d, jnp.float32(0.01), second_moment)[1]
    step = np.sqrt(np.mean(np.square(d))) / 0.02 / scale * found.learning_rate
    assert step == pytest.approx(plain.projected_gradient * plain.learning_rate, rel=0.1)  # of one of two batches


def test_a_sigma_multiplier_changes_nothing_where_sigma_makes_up_for_it():
    rules = {"multiplied": Dense("normal", sigma_multiplier=10.0), "plain": Dense("normal")}
    made = {name: zo.mezo(quadratic, learning_rate=1.0, directions=8, perturbation=rule) for name, rule in rules.items()}
    found = {}
    for name, sigma in (("multiplied", 0.01), ("plain", 0.1)):
        tuner = dataclasses.replace(made[name], sigma=sigma)
        found[name] = zo.suggest_learning_rate(tuner, tuner.init(START, key=jax.random.key(0)), [SHIFT, -SHIFT], directions=64)
    assert found["multiplied"].learning_rate == pytest.approx(found["plain"].learning_rate, rel=1e-2)
    several = guide(*measured(), sigma=0.01, tuner=made["plain"], multipliers={1.0, 10.0})
    assert np.isnan(several.learning_rate) and several.reason == "parameters have different sigma multipliers"


def test_the_measurement_holds_as_many_directions_at_once_as_a_step(monkeypatch):
    chunks = []
    monkeypatch.setattr(guidance, "_measure", lambda tuner, state, batch: chunks.append(tuner.chunk_directions))
    for options in ({}, {"directions": 4}, {"directions": 4, "chunk_directions": 2}):
        tuner = zo.mezo(quadratic, learning_rate=1.0, **options)
        with pytest.raises(AttributeError):  # there are no losses
            zo.suggest_learning_rate(tuner, tuner.init(START, key=jax.random.key(0)), [SHIFT, -SHIFT])
    assert chunks[::2] == [1, 4, 2]


def test_no_rate_is_suggested_where_none_follows():
    plus, minus, base = measured()
    opposite = np.stack([plus[0], minus[0]]), np.stack([minus[0], plus[0]])
    for make, losses in itertools.product((zo.adamezo, zo.grzo), (measured(), (*opposite, base))):
        found = guide(*losses, sigma=0.01, tuner=make(quadratic, learning_rate=1.0))
        assert np.isnan(found.learning_rate) and "do not follow the size of the gradient" in found.reason
    one_sided = zo.mezo(quadratic, learning_rate=1.0, estimator="one_sided")
    assert "were equal; raise sigma" in guide(base[:, None] + 0 * plus, minus, base, sigma=0.01, tuner=one_sided).reason
    tuner = zo.mezo(quadratic, learning_rate=1.0)
    for losses, reason in (
        ((plus * np.nan, minus, base), "not finite"),
        ((base[:, None] + 0 * plus, base[:, None] + 0 * plus, base), "were equal; raise sigma"),
        ((plus, minus, base + 1), "does not curve upwards"),
        ((*opposite, base), "no gradient in common"),
    ):
        found = guide(*losses, sigma=0.01, tuner=tuner)
        assert np.isnan(found.learning_rate) and reason in found.reason
    with pytest.raises(ValueError, match="batches must be two or more"):
        zo.suggest_learning_rate(tuner, tuner.init(START, key=jax.random.key(0)), [SHIFT])


@pytest.mark.slow
def test_a_model_away_from_the_device_or_on_two_gets_the_same_rate():
    batches = [BATCH, BATCH[::-1] // 2]
    mesh = jax.make_mesh((2,), ("population",), devices=jax.devices()[:2])
    found = []
    for on, wrap in ((None, lambda tuner: tuner), (None, zo.Offload), (mesh, lambda tuner: tuner)):
        tuner = wrap(zo.mezo(PIECES, learning_rate=1e-3, chunk_directions=1, mesh=on))
        state = tuner.init(init(blocks=2), key=jax.random.key(0))
        found.append(zo.suggest_learning_rate(tuner, state, batches))
    for other in found[1:]:
        np.testing.assert_allclose(other[:6], found[0][:6], rtol=1e-2)
