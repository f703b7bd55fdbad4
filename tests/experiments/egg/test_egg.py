"""Pretraining the integer language model, from its command line to its artefacts, on a text of no size."""

import contextlib
import dataclasses
import io
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core as jexc

from eggroll.digests import digest
from eggroll.experiments.common.checkpoint import load_checkpoint
from eggroll.experiments.egg import __main__ as egg
from eggroll.experiments.egg import evolution, problem
from eggroll.experiments.egg.config import Config, parse
from eggroll.experiments.egg.data import corpus
from eggroll.experiments.egg.models import egg as model
from eggroll.generation import update_parameters
from eggroll.journal import __main__ as journal
from eggroll.update import shaping

ROOT = Path(__file__).parents[3]
SMALL = ["--layers", "1", "--width", "16", "--population-size", "256", "--group", "32", "--bytes-per-update", "16"]
SMALL += ["--generations", "15", "--validation-every", "6", "--sample-length", "5", "--checkpoint-every", "4"]
MEASURED = {"seconds": 0, "generation_seconds": 0, "bytes_per_second": 0, "peak_mib": 0}
CONFIG = Config(layers=1, width=16, population_size=256, group=32, bytes_per_update=16)


@pytest.fixture(scope="module", autouse=True)
def _strategies():
    """Keep strategies, and what they compiled, from run to run."""
    kept, make = {}, evolution.make_strategy

    def make_once(config):
        settings = str((config.options(), config.chunk_size, config.mesh))
        return kept.get(settings) or kept.setdefault(settings, make(config))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evolution, "make_strategy", make_once)
        yield


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Options that name a small corpus."""
    folder = tmp_path_factory.mktemp("corpus")
    for index in range(6):
        (folder / f"{index}.txt").write_bytes(b"the quick brown fox %d\n" % index * 30)
    return ["--data", str(folder), "--cache", str(folder.parent / "cache")]


def run(*arguments):
    """Summary of a run with these options, and what else it printed."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        egg.main(arguments)
    *said, last = out.getvalue().splitlines()
    return json.loads(last), "\n".join(said)


def params_of(folder):
    like = jax.eval_shape(lambda: model.init(CONFIG.model, key=jax.random.key(0)))
    return load_checkpoint(folder / "checkpoint", like)


def same(one, other):
    return all(np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (one, other)), strict=True))


@pytest.fixture(scope="module")
def small_run(texts, tmp_path_factory):
    """Summary, words and folder of one undisturbed run."""
    folder = tmp_path_factory.mktemp("egg")
    return *run(*SMALL, *texts, "--folder", str(folder)), folder


def test_summary_and_artefacts(small_run):
    summary, said, folder = small_run
    references = ["unigram_bits", "bigram_bits", "gzip_bits", "xz_bits"]
    assert list(summary) == ["validation_bits", "generations", "bytes_read", *MEASURED_ORDER, *references]
    assert summary["generations"] == 15 and summary["bytes_read"] == 15 * 256 * 16
    assert "unigram" in said and "generation 15: validation" in said
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["generation"] + 1 for line in lines if "validation_bits" in line] == [6, 12, 15]
    assert lines[-1]["validation_bits"] == pytest.approx(summary["validation_bits"])
    assert all(line["mean_bits"] == pytest.approx(-line["mean_fitness"] / 16 / 256) for line in lines)
    assert (folder / "bits_per_byte.png").exists() and not (folder / "fitness.png").exists()
    assert len((folder / "samples" / "000015.txt").read_bytes()) == len(evolution.PROMPT) + 5
    assert json.loads((folder / "summary.json").read_text())["options"]["width"] == 16


MEASURED_ORDER = ["bytes_per_second", "generation_seconds", "seconds", "peak_mib"]


