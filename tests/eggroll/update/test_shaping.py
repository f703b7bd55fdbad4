"""Fitness shaping against hand-computed tables."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from eggroll import SHAPINGS, centered_ranks, group_relative, pair_sign, z_score
from eggroll.update.estimator import pair_coefficients

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("fitness", "expected"),
    [
        ([10.0, 20.0, 30.0, 40.0, 0.0], [-0.25, 0.0, 0.25, 0.5, -0.5]),
        ([1.0, 1.0, 2.0, 3.0, 3.0], [-0.375, -0.375, 0.0, 0.375, 0.375]),
        ([5.0, NAN, 7.0, -9.0, 6.0], [0.0, -0.5, 0.5, -0.25, 0.25]),
        ([5.0, NAN, 7.0, INF, 6.0], [0.0, -0.375, 0.5, -0.375, 0.25]),
    ],
)
def test_centered_ranks(fitness, expected):
    np.testing.assert_allclose(centered_ranks(jnp.array(fitness)), expected, atol=1e-7)


def test_z_score():
    np.testing.assert_allclose(z_score(jnp.array([1.0, 3.0])), [-1.0, 1.0], rtol=1e-6)
    np.testing.assert_allclose(z_score(jnp.array([1.0, 3.0, NAN, 3.0])), [-1.0, 1.0, -1.0, 1.0], rtol=1e-6)


def test_pair_sign():
    fitness = jnp.array([1.0, 2.0, 5.0, 5.0, 3.0, NAN, NAN, -INF])
    np.testing.assert_array_equal(pair_sign(fitness), [-0.5, 0.5, 0.0, 0.0, 0.5, -0.5, 0.0, 0.0])


def test_group_relative_of_consecutive_members():
    fitness = jnp.array([1.0, 3.0, 10.0, 14.0])
    centred = np.array([-1.0, 1.0, -2.0, 2.0])
    expected = centred / np.sqrt(np.var([1.0, 3.0, 10.0, 14.0]) + 1e-5)
    np.testing.assert_allclose(group_relative(fitness, group_size=2), expected, rtol=1e-6)


def test_group_relative_of_columns():
    fitness = jnp.array([[1.0, 10.0], [3.0, 14.0]])
    scale = np.sqrt(np.var([1.0, 3.0, 10.0, 14.0]) + 1e-5)
    np.testing.assert_allclose(group_relative(fitness), [-1.5 / scale, 1.5 / scale], rtol=1e-6)


def test_columns_are_shaped_one_by_one_and_averaged():
    fitness = jnp.array([[0.0, 300.0], [1.0, 200.0], [2.0, 100.0]])
    np.testing.assert_allclose(centered_ranks(fitness), [0.0, 0.0, 0.0], atol=1e-7)


SHAPED = [*(f for name, f in SHAPINGS.items() if name != "group_relative"), functools.partial(group_relative, group_size=4)]


@pytest.mark.parametrize("shaping", SHAPED)
@pytest.mark.parametrize("value", [0.1, -3.7e5, 0.0])
def test_all_equal_gives_exactly_zero(shaping, value):
    shaped = shaping(jnp.full((64,), value, jnp.float32))
    assert not np.any(pair_coefficients(shaped))


@pytest.mark.parametrize("shaping", SHAPED)
def test_all_nan_stays_finite(shaping):
    assert np.isfinite(shaping(jnp.full((8,), NAN))).all()


@pytest.mark.parametrize("group_size", [None, 3, 5, 6])
def test_group_size_must_be_even_and_divide(group_size):
    with pytest.raises(ValueError, match="group_size must be even and divide population_size 8"):
        group_relative(jnp.zeros(8), group_size=group_size)


def test_z_score_survives_a_member_that_diverged():
    shaped = z_score(jnp.array([1.0, 2.0, 3.0, -1e30]))
    np.testing.assert_allclose(shaped, [0.577, 0.577, 0.577, -1.732], atol=1e-3)
    assert np.isfinite(z_score(jnp.array([3e38, 3e38, 1.0, 2.0]))).all()
