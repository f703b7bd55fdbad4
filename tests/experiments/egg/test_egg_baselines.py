"""What EGG is compared with: its own formulas in real numbers, backprop on them and on a transformer, populations."""

import contextlib
import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from eggroll.experiments.egg import baseline, baseline_suite
from eggroll.experiments.egg.models import byte_models, egg, float_egg
from tests.tables import by_default

pytestmark = pytest.mark.usefixtures("standard_promotion")  # of optax.adam

SMALL = ["--layers", "1", "--width", "16", "--streams", "4", "--bytes-per-update", "6"]
SMALL += ["--updates", "4", "--validation-every", "2", "--learning-rates", "0.03"]
CONFIG = egg.Config(layers=1, width=8)
TEXT = np.frombuffer(b"the quick brown fox jumps\n" * 8, np.uint8)


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Options that name a small corpus."""
    folder = tmp_path_factory.mktemp("corpus")
    for index in range(6):
        (folder / f"{index}.txt").write_bytes(b"the quick brown fox %d\n" % index * 30)
    return ["--data", str(folder), "--cache", str(folder.parent / "cache")]


class Bounded:
    """Real numbers and how far the integer model may be from them, each a float64 array."""

    def __init__(self, value, error=0.0):
        self.value = np.asarray(value, np.float64)
        self.error = np.broadcast_to(np.asarray(error, np.float64), self.value.shape)

    def rounded(self, last_bits=0.5):
        """Saturated, which brings nothing further apart, and rounded to sixteenths with so many last bits of error."""
        return Bounded(np.clip(self.value, -127 / 16, 127 / 16), self.error + last_bits / 16)

    def saturated(self):
        return self.rounded(0)

    def __add__(self, other):
        return Bounded(self.value + other.value, self.error + other.error)

    def __sub__(self, other):
        return Bounded(self.value - other.value, self.error + other.error)

    def __mul__(self, other):
        cross = np.abs(self.value) * other.error + np.abs(other.value) * self.error
        return Bounded(self.value * other.value, cross + self.error * other.error)

    def times(self, weights):
        """Product with known weights; the integer model's reciprocal adds at most 0.002 of a last bit at this fan-in."""
        root = np.sqrt(len(weights))
        return Bounded(self.value @ weights / root, self.error @ np.abs(weights) / root).rounded(0.502)

    def normed(self):
        """Divided by the mean of absolute values; the reciprocal of the integer model adds 0.124 of a last bit."""
        mean, error = np.abs(self.value).mean(), self.error.mean()
        low, mean = max(mean - error, 1 / 16), max(mean, 1 / 16)
        inverse = Bounded(1 / mean, 1 / low - 1 / mean)  # the larger side
        return (self * Bounded(np.full_like(self.value, inverse.value), inverse.error)).rounded(0.624)


def bounded_step(weights, h, byte, *, offset):
    """Logits and state of the model of docs/integer.md after a byte; norms' weights are 1."""
    x, own = Bounded(weights["embedding"][byte]), {name: value[0] for name, value in weights["layers"].items()}
    u = x.normed()
    f = (u.times(own["Wf"]) + h.times(own["Uf"]) + Bounded(own["bf"])).saturated()
    gate = (f + Bounded(np.full_like(f.value, offset))) * Bounded(np.full_like(f.value, 1 / 16))
    c = (u.times(own["Wh"]) + (gate * h).rounded().times(own["Uh"]) + Bounded(own["bh"])).saturated()
    h = h + (gate * (c - h)).rounded()
    x = (x + h).saturated()
    x = (x + x.normed().times(own["W1"]).times(own["W2"])).saturated()
    return x.normed().times(weights["head"]), h


@pytest.mark.slow
def test_real_numbers_are_those_of_the_integers_up_to_rounding():
    """Logits and states are those of float64, and the integers' state is as near as its roundings allow.

    Each moves what follows by at most the change that the operations can make of it. A gate without its offset is too far.
    """
    integers = egg.init(CONFIG, key=jax.random.key(0))
    params = float_egg.from_integers(integers)
    weights = jax.tree.map(lambda value: np.asarray(value, np.float64), params)
    state, real, h = egg.init_state(CONFIG), float_egg.init_state(CONFIG), Bounded(np.zeros(CONFIG.width))
    integer_step, real_step = jax.jit(egg.step, static_argnums=3), jax.jit(float_egg.step)
    for number, byte in enumerate(TEXT[:3]):
        _, state = integer_step(integers, state, byte, CONFIG)
        logits, real = real_step(params, real, byte)
        (expected, h), (_, wrong) = (bounded_step(weights, h, byte, offset=offset) for offset in (127 / 16, 0))
        np.testing.assert_allclose(logits, expected.value, atol=2e-5)
        np.testing.assert_allclose(real[0], h.value, atol=2e-5)
        assert np.all(np.abs(np.asarray(state[0]) / 16 - h.value) <= h.error)
        if number == 0:
            assert h.error.max() < 0.25 and np.any(np.abs(np.asarray(state[0]) / 16 - wrong.value) > wrong.error)