def test_validation_is_the_mean_over_the_streams(small_run, texts):
    """The same figure from one call for every stream."""
    summary, _, folder = small_run
    text = corpus.load([texts[1]], cache=texts[3])
    size = len(text.validation)
    groups = size // problem.SHORTEST_STREAM
    pieces = corpus.streams(text, 0, groups=groups, length=size // groups, part="validation")
    params, config = params_of(folder), CONFIG.model
    read = jax.jit(model.sequence, static_argnames="config")
    scores = [read(params, model.init_state(config), piece, config)[1] for piece in pieces]
    assert summary["validation_bits"] == pytest.approx(-np.mean(scores) / 256) and groups > 1


def test_it_learns(small_run, texts):
    text = corpus.load([texts[1]], cache=texts[3])
    untrained = model.init(CONFIG.model, key=jax.random.split(jax.random.key(0))[0])
    assert small_run[0]["validation_bits"] < problem.Validation(text, CONFIG)(untrained) - 1


@pytest.mark.slow
def test_a_run_that_stopped_goes_on_bit_for_bit(small_run, texts, tmp_path, monkeypatch):
    """From the checkpoint of generation 4 the fifth and sixth are evaluated again; with no checkpoint, all."""
    options = [*SMALL, *texts, "--folder", str(tmp_path)]
    stopped = evolution.train
    with monkeypatch.context() as patch:
        patch.setattr(evolution, "train", lambda *args, generations, **more: stopped(*args, generations=6, **more))
        assert run(*options)[0]["generations"] == 6
    for damage in ("nothing", "states"):
        shutil.rmtree(tmp_path / "checkpoints" / damage, ignore_errors=True)
        summary, _ = run(*options, "--resume")
        assert summary | MEASURED == small_run[0] | MEASURED and same(params_of(tmp_path), params_of(small_run[2]))
        assert summary["bytes_per_second"] > 0  # after the second resume, which has nothing to do, too
    first, second = ((folder / "metrics.jsonl").read_text().splitlines() for folder in (small_run[2], tmp_path))
    assert [json.loads(line)["mean_fitness"] for line in first] == [json.loads(line)["mean_fitness"] for line in second]
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        journal.main(["verify", str(tmp_path)])
    assert "3 checkpoints are rebuilt bit for bit" in out.getvalue()
    assert run(*options, "--resume", "--generations", "16")[0]["generations"] == 16  # longer is allowed, otherwise is not
    with pytest.raises(SystemExit, match=r"other settings: rank \(was 1, is 2\)"):
        run(*options, "--resume", "--rank", "2")


@pytest.mark.slow
def test_a_generation_that_comes_out_differently_is_refused(texts, tmp_path, monkeypatch):
    options = [*SMALL, *texts, "--folder", str(tmp_path)]
    stopped = evolution.train
    with monkeypatch.context() as patch:
        patch.setattr(evolution, "train", lambda *args, generations, **more: stopped(*args, generations=6, **more))
        run(*options)
    streams = evolution.streams
    monkeypatch.setattr(evolution, "streams", lambda *args, **more: streams(*args, **more)[:, ::-1])
    with pytest.raises(SystemExit, match=r"error: generation 4, evaluated again, gave other coefficients than the journal has"):
        run(*options, "--resume")


@pytest.mark.slow
def test_chunks_give_the_same_bits(small_run, texts, tmp_path):
    summary, _ = run(*SMALL, *texts, "--chunk-size", "60", "--folder", str(tmp_path))
    assert summary | MEASURED == small_run[0] | MEASURED and same(params_of(tmp_path), params_of(small_run[2]))


def dtypes(jaxpr):
    """Of every value, inside control flow and calls too."""
    for equation in jaxpr.eqns:
        yield from (value.aval.dtype for value in (*equation.invars, *equation.outvars))
        for inner in jax.tree.leaves(equation.params, is_leaf=lambda v: isinstance(v, jexc.ClosedJaxpr | jexc.Jaxpr)):
            if isinstance(inner, jexc.ClosedJaxpr | jexc.Jaxpr):
                yield from dtypes(getattr(inner, "jaxpr", inner))


def test_no_floating_number_in_a_generation():
    """Evaluation with noise and loss, coefficients and update; metrics are reported in floating numbers and come after."""
    es, state = evolution.start(CONFIG, init_key=jax.random.key(0), run_key=jax.random.key(1))
    text = jnp.zeros((CONFIG.streams, CONFIG.bytes_per_update + 1), jnp.uint8)

    def generation(params, key, member_state):
        now = state._replace(params=params, key=key, member_state=member_state)
        fitness, _, after = es.evaluate(now, text)
        better = shaping.integer_coefficients("pair_sign", fitness.reshape(-1), largest_noise=3481)
        moved, _ = update_parameters(es, es.plan(state), now._replace(sigma=None), better, optimizer=es.optimizer)
        return moved.params, after

    program = jax.make_jaxpr(generation)(state.params, state.key, state.member_state)
    found = set(dtypes(program.jaxpr))
    assert {jnp.dtype(jnp.int8), jnp.dtype(jnp.int32)} < found
    assert not any(jnp.issubdtype(dtype, jnp.inexact) for dtype in found), found


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--population-size", "48"], "population_size must be a multiple of group, an even number, got 48 and 32"),
        (["--group", "3"], "population_size must be a multiple of group, an even number, got 256 and 3"),
        (["--alpha", "1.5"], r"alpha must be in \(0, 1\], got 1.5"),
        (["--alpha", "0"], r"alpha must be in \(0, 1\], got 0.0"),
        (["--alpha", "0.01"], "alpha_end must be at most alpha, 0.01, got 0.0625"),
        (["--bytes-per-update", "0"], "bytes_per_update must be from 1 to 350000, got 0"),
        (["--seed", "-1"], "seed must be an integer from 0 to 4294967295, got -1"),
        (["--generations", "0"], "generations must be an integer >= 1, got 0"),
        (["--temperature", "-1"], "sample_length and temperature must be >= 0, got 5 and -1.0"),
        (["--width", "0"], "width must be an integer from 1 to"),
        (["--rank", "0"], "rank must be an integer >= 1, got 0"),
        (["--shift", "17"], "shift must be an integer from 0 to 16"),
        (["--chunk-size", "5"], "chunk_size must be an even integer >= 2 or None, got 5"),
        (["--mesh", "population=64"], "mesh 'population=64' has 64 devices, this run has 8"),
        (["--rank", "700"], "could overflow int32: width times rank must be at most"),
        (["--data", "nowhere"], "the path nowhere of the corpus does not exist"),
    ],
)
def test_wrong_options_end_it_with_a_clear_error(options, message, texts, tmp_path):
    """And remove no run."""
    kept = tmp_path / "run" / "journal.bin"
    kept.parent.mkdir()
    kept.write_bytes(b"generations")
    with pytest.raises(SystemExit, match=f"^error: .*{message}[^\n]*$"):
        run(*SMALL, *texts, *options, "--folder", str(tmp_path / "run"))
    assert kept.read_bytes() == b"generations"


