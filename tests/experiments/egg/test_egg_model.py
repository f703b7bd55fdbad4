"""The integer model: parity with the paper's rule in NumPy, rounding, saturation, any width, no floating point; its loss."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eggroll.experiments.egg.models import egg, integer_loss, sampling
from eggroll.experiments.egg.models.fixed_point import MAX_FAN_IN, product, rescale, saturating_sum, shift_right
from eggroll.experiments.egg.models.integer_loss import UNITS_PER_BIT, log_likelihood

SMALL = egg.Config(layers=2, width=16)
sequence = functools.partial(jax.jit, static_argnames="config")(egg.sequence)
step = functools.partial(jax.jit, static_argnames="config")(egg.step)


def zeros(config):
    shapes = jax.eval_shape(lambda key: egg.init(config, key=key), jax.random.key(0))
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)


def random_params(config):
    """Parameters as after some training: norms and biases are not at their initial values."""
    generator, one = np.random.default_rng(0), {"ln1": 16, "ln2": 16, "ln_out": 16}

    def draw(path, leaf):
        values = one.get(path[-1].key, 0) + 16 * generator.standard_normal(leaf.shape)
        return np.clip(np.round(values), -127, 127).astype(np.int8)

    return jax.tree_util.tree_map_with_path(draw, zeros(config))


def text_with_separators(length):
    text = np.random.default_rng(0).integers(0, 256, length).astype(np.uint8)
    text[[0, length // 2]] = 0
    return text


class Oracle:
    """The model in int64, from its description. Under "floor" it is the paper's, for widths that are powers of four."""

    def __init__(self, params, rounding):
        self.p = jax.tree.map(lambda leaf: np.asarray(leaf).astype(np.int64), params)
        self.floor = rounding == "floor"

    @staticmethod
    def clip(x):
        return np.clip(x, -127, 127)

    def shift(self, x):
        return x >> 8 if self.floor else (x + 128) >> 8

    def mm(self, x, w):
        if self.floor:
            return self.clip(w.T @ x // (16 * int(np.sqrt(len(x)))))
        reciprocal = round(2**23 / (16 * np.sqrt(len(x))))
        return self.clip((w.T @ x * reciprocal + 2**22) >> 23)

    def norm(self, x, w):
        total = np.abs(x).sum()
        if self.floor:
            return self.clip(x * w // max(total // len(x), 1))  # the paper's code divides by 0 where this divides by 1
        total = max(total, len(x))
        return self.clip((x * w * ((len(x) * 2**16 + total // 2) // total) + 2**15) >> 16)

    def step(self, state, byte):
        state = np.zeros_like(state) if byte == 0 else state.copy()
        x = self.p["embedding"][byte]
        for i in range(len(state)):
            w = {name: leaf[i] for name, leaf in self.p["layers"].items()}
            u, s = self.norm(x, w["ln1"]), state[i]
            f = self.clip(self.mm(u, w["Wf"]) + self.mm(s, w["Uf"]) + w["bf"])
            g = self.shift((f + 127) * s)
            c = self.clip(self.mm(u, w["Wh"]) + self.mm(g, w["Uh"]) + w["bh"])
            change = self.shift((f + 127) * (c - s)).astype(np.int8).astype(np.int64)  # wraps, and so does the sum
            state[i] = (s + change).astype(np.int8)
            x = self.clip(x + state[i])
            x = self.clip(x + self.mm(self.mm(self.norm(x, w["ln2"]), w["W1"]), w["W2"]))
        return self.mm(self.norm(x, self.p["ln_out"]), self.p["head"]), state


def paper_log_likelihood(logits, target):
    """In units of 1/16 bit."""
    y = logits.astype(np.int64) + 128
    total = (16 * 2.0 ** (np.arange(256) / 16)).astype(np.int32)[y].sum()
    return y[target] - int(16 * np.log2(total / 16))


@pytest.mark.parametrize(
    ("layers", "width", "rounding"),
    [(2, 16, "floor"), (2, 64, "floor"), (2, 16, "nearest"), (3, 24, "nearest"), (1, 1, "nearest")],
)
def test_arithmetic_is_the_description(layers, width, rounding):
    config = egg.Config(layers, width, rounding)
    params = random_params(config)
    oracle, text = Oracle(params, rounding), text_with_separators(30)
    state = np.random.default_rng(1).integers(-127, 128, (layers, width)).astype(np.int8)
    expected_state, different = state.astype(np.int64), False
    other = Oracle(params, {"floor": "nearest", "nearest": "floor"}[rounding])
    for byte in text[1:]:
        logits, new = step(params, state, byte, config)
        assert logits.dtype == new.dtype == jnp.int8 and logits.shape == (256,)
        different |= np.any(other.step(expected_state, byte)[0] != np.asarray(logits))
        expected, expected_state = oracle.step(expected_state, byte)
        np.testing.assert_array_equal(logits, expected)
        np.testing.assert_array_equal(new, expected_state)
        state = new
    assert different  # the comparison tells the rules apart


def test_scores_are_the_papers():
    config = egg.Config(2, 16, "floor")
    params, text = random_params(config), text_with_separators(41)
    oracle, state, scores = Oracle(params, "floor"), np.zeros((2, 16), np.int64), []
    for position in range(40):
        logits, state = oracle.step(state, text[position])
        scores.append(paper_log_likelihood(logits, text[position + 1]))
    ours, got = sequence(params, egg.init_state(config), text, config)
    np.testing.assert_array_equal(got, scores)
    np.testing.assert_array_equal(ours, state)


def test_state_is_carried_and_reset():
    params, text = random_params(SMALL), text_with_separators(51)  # separators at 0 and 25
    state, scores = egg.init_state(SMALL), []
    for start in range(0, 50, 10):
        state, some = sequence(params, state, text[start : start + 11], SMALL)
        scores.append(np.asarray(some))
    whole_state, whole = sequence(params, egg.init_state(SMALL), text, SMALL)
    np.testing.assert_array_equal(whole, np.concatenate(scores))
    np.testing.assert_array_equal(whole_state, state)
    _, elsewhere = sequence(params, np.full((2, 16), 50, np.int8), text[20:31], SMALL)
    assert np.any(np.asarray(elsewhere)[:5] != scores[2][:5])
    np.testing.assert_array_equal(elsewhere[5:], scores[2][5:])


def test_layers_are_stacked():
    params = random_params(SMALL)
    assert {leaf.shape[0] for leaf in jax.tree.leaves(params["layers"])} == {2}
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.int8)}
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 513 * 16 + 2 * (4 * 16 + 12 * 16**2)
    swapped = params | {"layers": jax.tree.map(lambda leaf: np.asarray(leaf)[::-1], params["layers"])}
    state = np.arange(32, dtype=np.int8).reshape(2, 16)
    logits, _ = step(params, state, np.uint8(1), SMALL)
    assert np.any(np.asarray(logits) != step(swapped, state[::-1], np.uint8(1), SMALL)[0])


def test_initial_values():
    params = egg.init(egg.Config(2, 64), key=jax.random.key(0))
    matrices = [params["embedding"], params["head"], *(params["layers"][name] for name in ("Wf", "Uf", "Wh", "Uh", "W1", "W2"))]
    for matrix in matrices:
        values = np.asarray(matrix, float)
        assert abs(values.mean()) < 5 * 16 / np.sqrt(values.size)
        assert abs(values.std() - 16) < 5 * 16 / np.sqrt(2 * values.size) + 0.01  # rounding adds 1/12 to the variance of 256
    assert np.all(np.asarray(params["layers"]["ln1"]) == 16) and not np.any(params["layers"]["bf"])


def dtypes_of(jaxpr):
    """Dtypes of everything that a program computes or holds, inner programs included."""
    for variable in (*jaxpr.invars, *jaxpr.constvars):
        yield variable.aval.dtype
    for equation in jaxpr.eqns:
        for variable in (*equation.invars, *equation.outvars):
            yield variable.aval.dtype
        for inner in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
        ):
            if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                yield from dtypes_of(inner if hasattr(inner, "eqns") else inner.jaxpr)


@pytest.mark.parametrize("rounding", ["nearest", "floor"])
def test_no_floating_point(rounding):
    config = egg.Config(layers=2, width=24, rounding=rounding)
    params, state, text = zeros(config), egg.init_state(config), np.zeros(5, np.uint8)
    population = jax.vmap(lambda state, text: egg.sequence(params, state, text, config), (0, None))
    programs = [
        jax.make_jaxpr(lambda *xs: egg.step(*xs, config))(params, state, text[0]),
        jax.make_jaxpr(lambda *xs: egg.sequence(*xs, config))(params, state, text),
        jax.make_jaxpr(lambda *xs: log_likelihood(*xs, rounding=rounding))(jnp.zeros(256, jnp.int8), np.uint8(3)),
        jax.make_jaxpr(population)(jnp.stack([state] * 3), text),
    ]
    for program in programs:
        dtypes = set(dtypes_of(program.jaxpr))
        assert dtypes and not any(jnp.issubdtype(dtype, jnp.inexact) for dtype in dtypes), dtypes


def test_the_search_for_floats_finds_one_inside_a_scan():
    def hidden(x):
        return jax.lax.scan(lambda c, v: (c + (v.astype(jnp.float32) / 2).astype(jnp.int32), None), jnp.int32(0), x)[0]

    assert jnp.dtype(jnp.float32) in set(dtypes_of(jax.make_jaxpr(jax.jit(hidden))(jnp.arange(3)).jaxpr))


@pytest.mark.parametrize("fan_in", [64, 24])
def test_nearest_rounding_is_unbiased_and_floor_is_not(fan_in):
    scale = 16 * np.sqrt(fan_in)
    generator = np.random.default_rng(0)
    totals = np.round(16 * scale * generator.standard_normal(40_000)).astype(np.int32)
    totals = totals[np.abs(totals) < 126 * scale]
    spread = 1 / np.sqrt(12 * len(totals))  # of the mean of that many uniform rounding errors
    errors = {}
    for rounding in ("nearest", "floor"):
        errors[rounding] = np.asarray(rescale(totals, fan_in, rounding=rounding), float) - totals / scale
    tie = 0.5 / scale  # ties go up
    assert abs(errors["nearest"].mean() - tie) < 5 * spread + 127 * scale / 2**24
    assert np.abs(errors["nearest"]).max() <= 0.5 + 127 * scale / 2**24
    assert abs(errors["floor"].mean() + 0.5 - tie) < 5 * spread + 127 * scale / 2**24
    assert not abs(errors["floor"].mean() - tie) < 5 * spread + 127 * scale / 2**24


@pytest.mark.parametrize("fan_in", [1, 16, 24, 200, 1000, 16384, MAX_FAN_IN])
@pytest.mark.parametrize("rounding", ["nearest", "floor"])
def test_rescaling_divides_and_saturates(fan_in, rounding):
    scale = 16 * np.sqrt(fan_in)
    edge = int(127 * scale)
    near = np.arange(-edge - 700, edge + 701, max(1, edge // 5000))
    totals = np.concatenate([near, [-(2**31), 2**31 - 1, 127 * 127 * fan_in, -127 * 127 * fan_in]]).astype(np.int32)
    got = np.asarray(rescale(totals, fan_in, rounding=rounding), float)
    quotient = np.clip(totals / scale, -127, 127)
    off = 127 * scale / 2**24 if np.log2(fan_in) % 2 else 1e-9  # 1e-9 for exact division
    low, high = (-0.5, 0.5) if rounding == "nearest" else (-1, 0)
    assert np.all(got - quotient >= low - off) and np.all(got - quotient <= high + off)
    assert got.max() == 127 and got.min() == -127
    if rounding == "floor" and fan_in in (16, 16384):
        np.testing.assert_array_equal(got, np.clip(totals.astype(np.int64) // int(scale), -127, 127))


def test_sums_saturate_and_products_are_exact():
    full = jnp.full((4,), 127, jnp.int8)
    np.testing.assert_array_equal(saturating_sum(full, full, full), [127] * 4)
    np.testing.assert_array_equal(saturating_sum(-full, -full, jnp.ones_like(full)), [-127] * 4)
    np.testing.assert_array_equal(saturating_sum(full, -full, jnp.full_like(full, 3)), [3] * 4)
    n = MAX_FAN_IN
    assert int(product(jnp.full(n, 127, jnp.int8), jnp.full((n, 1), -127, jnp.int8))[0]) == -n * 127**2 >= -(2**31)
    np.testing.assert_array_equal(shift_right(np.array([-6, -5, 5, 6], np.int32), 2, rounding="nearest"), [-1, -1, 1, 2])
    np.testing.assert_array_equal(shift_right(np.array([-6, -5, 5, 6], np.int32), 2, rounding="floor"), [-2, -2, 1, 1])


@pytest.mark.parametrize("weight", [16, 127])
def test_norm_divides_by_the_mean(weight):
    generator = np.random.default_rng(0)
    for width in (1, 24, 64):
        for size in (1, 5, 40, 127):
            x = generator.integers(-size, size + 1, width).astype(np.int8)
            got = np.asarray(egg._norm(jnp.asarray(x), jnp.full(width, weight, jnp.int8), "nearest"), float)
            exact = np.clip(x * float(weight) / max(np.abs(x.astype(float)).mean(), 1), -127, 127)
            assert np.abs(got - exact).max() <= 0.5 + 0.124


def logits_of_every_kind():
    generator = np.random.default_rng(0)
    for spread in (1, 16, 60, 127):
        yield from np.clip(np.round(spread * generator.standard_normal((50, 256))), -127, 127)
    for level in (-127, 0, 127):
        yield np.full(256, level)
    for peak in (-126, 0, 127):
        yield np.where(np.arange(256) == 7, peak, -127)
        yield np.where(np.arange(256) == 7, -127, peak)


def test_log_likelihood_against_float64():
    logits = np.stack(list(logits_of_every_kind()))
    targets = np.arange(len(logits)) % 256
    targets[-6:] = 7
    y = logits / 16
    exact = y[np.arange(len(y)), targets] - np.log2((2.0**y).sum(1))
    score = jax.jit(jax.vmap(log_likelihood))
    got = np.asarray(score(jnp.asarray(logits, jnp.int8), jnp.asarray(targets, jnp.uint8)))
    assert got.dtype == np.int32
    assert np.abs(got / UNITS_PER_BIT["nearest"] - exact).max() <= 0.0024
    paper_score = jax.jit(jax.vmap(functools.partial(log_likelihood, rounding="floor")))
    paper = paper_score(jnp.asarray(logits, jnp.int8), jnp.asarray(targets, jnp.uint8))
    expected = [paper_log_likelihood(y, t) for y, t in zip(logits.astype(np.int64), targets, strict=True)]
    np.testing.assert_array_equal(paper, expected)


def test_logarithms_at_the_edges_of_their_tables():
    totals = np.concatenate(
        [2 ** np.arange(22, 31), 2 ** np.arange(23, 31) - 1, np.random.default_rng(0).integers(2**22, 2**30, 9999)]
    )
    got = np.asarray(integer_loss._log2(jnp.asarray(totals, jnp.int32))) / 256
    assert np.abs(got - np.log2(totals)).max() <= 0.5 / 256 + 0.00036
    sums = np.concatenate([np.arange(1, 5000), totals]).astype(np.int32)
    floored = integer_loss._floor_log2_sixteenths(jnp.asarray(sums))
    np.testing.assert_array_equal(floored, np.floor(16 * np.log2(sums.astype(float))))


def test_tables_fit_64_kib():
    tables = [value for value in vars(integer_loss).values() if isinstance(value, np.ndarray)]
    assert len(tables) == 4 and sum(table.nbytes for table in tables) <= 64 * 1024
    program = jax.make_jaxpr(lambda *xs: egg.sequence(*xs, SMALL))(zeros(SMALL), egg.init_state(SMALL), np.zeros(3, np.uint8))
    assert sum(np.asarray(constant).nbytes for constant in program.consts) <= 64 * 1024


def test_samples():
    params = random_params(SMALL)
    greedy = sampling.sample(params, SMALL, b"ab", length=12, temperature=0)
    assert len(greedy) == 12 and greedy == sampling.sample(params, SMALL, b"ab", length=12, temperature=0, seed=5)
    drawn = [sampling.sample(params, SMALL, b"ab", length=12, seed=seed) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    state = egg.init_state(SMALL)
    for byte in b"\0ab":
        logits, state = step(params, state, np.uint8(byte), SMALL)
    assert greedy[0] == int(np.argmax(logits))
    with pytest.raises(ValueError, match="temperature must be >= 0, got -1"):
        sampling.sample(params, SMALL, b"", length=1, temperature=-1)
    with pytest.raises(ValueError, match="length must be >= 0, got -2"):
        sampling.sample(params, SMALL, b"", length=-2)


def test_draws_follow_the_probabilities():
    logits, generator = np.array([16.0, 0.0, -127.0]), np.random.default_rng(0)
    drawn = np.bincount([sampling._draw(logits, 1.0, generator) for _ in range(3000)], minlength=3) / 3000
    assert abs(drawn[0] - 2 / 3) < 5 * np.sqrt(2 / 9 / 3000)  # one bit likelier


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": 0}, "layers must be an integer >= 1, got 0"),
        ({"width": 0}, "width must be an integer from 1 to 32704, where int32 sums still fit, got 0"),
        ({"width": 32705}, "width must be an integer from 1 to 32704"),
        ({"width": 16.0}, "width must be an integer"),
        ({"rounding": "up"}, "rounding must be one of nearest, floor, got 'up'"),
    ],
)
def test_bad_configs(options, message):
    with pytest.raises(ValueError, match=message):
        egg.Config(**({"layers": 1, "width": 16} | options))
    egg.Config(1, egg.MAX_WIDTH)
    assert (egg.MAX_WIDTH << 16) + 127 * egg.MAX_WIDTH // 2 < 2**31 and egg.MAX_WIDTH * egg.EXPANSION <= MAX_FAN_IN


def test_bad_texts():
    params, state = zeros(SMALL), egg.init_state(SMALL)
    with pytest.raises(ValueError, match="text must have from 2 to 350001 bytes, so that log-likelihoods sum in int32, got 1"):
        egg.sequence(params, state, np.zeros(1, np.uint8), SMALL)
    with pytest.raises(ValueError, match="got 350002"):
        egg.sequence(params, state, np.zeros(350_002, np.uint8), SMALL)
    assert integer_loss.MAX_TOKENS * (254 * 16 + 8 * 256 + 2) < 2**31