def test_byte_zero_forgets_the_state():
    params, read = float_egg.init(CONFIG, key=jax.random.key(0)), jax.jit(float_egg.sequence)
    fresh, used = float_egg.init_state(CONFIG), jnp.ones((1, 8))
    for text, same in (([0, 7, 9], True), ([1, 7, 9], False)):
        known = [read(params, state, jnp.array(text, jnp.uint8))[1] for state in (fresh, used)]
        assert np.array_equal(*known) is same


def small_transformer(window):
    return byte_models.transformer(byte_models.transformer_config(layers=1, width=16), window=window)


def test_a_transformer_sees_its_window_and_no_byte_ahead():
    """Seven bytes are scored; the last window is filled up."""
    params = small_transformer(4).init(jax.random.key(0))
    scores = {window: jax.jit(small_transformer(window).sequence) for window in (4, 8)}
    text = np.stack([TEXT[:8]] * 3)
    text[1, 0], text[2, 6] = 90, 90
    known = {window: [np.asarray(score(params, (), own)[1]) for own in text] for window, score in scores.items()}
    for window, (plain, first, sixth) in known.items():
        assert plain.shape == (7,)
        assert np.array_equal(plain[:5], sixth[:5]) and np.all(plain[5:] != sixth[5:])  # byte 6 is scored, then read
        assert np.array_equal(plain[4:], first[4:]) is (window == 4) and np.all(plain[:4] != first[:4])
    np.testing.assert_allclose(known[4][0][:4], known[8][0][:4], atol=1e-5)


@pytest.mark.parametrize("name", by_default(["egg", "transformer"], "egg"))
def test_backprop_lowers_the_loss_and_carries_the_state(name):
    model = byte_models.recurrent(CONFIG) if name == "egg" else small_transformer(12)
    learner = baseline.backprop(model, optax.adam(0.03), streams=2)
    run, losses, pieces = learner.start(jax.random.key(0)), [], np.stack([TEXT[:13], TEXT[13:26]])
    for _ in range(8):
        run, bits = learner.update(run, pieces)
        losses.append(bits)
    assert losses[-1] < losses[0] - 0.5
    assert all(np.any(leaf) for leaf in jax.tree.leaves(run[2]))


def test_bits_per_byte_are_the_mean_over_the_streams():
    model = byte_models.recurrent(CONFIG)
    params, text = model.init(jax.random.key(0)), TEXT[:200].reshape(5, 40)
    known = jax.jit(jax.vmap(model.sequence, (None, None, 0)))(params, model.state, text)[1]
    assert baseline.bits_per_byte(model, text)(params) == pytest.approx(-float(jnp.mean(known)), rel=1e-5)


def baselines(*arguments):
    """Summary of a run with these options, and what else it printed."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        baseline_suite.main(arguments)
    *said, last = out.getvalue().splitlines()
    return json.loads(last), said


@pytest.mark.parametrize("names", [["transformer-sgd"], pytest.param(list(baseline_suite.RATES), marks=pytest.mark.slow)])
def test_command_line_from_options_to_artefacts(names, texts, tmp_path):
    population = ["--population-size", "16"] if "egg-eggroll" in names else []
    summary, said = baselines(*SMALL, *population, *texts, "--baselines", *names, "--folder", str(tmp_path))
    assert list(summary["baselines"]) == names and summary["bytes_per_update"] == 24
    assert len(said) == len(names) and f"{names[0]}, step size 0.03" in said[0]
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 4 * len(names)
    assert [line["update"] for line in lines if "validation_bits" in line] == [2, 4] * len(names)
    for name, row in summary["baselines"].items():
        checked = [line["validation_bits"] for line in lines if line["baseline"] == name and line["update"] == 4]
        assert row["validation_bits"] == row["tried"]["0.03"] == checked[0] and 0 < checked[0] < 24
    first = {line["baseline"]: line["training_bits"] for line in lines if line["update"] == 1}
    assert first.get("transformer-adam", first["transformer-sgd"]) == first["transformer-sgd"]  # same start, same text
    assert (tmp_path / "bits_per_byte.png").exists()
    assert json.loads((tmp_path / "results.json").read_text())["options"]["streams"] == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--seed", "-1"], "seed must be an integer from 0 to 4294967295, got -1."),
        (["--updates", "0"], "updates must be an integer >= 1, got 0."),
        (["--width", "24"], "width must be a multiple of 16 for a transformer, got 24."),
        (["--bytes-per-update", "0"], "bytes_per_update must be from 1 to 350000, got 0."),
        (["--population-size", "12"], "population_size must be a multiple of twice the streams, got 12 and 4."),
        (["--learning-rates", "0"], r"learning_rates must be finite numbers > 0, got \(0.0,\)."),
        (["--baselines"], "baselines must name at least one baseline."),
        (["--sigma", "-1"], "sigma must be"),
        (["--data", "nowhere"], "the path nowhere of the corpus does not exist"),
    ],
)
def test_wrong_options_end_it_with_a_clear_error(options, message, texts, tmp_path):
    with pytest.raises(SystemExit, match=f"^error: .*{message}[^\n]*$"):
        baselines(*SMALL, *texts, "--baselines", "egg-eggroll", "transformer-sgd", *options, "--folder", str(tmp_path / "run"))