def test_an_empty_corpus_is_refused_by_a_clear_error(tmp_path):
    (tmp_path / "empty.txt").touch()
    with pytest.raises(SystemExit, match=r"^error: the corpus is too small: 0 files with text"):
        run(*SMALL, "--data", str(tmp_path), "--cache", str(tmp_path / "cache"))


@pytest.mark.slow
def test_a_file_that_vanishes_in_a_run_is_refused_by_a_clear_error(texts, tmp_path, monkeypatch):
    cache, check = tmp_path / "cache", evolution._Checks.__call__

    def vanish(checks, state, record):
        check(checks, state, record)
        next(cache.glob("*.bin")).unlink()

    monkeypatch.setattr(evolution._Checks, "__call__", vanish)
    with pytest.raises(SystemExit, match=r"^error: the corpus file .* vanished or changed"):
        run(*SMALL, *texts[:2], "--cache", str(cache), "--folder", str(tmp_path / "run"))


def test_presets_and_schedule():
    paper = parse(["--preset", "paper", "--group", "64"])
    assert (paper.layers, paper.width, paper.population_size, paper.group) == (6, 256, 65536, 64)
    assert [paper.alpha_of(t) for t in (0, 100, 1000)] == pytest.approx([1, 1 / 2.5, 1 / 16])
    assert parse([]) == Config()


def test_the_optimizer_does_not_depend_on_the_generations_of_a_run():
    """A replay does not know them, and a run may be extended."""

    def digest_of(**options):
        optimizer = evolution.make_optimizer(dataclasses.replace(CONFIG, **options))
        sums, weights, number = jnp.zeros(3, jnp.int32), jnp.zeros(3, jnp.int8), jnp.int32(1)
        return digest(
            lambda u, w, d, g: optimizer.update(u, None, w, deviation=d, generation=g)[0], sums, weights, number, number
        )

    assert digest_of() == digest_of(generations=9_000) == digest_of(generations=12_000)
    late = dict(alpha_steps=20_000)
    assert digest_of(**late) == digest_of(**late, generations=30_000) != digest_of(**late, alpha_end=1 / 32)


def started(options):
    command = [sys.executable, "-m", "eggroll.experiments.egg", *options]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_two_devices_give_the_same_bits(small_run, texts, tmp_path):
    summary, _ = run(*SMALL, *texts, "--mesh", "population=2", "--folder", str(tmp_path))
    assert summary | MEASURED == small_run[0] | MEASURED
    assert same(params_of(tmp_path), params_of(small_run[2]))


@pytest.mark.slow
def test_a_killed_run_goes_on_bit_for_bit(texts, tmp_path):
    options = [*SMALL, *texts, "--generations", "60", "--checkpoint-every", "7", "--folder"]
    whole, _ = run(*options, str(tmp_path / "whole"))
    process = started([*options, str(tmp_path / "killed")])
    metrics = tmp_path / "killed" / "metrics.jsonl"
    while not metrics.exists() or metrics.read_text().count("\n") < 12:
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    for pipe in (process.stdout, process.stderr):
        if pipe is not None:
            pipe.close()
    assert run(*options, str(tmp_path / "killed"), "--resume")[0] | MEASURED == whole | MEASURED
    assert same(params_of(tmp_path / "whole"), params_of(tmp_path / "killed"))
