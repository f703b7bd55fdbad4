"""Int8 parameters: the lazy perturbation is that of written-out sums, the update is NumPy's, alpha is the share that moves."""

import functools
import math
from statistics import NormalDist

import jax
import jax.extend.core as jexc
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import eggroll
from eggroll import zo
from eggroll.generation import update_parameters
from eggroll.noise import addresses, integer
from eggroll.noise.draws import draw_pair
from eggroll.update import estimator
from eggroll.update.shaping import integer_coefficients

PAIRS = 5
SPECS = {
    "normal-1": eggroll.Integer(),
    "normal-3": eggroll.Integer(3, shift=3),
    "normal-4": eggroll.Integer(4, shift=5),
    "rademacher-2": eggroll.Integer(2, "rademacher", shift=2),
    "rademacher-16": eggroll.Integer(16, "rademacher"),
}


def ints(*shape, seed=0, size=127):
    return jnp.asarray(np.random.default_rng(seed).integers(-size, size + 1, shape), jnp.int8)


def dot(x, w):
    return jax.lax.dot_general(x, w, (((x.ndim - 1,), (0,)), ((), ())), preferred_element_type=jnp.int32)


def strategy(fitness=None, spec=SPECS["normal-1"], **options):
    options = dict(population_size=2 * PAIRS, optimizer=eggroll.threshold(0.5), shaping="pair_sign") | options
    return eggroll.EvolutionStrategy(fitness, sigma=None, perturbation=spec, **options)


def start(es, params, **options):
    return es.init(params, key=jax.random.key(3), **options)


# The model's functions take the parameters and how they are used, so that the oracle runs the same function.


class Lazy:
    """Uses of parameters as a model writes them."""

    def matrix(self, x, w):
        return dot(x, w)

    def row(self, table, index):
        return jnp.take(table, index, axis=0)

    def vector(self, v):
        return v

    def layers(self, function, x, stacked):
        return jax.lax.scan(lambda x, w: (function(x, w), None), x, stacked)[0]


class WrittenOut:
    """The same with (w, E in units of products of factors) in place of w, in 64-bit NumPy integers and exact fractions."""

    def __init__(self, spec, sign):
        self.spec, self.sign = spec, sign

    def scaled(self, total, factors):
        """Nearest to total 2^-(shift - 4 + f factors) / sqrt(r) as `integer` rounds: once, or at 2^-15 first."""
        bits = self.spec.shift - 4 + factors * {"normal": 4, "rademacher": 0}[self.spec.distribution]
        total = np.asarray(total, np.int64)
        root = math.isqrt(self.spec.rank) if factors == 2 else 1
        if factors == 2 and root**2 != self.spec.rank:
            up = max(0, 15 - bits - 15)
            total = np.floor_divide((total << up) * round(2**15 / math.sqrt(self.spec.rank)) + 2**14, 2**15)
            bits += up
        elif root & (root - 1) == 0:
            bits += root.bit_length() - 1
        if bits <= 0:
            return total << -bits
        return np.sign(total) * ((np.abs(total) + (1 << bits >> 1)) >> bits)

    def matrix(self, x, w):
        x, base, noise = np.asarray(x, np.int64), np.asarray(w[0], np.int64), np.asarray(w[1], np.int64)
        return jnp.asarray(x @ base + self.scaled(self.sign * (x @ noise), 2), jnp.int32)

    def row(self, table, index):
        total = np.asarray(table[0], np.int64) + self.scaled(self.sign * np.asarray(table[1], np.int64), 2)
        return jnp.asarray(np.clip(total, -127, 127), jnp.int8)[index]

    def vector(self, v):
        total = np.asarray(v[0], np.int64) + self.scaled(self.sign * np.asarray(v[1], np.int64), 1)
        return jnp.asarray(np.clip(total, -127, 127), jnp.int8)

    def layers(self, function, x, stacked):
        for layer in zip(*stacked, strict=True):
            x = function(x, layer)
        return x


def rescaled(total):
    return jnp.clip(total >> 8, -127, 127).astype(jnp.int8)


