"""The estimator against exact means, with derived tolerances and controls that must fail."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import eggroll
from eggroll.lazy.planning import make_plan
from eggroll.noise import addresses, draws
from eggroll.update import estimator, pair_sums
from tests.eggroll.replicates import Z_LIMIT, gradients, through_dot, z_scores
from tests.tables import by_default, covering

M, N = 5, 4
W = {"w": 0.5 * jax.random.normal(jax.random.key(1), (M, N))}
C = jax.random.normal(jax.random.key(2), (M, N))
SPECS = [
    eggroll.LowRank(1),
    eggroll.LowRank(3),
    eggroll.LowRank(1, "normal"),
    eggroll.LowRank(2, "normal"),
    eggroll.LowRank(8, "normal"),
    eggroll.Dense(),
    eggroll.Dense("rademacher"),
]


def identity(spec):
    return f"{type(spec).__name__}-{getattr(spec, 'rank', 0)}-{spec.distribution}"


def linear(w):
    return jnp.sum(w * C)


def cubic(w):
    return jnp.sum(w**3)


def kurtosis_of_entry(spec):
    """E[E_ij^4] of one entry: 3 + 6 / r for normal factors, 3 - 2 / r for Rademacher ones, 3 and 1 for dense noise."""
    if isinstance(spec, eggroll.Dense):
        return {"normal": 3.0, "rademacher": 1.0}[spec.distribution]
    return 3 + {"normal": 6.0, "rademacher": -2.0}[spec.distribution] / spec.rank


def samples(function, spec, *, sigma=0.5, num_pairs=16, replicates=2048, seed=0):
    objective = through_dot(function)
    made = gradients(objective, W, perturbation=spec, sigma=sigma, num_pairs=num_pairs, replicates=replicates, seed=seed)
    return made["w"]


@pytest.mark.parametrize("spec", by_default(SPECS, SPECS[0], SPECS[1], SPECS[3], SPECS[5]), ids=identity)
def test_linear_objective_is_exactly_unbiased_at_every_rank(spec):
    assert np.abs(z_scores(samples(linear, spec), C)).max() < Z_LIMIT


def test_controls_of_the_linear_test():
    """Wrong sign, missing sigma, missing 1/sqrt(r) are all seen by the test above."""
    drawn = samples(linear, eggroll.LowRank(3))
    for wrong in (-drawn, 0.5 * drawn, 3**0.5 * drawn):
        assert np.abs(z_scores(wrong, C)).max() > 2 * Z_LIMIT


@pytest.mark.parametrize("spec", SPECS[1:6:2], ids=identity)
def test_quadratic_objective_has_the_exact_gradient(spec):
    """f = |W - C|^2: antithetic differences cancel the even terms, so the mean is 2 (W - C) at any sigma and rank."""
    assert np.abs(z_scores(samples(lambda w: jnp.sum((w - C) ** 2), spec), 2 * (W["w"] - C))).max() < Z_LIMIT


@pytest.mark.parametrize("spec", by_default(SPECS, SPECS[0], SPECS[3], SPECS[6]), ids=identity)
def test_cubic_objective_shows_the_rank(spec):
    """f = sum(W^3): the mean is 3 W^2 + sigma^2 E[E_ij^4]."""
    sigma = 0.7
    expected = 3 * W["w"] ** 2 + sigma**2 * kurtosis_of_entry(spec)
    drawn = samples(cubic, spec, sigma=sigma, num_pairs=64, replicates=4096)
    assert np.abs(z_scores(drawn, expected)).max() < Z_LIMIT


@pytest.mark.slow
def test_controls_of_the_cubic_test():
    """Another rank's mean, a perturbation without 1/sqrt(r), and a missing sigma are seen."""
    sigma, spec = 0.7, eggroll.LowRank(2, "normal")
    options = dict(num_pairs=64, replicates=4096)
    expected = 3 * W["w"] ** 2 + sigma**2 * kurtosis_of_entry(spec)
    other_rank = samples(cubic, eggroll.LowRank(4, "normal"), sigma=sigma, **options)
    unscaled = 2**0.5 * samples(cubic, spec, sigma=sigma * 2**0.5, **options)  # sigma A B^T, divided by sigma
    without_sigma = sigma * samples(cubic, spec, sigma=sigma, **options)
    for wrong in (other_rank, unscaled, without_sigma):
        assert abs(z_scores(wrong.mean(axis=(1, 2)), expected.mean())) > 2 * Z_LIMIT