PARAMS = {"b": ints(6, seed=2), "e": ints(9, 6, seed=3), "layers": ints(4, 6, 6, seed=4), "w": ints(6, 8, seed=5)}
BATCH = (ints(3, 6, seed=1), jnp.array([0, 8, 3], jnp.uint8))


def model(use, p, batch):
    """A product, stacked layers, a vector, a lookup, and its table tied as a head."""
    x, index = batch
    return {
        "product": use.matrix(x, p["w"]),
        "stacked": use.layers(lambda x, w: rescaled(use.matrix(x, w)), x, p["layers"]),
        "vector": use.vector(p["b"]).astype(jnp.int32) * x.astype(jnp.int32),
        "lookup": use.row(p["e"], index),
        "tied": use.matrix(x, transposed(p["e"])),
    }


def transposed(w):
    return tuple(part.T for part in w) if isinstance(w, tuple) else w.T


def drawn_noise(plan, state, pairs=PAIRS):
    return jax.jit(jax.vmap(lambda pair: draw_pair(plan, state.key, 0, pair)))(jnp.arange(pairs))


def built(planned, drawn):
    """E of one leaf for every pair, in units of products of factors."""
    if planned.role == "dense":
        return np.asarray(drawn, np.int64)
    left, right = (np.asarray(f, np.int64) for f in drawn.unpack(jnp.int8))
    matrix = np.einsum("...rm,...rn->...mn", left, right)
    order = [*planned.stack, *planned.rows, *planned.columns]
    return matrix.transpose([0, *(1 + order.index(axis) for axis in range(len(order)))])


SLOW_SPECS = [pytest.param(spec, marks=pytest.mark.slow) for spec in SPECS if spec != "normal-3"]


@pytest.mark.parametrize("spec", ["normal-3", *SLOW_SPECS])
def test_equals_the_written_out_sums_bit_for_bit(spec):
    es = strategy(spec=SPECS[spec])
    state, lazy = start(es, PARAMS), functools.partial(model, Lazy())
    plan = es.plan(state, BATCH, function=lazy)
    assert [leaf.role for leaf in plan.leaves] == ["dense", "low-rank", "low-rank", "low-rank"], plan.table()
    outputs = es.ask(state).apply(lazy, BATCH)
    drawn = drawn_noise(plan, state)
    for member in (0, 1, 2 * PAIRS - 1):
        pairs = zip(plan.leaves, jax.tree.leaves(PARAMS), drawn, strict=True)
        leaves = [(leaf, built(planned, own)[member // 2]) for planned, leaf, own in pairs]
        oracle = model(WrittenOut(SPECS[spec], 1 - 2 * (member % 2)), jax.tree.unflatten(plan.tree, leaves), BATCH)
        for name, expected in oracle.items():
            np.testing.assert_array_equal(outputs[name][member], expected, err_msg=name)
    assert all(np.any(value[0] != value[1]) for value in outputs.values())  # control: the perturbation is seen


@pytest.mark.parametrize("transpose", [False, True])
def test_both_orders_of_operands_and_wider_copies_are_the_same_product(transpose):
    def left(p, x):
        return jax.lax.dot_general(p["w"], x, (((0,), (1,)), ((), ())), preferred_element_type=jnp.int32).T

    def wide(p, x):
        return x.astype(jnp.int32) @ p["w"].astype(jnp.int32)

    params, x = {"w": ints(6, 8)}, ints(3, 6, seed=1)
    es = strategy(spec=eggroll.Integer(2))
    state = start(es, params)
    es.plan(state, x, function=lambda p, x: dot(x, p["w"]))
    expected = es.ask(state).apply(lambda p, x: dot(x, p["w"]), x)
    np.testing.assert_array_equal(es.ask(state).apply(left if transpose else wide, x), expected)


def test_perturbations_saturate():
    es = strategy(spec=eggroll.Integer(shift=0))
    params = {"b": jnp.full(200, 120, jnp.int8), "e": jnp.full((20, 20), -120, jnp.int8)}
    state = start(es, params)
    vector, rows = es.ask(state).apply(lambda p, i: (p["b"] + 0 * i.astype(jnp.int8), p["e"][i]), jnp.arange(20)[:1])
    assert int(vector.max()) == 127 and int(rows.min()) == -127


# Noise.


@pytest.mark.parametrize("distribution", addresses.DISTRIBUTIONS)
def test_factors_have_their_moments(distribution):
    n = 1 << 18
    words = addresses.draw_words(addresses.address_keys(addresses.leaf_keys(jax.random.key(0), 0, ["w"]), 0, [()]), [n])[0]
    drawn = integer.decode(words[: integer.words_needed(n, distribution)], n, distribution=distribution)
    assert drawn.dtype == jnp.int8 and drawn.shape == (n,)
    values = np.asarray(drawn, np.float64)
    table = integer.NORMAL_TABLE.astype(np.float64) if distribution == "normal" else np.array([-1.0, 1.0])
    for power in (1, 2, 4):
        error = np.std(table**power) / n**0.5
        assert abs((values**power).mean() - (table**power).mean()) <= 5 * error + 1e-12
    assert abs((values[1:] * values[:-1]).mean()) <= 5 * (table**2).mean() / n**0.5
    assert abs((values + 1).mean()) > 5 * values.std() / n**0.5  # control: a bias of one unit is seen


def test_the_table_is_a_rounded_normal_distribution():
    """What docs and docstrings say of it, exactly."""
    values = integer.NORMAL_TABLE.astype(np.float64)
    second = (values**2).mean()
    assert values.sum() == 0 and np.array_equal(values, -values[::-1]) and values.max() == 59
    assert round(second / 256, 4) == 0.9995 and round((values**4).mean() / second**2, 3) == 2.990


def perturbation_std(spec, role):
    """Standard deviation of what a member sees, over entries, in units where 1 is 1."""
    params = {"w": jnp.zeros((64, 512), jnp.int8)} if role == "low-rank" else {"w": jnp.zeros(4000, jnp.int8)}
    use = (lambda p, x: dot(x, p["w"])) if role == "low-rank" else (lambda p, x: p["w"] + 0 * x[0, 0])
    es = strategy(spec=spec, population_size=64)
    state = start(es, params)
    outputs = es.ask(state).apply(use, 16 * jnp.eye(64, dtype=jnp.int8))
    assert es.plan(state).leaves[0].role == role
    return float(np.asarray(outputs, np.float64).std()) / (256 if role == "low-rank" else 16)


@pytest.mark.parametrize(
    "spec",
    ["normal-1", *(pytest.param(spec, marks=pytest.mark.slow) for spec in ("normal-3", "rademacher-2"))],
)
def test_sigma_means_the_same_for_every_rank_and_distribution(spec):
    """Entries of one pair depend on r (64 + 512) factors: the error of the variance is that of so many products, at most."""
    spec = SPECS[spec]
    error = 5 * (3 / (32 * 64)) ** 0.5 * spec.rank**-0.5
    assert abs(perturbation_std(spec, "low-rank") * 2**spec.shift - 1) <= error / 2 + 0.01
    if spec == eggroll.Integer():  # an int8 vector moves in steps of one, so by the rounded table
        rounded = np.std(np.asarray(integer.shift_rounded(jnp.asarray(integer.NORMAL_TABLE, jnp.int32), 4), np.float64))
        assert abs(perturbation_std(spec, "dense") - rounded / 16) <= 5 * rounded / 16 / (2 * 32 * 4000) ** 0.5
        assert abs(rounded - 1) < 0.07


@pytest.mark.parametrize("total", [-2047, -24, -8, -7, 0, 7, 8, 9, 24, 100_001])
def test_rounding_mirrors_and_is_to_nearest(total):
    shifted = int(integer.shift_rounded(jnp.int32(total), 4))
    assert abs(shifted - total / 16) <= 0.5 and int(integer.shift_rounded(jnp.int32(-total), 4)) == -shifted


def test_square_roots_and_products_are_exact():
    values = np.array([0, 1, 2, 255, 256, 512, 10**6, 2**24 - 1, 2**24, 2**31 - 1], np.int64)
    fine = [math.isqrt(256 * v) if v < 2**24 else 16 * math.isqrt(v) for v in values.tolist()]
    assert integer.square_root(jnp.asarray(values, jnp.int32)).tolist() == fine
    x = np.random.default_rng(0).integers(-(2**30), 2**30, 1000)
    found = integer.multiply_shifted(jnp.asarray(x, jnp.int32), 23170, 15)
    np.testing.assert_array_equal(found, (x * 23170) >> 15)


# Update.


def numpy_sums(plan, state, coefficients):
    """Per leaf, the sum over the pairs and its standard deviation."""
    d = np.asarray(coefficients, np.int64)
    for planned, drawn in zip(plan.leaves, drawn_noise(plan, state, d.size), strict=True):
        spec, factors = planned.spec, 1 if planned.role == "dense" else 2
        table = integer.NORMAL_TABLE.astype(float) if spec.distribution == "normal" else np.ones(1)
        if spec.update == "sign":
            drawn, table = jax.tree.map(jnp.sign, drawn), np.sign(table)
        one = np.mean(table**2) ** (factors / 2) * (spec.rank if factors == 2 else 1) ** 0.5
        yield np.tensordot(d, built(planned, drawn), 1), one * np.sqrt(np.sum(d.astype(float) ** 2))


@pytest.mark.parametrize(
    ("spec", "shaping"),
    [
        (eggroll.Integer(), "pair_sign"),
        pytest.param(eggroll.Integer(3, update="sign"), "z_score", marks=pytest.mark.slow),
        pytest.param(eggroll.Integer(2, "rademacher"), "z_score", marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_update_equals_numpy(spec, shaping):
    def fitness(params, batch, key):
        return jnp.sum(dot(batch, params["w"]) >> 4, dtype=jnp.int32) + jnp.sum(params["b"], dtype=jnp.int32)

    params = {"b": jnp.full(6, 126, jnp.int8), "w": jnp.full((6, 8), -127, jnp.int8)}
    es = strategy(fitness, spec, population_size=128, shaping=shaping, optimizer=eggroll.threshold(0.3))
    state = start(es, params)
    after, metrics = es.step(state, ints(2, 6, seed=4))
    coefficients = np.asarray(metrics.coefficients)
    assert np.array_equal(coefficients, np.round(coefficients)) and np.any(coefficients)
    assert (np.abs(coefficients).max() == 1) == (shaping == "pair_sign")
    moved, sums = 0, numpy_sums(es.plan(state), state, coefficients)
    for (total, deviation), old, new in zip(sums, *map(jax.tree.leaves, (params, after.params)), strict=True):
        limit, old = -NormalDist().inv_cdf(0.15) * deviation, np.asarray(old, int)
        wanted = np.clip(old + np.sign(total) * (np.abs(total) > limit), -127, 127)
        clear = np.abs(np.abs(total) - limit) > 0.01 * limit  # T, roots and deviations have 8, 4 and 8 bits
        np.testing.assert_array_equal(np.asarray(new, int)[clear], wanted[clear])
        assert clear.mean() > 0.9
        moved += int((np.asarray(new) != old).sum())
    assert float(metrics.moved) == pytest.approx(moved / 54) and moved > 0


@pytest.mark.parametrize(
    ("spec", "shaping", "alpha"),
    [
        (eggroll.Integer(), "pair_sign", 0.5),
        pytest.param(eggroll.Integer(), "z_score", 0.1, marks=pytest.mark.slow),
        pytest.param(eggroll.Integer(2), "z_score", 0.5, marks=pytest.mark.slow),
        pytest.param(eggroll.Integer(4, "rademacher"), "pair_sign", 0.1, marks=pytest.mark.slow),
        pytest.param(eggroll.Integer(update="sign"), "pair_sign", 0.1, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_alpha_is_the_share_that_moves_when_fitness_is_noise(spec, shaping, alpha):
    """Mean share over independent generations, its error from the replicates.

    Beyond it: the sum of P r products of kurtosis k is normal up to (k - 3) (t^3 - 3 t) phi(t) / (12 P r) in this share
    (Edgeworth), and lies on a lattice of step 1 or 2 where signs are summed, which moves it by at most one step of density.
    """
    pairs, generations = 512, 24
    es = strategy(lambda p, b, k: jax.random.randint(k, (), 0, 1000), spec)  # for its plan only
    params = {"w": jnp.zeros((32, 32), jnp.int8)}
    plan = es.plan(start(es, params), ints(1, 32), function=lambda p, x: dot(x, p["w"]))
    optimizer = eggroll.threshold(alpha)

    @jax.jit
    def share(generation):
        key = jax.random.fold_in(jax.random.key(9), generation)
        fitness = jax.random.randint(key, (2 * pairs,), 0, 1000)
        d = integer_coefficients(shaping, fitness, largest_noise=plan.leaves[0].integer.largest)
        z = estimator.gradient(plan, d, noise_key=jax.random.key(1), noise_generation=generation, sigma=None)
        more = {"deviation": estimator.deviations(plan, d), "generation": generation}
        return jnp.mean(optimizer.update(z, optax.EmptyState(), params, **more)[0]["w"] != 0)

    shares = np.array([share(jnp.int32(g)) for g in range(generations)])
    t = -NormalDist().inv_cdf(alpha / 2)
    density = NormalDist().pdf(t)
    signs = spec.update == "sign" or spec.distribution == "rademacher"
    lattice = 2 * density * 2 / (pairs * spec.rank) ** 0.5 if signs else 0.0
    error = 4 * shares.std(ddof=1) / generations**0.5 + 6 * abs(t**3 - 3 * t) * density / (12 * pairs) + lattice + 0.002
    assert abs(shares.mean() - alpha) <= error
    assert abs(shares.mean() - 1.5 * alpha) > error  # control: a threshold for another alpha is seen


def test_steps_follow_a_linear_fitness():
    """Of weights that move, the share that moves uphill is far above one half; against random signs it is not."""
    slope = ints(16, 16, seed=7, size=3).astype(jnp.int32)

    def fitness(params, batch, key):
        return jnp.sum(dot(16 * jnp.eye(16, dtype=jnp.int8), params["w"]) * slope)

    es = strategy(fitness, population_size=2048, optimizer=eggroll.threshold(0.2))
    state, _ = es.step(start(es, {"w": jnp.zeros((16, 16), jnp.int8)}))
    step = np.asarray(state.params["w"], int)

    def z(slope):
        agree = (step * np.asarray(slope))[(step != 0) & (np.asarray(slope) != 0)] > 0
        return (agree.mean() - 0.5) * 2 * agree.size**0.5

    assert z(slope) > 5
    assert abs(z(np.random.default_rng(1).choice([-1, 1], slope.shape))) < 4  # control


@pytest.mark.parametrize("slope", [0, 1])
def test_equal_fitness_moves_nothing_and_weights_saturate(slope):
    def fitness(params, batch, key):
        return slope * dot(jnp.full((1, 4), 16, jnp.int8), params["w"]).sum(dtype=jnp.int32)

    es = strategy(fitness, optimizer=eggroll.threshold(1.0))
    params = {"w": jnp.full((4, 4), 127, jnp.int8)}
    state = start(es, params)
    for _ in range(3):
        state, metrics = es.step(state)
    assert int(state.params["w"].min()) >= 124 and int(state.params["w"].max()) == 127
    assert np.any(metrics.coefficients) == bool(slope) and same(state.params, params) == (not slope)


def test_alpha_follows_its_schedule():
    calls = []
    optimizer = eggroll.threshold(lambda step: calls.append(step) or 1 / (0.015 * step + 1), steps=300)
    assert calls == list(range(300))
    z = {"w": jnp.arange(-160, 161, dtype=jnp.int32)}
    params = {"w": jnp.zeros(321, jnp.int8)}
    for step in (0, 1, 66, 299, 10_000):
        more = {"deviation": {"w": jnp.int32(16 * 40)}, "generation": jnp.int32(step)}
        moved, _ = optimizer.update(z, optimizer.init(params), params, **more)
        least = -NormalDist().inv_cdf(1 / (0.015 * min(step, 299) + 1) / 2) * 40
        wanted = (np.abs(z["w"]) > least) & (np.abs(np.abs(z["w"]) - least) > 0.2) * (np.abs(z["w"]) > least)
        assert np.abs((np.asarray(moved["w"]) != 0).sum() - wanted.sum()) <= 2
        assert np.array_equal(np.sign(moved["w"]), -np.sign(z["w"]) * (np.asarray(moved["w"]) != 0))
    assert not optimizer.update({"w": z["w"] * 0}, optimizer.init(params), params, **more)[0]["w"].any()


@pytest.mark.parametrize("size", [1, 7, 1000, 2**29])
def test_z_score_coefficients(size):
    differences = np.random.default_rng(2).normal(size=4096) * size / 6
    fitness = np.stack([differences.round(), np.zeros(4096)], axis=1).reshape(-1).astype(np.int32)
    found = np.asarray(integer_coefficients("z_score", jnp.asarray(fitness), largest_noise=100))
    exact = fitness[0::2] / np.abs(fitness[0::2].astype(float)).mean()
    np.testing.assert_allclose(found / 16, np.clip(exact, -4, 4), atol=1 / 32 + 4 * 2.0**-11 * np.abs(exact).max())
    coarse = integer_coefficients("z_score", jnp.asarray(fitness), largest_noise=2**17)
    assert int(jnp.abs(coarse).max()) * 2**17 * 4096 < 2**31 and int(jnp.abs(coarse).max()) == 3


# No floating point, chunks, carried state, mesh and journal.


def recurrent(params, batch, key, memory):
    """A small recurrent model of int8: lookup, scan over layers, vector, head, integer score, carried memory."""
    x = jnp.take(params["emb"], batch[0], axis=0)

    def layer(x, weights):
        return rescaled(dot(x, weights) + (16 * x.astype(jnp.int32))), None

    x = jnp.clip(x.astype(jnp.int32) + memory.astype(jnp.int32), -127, 127).astype(jnp.int8)
    x = jax.lax.scan(layer, x, params["layers"])[0]
    logits = dot(x, params["emb"].T) >> 6
    score = logits[batch[1]] + jnp.sum(x.astype(jnp.int32) * params["scale"].astype(jnp.int32)) // 256
    return score, x


RECURRENT = {"emb": ints(11, 8, size=30), "layers": ints(2, 8, 8, seed=1, size=30), "scale": jnp.full(8, 16, jnp.int8)}
TOKENS = jnp.array([3, 7], jnp.uint8)


def run(spec=SPECS["normal-1"], *, count=2, **options):
    es = strategy(recurrent, spec, **dict(population_size=24) | options)
    state = start(es, RECURRENT, member_state=jnp.zeros(8, jnp.int8))
    group = options.get("members_per_batch")
    batch = jnp.tile(TOKENS, (24 // group, 1)) if group else TOKENS
    for _ in range(count):
        state, metrics = es.step(state, batch)
    return es, state, metrics


whole = functools.cache(run)


def dtypes(jaxpr):
    """Of every intermediate value, inside control flow and calls too."""
    for equation in jaxpr.eqns:
        yield from (v.aval.dtype for v in (*equation.invars, *equation.outvars))
        for value in jax.tree.leaves(equation.params, is_leaf=lambda v: isinstance(v, jexc.ClosedJaxpr | jexc.Jaxpr)):
            if isinstance(value, jexc.ClosedJaxpr | jexc.Jaxpr):
                yield from dtypes(getattr(value, "jaxpr", value))


def floats(function, *args):
    found = set(dtypes(jax.make_jaxpr(function)(*args).jaxpr))
    assert jnp.dtype(jnp.int8) in found or jnp.dtype(jnp.int32) in found
    return [dtype for dtype in found if jnp.issubdtype(dtype, jnp.floating)]


@pytest.mark.parametrize(("spec", "shaping"), [("normal-1", "pair_sign"), ("rademacher-2", "z_score")])
def test_no_floating_number_in_evaluation_noise_shaping_and_update(spec, shaping):
    es = strategy(recurrent, SPECS[spec], population_size=24, shaping=shaping, chunk_size=8)
    state = start(es, RECURRENT, member_state=jnp.zeros(8, jnp.int8))
    plan = es.plan(state, TOKENS)
    shape = functools.partial(integer_coefficients, shaping, largest_noise=3481)
    fitness = jnp.arange(24, dtype=jnp.int32)
    assert floats(es.evaluate, state, TOKENS) == []
    assert floats(lambda key, pair: draw_pair(plan, key, 0, pair), state.key, jnp.int32(0)) == []
    update = functools.partial(update_parameters, es, plan, optimizer=es.optimizer)
    assert floats(shape, fitness) == [] and floats(update, state, shape(fitness)) == []


def test_the_search_for_floating_numbers_finds_one():
    def hidden(x):
        return jax.lax.scan(lambda c, _: ((c.astype(jnp.float16) * 2).astype(jnp.int32), None), x, None, length=2)[0]

    assert floats(jax.jit(hidden), jnp.int32(3)) == [jnp.float16]


def same(one, other):
    return all(np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (one, other)), strict=True))


@pytest.mark.parametrize(
    "options",
    [
        dict(chunk_size=10, members_per_batch=4),
        pytest.param(dict(members_per_batch=1), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_chunks_and_batches_give_the_same_bits(options):
    (_, one, first), (_, other, second) = whole(), run(**options)
    assert same(one.params, other.params) and same(one.member_state, other.member_state)
    assert same(first.fitness, second.fitness) and np.any(first.fitness)


def test_state_is_int8_and_moves():
    es, state, metrics = whole()
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype(jnp.int8)}
    assert state.member_state.shape == (12, 2, 8) and state.member_state.dtype == jnp.int8
    assert 0.2 < float(metrics.moved) < 0.9 and metrics.fitness.dtype == jnp.int32
    assert [leaf.role for leaf in es.plan(state).leaves] == ["low-rank", "low-rank", "dense"]


def test_a_killed_run_goes_on_and_a_journal_replays_bit_for_bit(tmp_path):
    def make():
        es = strategy(lambda p, b, k: recurrent(p, b, k, jnp.zeros(8, jnp.int8))[0], population_size=24, shaping="z_score")
        state = start(es, RECURRENT)
        es.plan(state, TOKENS)
        return es, eggroll.DurableRun(tmp_path, es, state, config={}, checkpoint_every=100)

    es, durable = make()
    state, _ = eggroll.train(es, durable.state, TOKENS, generations=3, durable=durable)
    durable.close()
    es, durable = make()  # from the journal alone: no checkpoint was due
    assert int(durable.state.generation) == 3 and same(durable.state.params, state.params)
    durable.close()


def test_tell_takes_integers_and_some_pairs():
    es, state = planned(population_size=24)
    scores = np.random.default_rng(0).integers(-(2**29), 2**29, 24)
    copy = eggroll.copy_state
    after, metrics = es.tell(copy(state), scores)
    assert metrics.fitness.dtype == jnp.int32 and same(metrics.fitness, scores)
    assert same(es.replay(copy(state), metrics.coefficients).params, after.params) and not same(after.params, state.params)
    _, metrics = es.tell(copy(state), scores[:8], pairs=[7, 1, 2, 3])
    assert np.flatnonzero(metrics.coefficients).tolist() == [1, 2, 3, 7] and np.abs(metrics.coefficients).max() == 1
    nothing, metrics = es.tell(copy(state), [math.nan] * 24)
    assert same(nothing.params, state.params) and metrics.invalid == 24


# Bad input.


def planned(spec=SPECS["normal-1"], params=None, function=None, batch=None, **options):
    es = strategy(spec=spec, **options)
    params = {"w": ints(6, 8)} if params is None else params
    state = start(es, params)
    es.plan(state, ints(3, 6) if batch is None else batch, function=function or (lambda p, x: dot(x, p["w"])))
    return es, state


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: planned(eggroll.Integer(2.0)), ValueError, "rank must be an integer >= 1, got 2.0"),
        (lambda: planned(eggroll.Integer(shift=20)), ValueError, "shift must be an integer from 0 to 16 for normal factors"),
        (lambda: planned(eggroll.Integer(1, "rademacher", shift=5)), ValueError, "from 0 to 4 for rademacher factors, got 5"),
        (lambda: planned(eggroll.Integer(update="mean")), ValueError, "update must be 'value' or 'sign', got 'mean'"),
        (lambda: planned(eggroll.Integer(1, "uniform")), ValueError, "distribution must be one of normal, rademacher"),
        (lambda: planned(params={"w": jnp.ones((6, 8))}), ValueError, "'w' has dtype float32; Integer.. is for int8"),
        (
            lambda: strategy(spec=[("w", eggroll.Integer()), (".*", eggroll.LowRank())]),
            ValueError,
            "perturbation mixes Integer.. with LowRank.. or Dense",
        ),
        (
            lambda: eggroll.EvolutionStrategy(
                None, population_size=4, sigma=0.1, optimizer=eggroll.threshold(0.5), perturbation=eggroll.Integer()
            ),
            ValueError,
            "sigma must be None for int8 parameters, whose Integer.shift=.... sets it, got 0.1",
        ),
        (lambda: strategy(shaping="centered_ranks"), ValueError, "shaping must be one of pair_sign, z_score for int8"),
        (
            lambda: planned(eggroll.Integer(2), {"w": ints(3000, 8)}, batch=ints(1, 3000)),
            ValueError,
            "'w' contracts 3000 values with noise of rank 2, which could overflow int32: width times rank must be at most 4857",
        ),
        (
            lambda: planned(population_size=2_000_000),
            ValueError,
            "population_size 2000000 could overflow the int32 sums over pairs, each up to 3481: it must be at most 1233830",
        ),
        (
            lambda: planned(function=lambda p, x: x @ p["w"]),
            ValueError,
            "int8 parameter 'w' is used in a product of dtype int8; give the product preferred_element_type=jnp.int32",
        ),
        (
            lambda: (lambda es, state: es.tell(state, list(range(10))))(*planned(optimizer=optax.identity())),
            TypeError,
            "optimizer must be eggroll.threshold.* for int8 parameters, got steps of dtype int32",
        ),
        (lambda: planned()[0].ask(planned()[1]).member(0), ValueError, "int8 parameter 'w' of one member cannot be built"),
        (
            lambda: (lambda es, state: es.tell(state, [0.5] * 10))(*planned(shaping="z_score")),
            TypeError,
            "shaping 'z_score' of int8 parameters needs an int32 fitness, got float32",
        ),
        (lambda: eggroll.threshold(0.1, steps=5), ValueError, "steps has no effect on a constant alpha, got 5"),
        (lambda: eggroll.threshold(0.0), ValueError, "alpha must be in .0, 1., got 0.0"),
        (lambda: eggroll.threshold(1.5), ValueError, "alpha must be in .0, 1., got 1.5"),
        (lambda: eggroll.threshold(lambda step: 1 - step, steps=5), ValueError, "got 0 for generation 1"),
        (lambda: eggroll.threshold(lambda step: 0.5, steps=0), ValueError, "steps must be an integer >= 1, got 0"),
        (
            lambda: zo.mezo(lambda p, b, k: 0.0, learning_rate=1.0, perturbation=eggroll.Integer()),
            ValueError,
            "perturbation Integer.. is of eggroll.EvolutionStrategy",
        ),
    ],
)
def test_wrong_use_is_refused_by_a_clear_error(call, error, message):
    with pytest.raises(error, match=message):
        call()