def test_mean_follows_jax_grad_for_small_sigma():
    """On a smooth function the mean is the gradient up to O(sigma^2), here far below the standard error."""

    def smooth(w):
        return jnp.sum(jnp.tanh(w @ C.T))

    drawn = samples(smooth, eggroll.LowRank(1, "normal"), sigma=1e-2)
    assert np.abs(z_scores(drawn, jax.grad(smooth)(W["w"]))).max() < Z_LIMIT


def test_variance_of_a_linear_objective_follows_its_law():
    """Var g_ij = (E[(C.E)^2 E_ij^2] - C_ij^2) / P; with dense normal noise that is (|C|^2 + C_ij^2) / P."""
    num_pairs, replicates = 8, 8192
    drawn = np.asarray(samples(linear, eggroll.Dense(), num_pairs=num_pairs, replicates=replicates))
    law = np.asarray((jnp.sum(C**2) + C**2) / num_pairs)
    # the standard error of a sample variance is variance sqrt((kurtosis - 1) / R); a product of normals has kurtosis <= 9
    assert np.abs(drawn.var(axis=0) / law - 1).max() < Z_LIMIT * (8 / replicates) ** 0.5
    low_rank = np.asarray(samples(linear, eggroll.LowRank(1), num_pairs=num_pairs, replicates=replicates))
    assert low_rank.var(axis=0).sum() < drawn.var(axis=0).sum()  # |E_ij| = 1: no spread of its own


TWINS = {"a": jnp.zeros((M, N)), "b": jnp.zeros((M, N))}


def twin_gradients():
    def objective(params):
        return jnp.sum((jnp.eye(M) @ params["a"]) * C) + 0.0 * jnp.sum(jnp.eye(M) @ params["b"])

    return gradients(objective, TWINS, perturbation=eggroll.LowRank(1), sigma=0.5, num_pairs=16, replicates=2048)


def test_leaves_of_equal_shape_have_independent_noise():
    """b does not enter the fitness, so its gradient has mean zero unless it shares a's noise."""
    assert np.abs(z_scores(twin_gradients()["b"], 0 * C)).max() < Z_LIMIT


def test_control_shared_noise_between_leaves_is_seen(monkeypatch):
    original = addresses.leaf_keys
    monkeypatch.setattr(addresses, "leaf_keys", lambda key, generation, paths: original(key, generation, ["same"] * len(paths)))
    assert np.abs(z_scores(twin_gradients()["b"], 0 * C)).max() > 2 * Z_LIMIT


def test_generations_are_independent():
    drawn = np.asarray(samples(linear, eggroll.LowRank(1), num_pairs=1)) - np.asarray(C)
    lagged = (drawn[1:] * drawn[:-1]).reshape(len(drawn) - 1, -1)
    assert np.abs(z_scores(lagged, np.zeros(lagged.shape[1]))).max() < Z_LIMIT


def fixed_plan(spec, shape=(M, N)):
    params = {"w": jnp.zeros(shape), "bias": jnp.zeros(shape[1])}
    return make_plan(lambda p, x: x @ p["w"] + p["bias"], params, jnp.zeros((1, shape[0])), perturbation=spec)


@pytest.mark.parametrize(("spec", "budget"), covering(SPECS, [1, 700, 1500], strength=1))
def test_chunked_equals_unchunked(spec, budget, monkeypatch):
    plan, coefficients = fixed_plan(spec), jax.random.normal(jax.random.key(5), (13,))
    options = dict(noise_key=jax.random.key(0), noise_generation=3, sigma=0.1)
    whole = estimator.gradient(plan, coefficients, **options)
    monkeypatch.setattr(pair_sums, "NOISE_BUDGET", budget)
    chunked = estimator.gradient(plan, coefficients, **options)
    for one, other in zip(jax.tree.leaves(whole), jax.tree.leaves(chunked), strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=2e-5)


def test_memory_grows_with_the_factors_not_with_the_matrices():
    """Temporary memory stays far below the P m n values of materialised noise."""
    m = n = 128
    plan = fixed_plan(eggroll.LowRank(1), (m, n))

    def temporary(num_pairs):
        shape = jax.ShapeDtypeStruct((num_pairs,), jnp.float32)
        compiled = (
            jax.jit(lambda c: estimator.gradient(plan, c, noise_key=jax.random.key(0), noise_generation=0, sigma=0.1))
            .lower(shape)
            .compile()
        )
        return compiled.memory_analysis().temp_size_in_bytes

    growth = (temporary(2048) - temporary(1024)) / 1024
    assert growth < 10 * 4 * (m + n)  # a few copies of r (m + n) float32 values per pair
    assert growth < 0.2 * 4 * m * n


def test_all_equal_fitness_gives_exactly_zero():
    made = estimator.gradient(
        fixed_plan(eggroll.LowRank(1)),
        estimator.pair_coefficients(eggroll.z_score(jnp.full((64,), 0.1))),
        noise_key=jax.random.key(0),
        noise_generation=0,
        sigma=0.1,
    )
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(made))


def test_sigma_multiplier_scales_the_perturbation_and_not_the_estimate():
    rules = eggroll.LowRank(1, sigma_multiplier=3.0)
    assert np.abs(z_scores(samples(linear, rules), C)).max() < Z_LIMIT
    expected = 3 * W["w"] ** 2 + (3 * 0.2) ** 2 * kurtosis_of_entry(rules)
    drawn = samples(cubic, rules, sigma=0.2, num_pairs=64)
    assert np.abs(z_scores(drawn, expected)).max() < Z_LIMIT


def test_paper_learning_rate():
    """One sgd step at the converted rate is lr sigma / sqrt(N) sum_i s_i f_i E_i."""
    assert eggroll.paper_learning_rate(2.0, sigma=0.1, population_size=100) == pytest.approx(2.0 * 0.01 * 10)


def test_small_parameters_draw_together_what_they_draw_alone(monkeypatch):
    params = {"a": jnp.ones((4, 3)), "b": jnp.ones(5), "c": jnp.ones((64, 40))}
    rules = [("b", eggroll.Dense("normal")), (".*", eggroll.LowRank(2))]
    plan = make_plan(
        lambda p: jnp.sum(jnp.ones(4) @ p["a"]) + p["b"].sum() + jnp.sum(jnp.ones(64) @ p["c"]), params, perturbation=rules
    )
    keys = draws.leaf_keys(plan.leaves, jax.random.key(3), 7)
    monkeypatch.setattr(pair_sums, "SHARED_BUDGET", 200)  # bytes: c has 6 pairs of 28
    together = pair_sums.draw_together(plan.leaves, keys, 6, 2)
    assert list(together) == [0, 1]
    for index, drawn in together.items():
        alone = jax.vmap(lambda pair, i=index: draws.draw([plan.leaves[i]], [keys[i]], pair)[0])(2 + jnp.arange(6))
        jax.tree.map(np.testing.assert_array_equal, drawn, alone)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_a_sum_with_one_entry_has_its_bits_in_any_program(shape):
    """In halves, as NumPy adds them: a product with one result would be ordered by what XLA fuses it with."""
    coefficients = jax.random.normal(jax.random.key(0), (37,))
    leaf = make_plan(lambda p: p["b"].sum(), {"b": jnp.zeros(shape)}, perturbation=eggroll.Dense()).leaves[0]
    drawn = jax.random.normal(jax.random.key(1), (37, *shape))
    terms = np.asarray(coefficients) * np.asarray(drawn).reshape(-1)
    while half := len(terms) // 2:
        terms = np.concatenate([terms[:half] + terms[half : 2 * half], terms[2 * half :]])
    weigh = functools.partial(pair_sums.weigh, leaf, drawn)
    fused = jax.jit(lambda c: jnp.stack([weigh(c), jnp.tanh(weigh(c)), 2 * weigh(jnp.square(c))]))
    assert weigh(coefficients).shape == shape and np.asarray(weigh(coefficients)).reshape(()) == terms[0]
    assert np.asarray(jax.jit(weigh)(coefficients)).reshape(()) == terms[0] != 0
    assert np.asarray(fused(coefficients))[0].reshape(()) == terms[0]
