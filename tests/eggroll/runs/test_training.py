"""The training loop: its generations, its stops, its files, its progress line and warnings."""

import dataclasses
import functools
import json
import re
import sys
import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import eggroll
from eggroll.runs import progress, training
from eggroll.runs.record import read_records
from eggroll.runs.training import Record, train
from eggroll.state import copy_state

PARAMS = {"w": jnp.arange(12, dtype=jnp.float32).reshape(4, 3) / 10}


def fitness(params, batch, key):
    """Highest, 0, where ones times w equals the batch."""
    return -jnp.square(jnp.ones((1, 4), jnp.float32) @ params["w"] - batch).mean()


def sometimes_nan(params, batch, key):
    """NaN for a share `batch` of the pairs."""
    return jnp.where(jax.random.uniform(key) < batch, jnp.nan, params["w"].sum())


@functools.cache  # compiled once for all tests
def strategy(function, aux):
    return eggroll.EvolutionStrategy(
        function, population_size=32, sigma=0.1, optimizer=optax.sgd(0.05), shaping="z_score", aux=aux
    )


def make(function=fitness, aux=None):
    es = strategy(function, aux)
    return es, es.init(PARAMS, key=jax.random.key(3))


def assert_equal(left, right):
    jax.tree.map(np.testing.assert_array_equal, left, right)


def test_is_the_loop_of_steps_exactly():
    es, state = make()
    batch = jnp.float32(1.0)
    trained, history = train(es, copy_state(state), batch, generations=5)
    means = []
    for _ in range(5):
        state, metrics = es.step(state, batch)
        means.append(float(metrics.mean_fitness))
    assert_equal(trained.params, state.params)
    assert [record.mean_fitness for record in history] == means
    assert [record.generation for record in history] == [0, 1, 2, 3, 4]


def test_continued_run_equals_one_run():
    es, state = make()
    whole, _ = train(es, copy_state(state), jnp.float32(1.0), generations=6)
    half, _ = train(es, state, jnp.float32(1.0), generations=2)
    rest, history = train(es, half, jnp.float32(1.0), generations=4)
    assert_equal(whole.params, rest.params)
    assert history[0].generation == 2


def test_batch_function_gets_the_generation_and_an_iterator_ends_training():
    es, state = make()
    asked = []

    def batch(generation):
        asked.append(generation)
        return jnp.float32(generation)

    by_function, _ = train(es, copy_state(state), batch, generations=3)
    assert asked == [0, 1, 2]
    by_iterator, history = train(es, state, (jnp.float32(i) for i in range(3)), generations=10)
    assert len(history) == 3
    assert_equal(by_function.params, by_iterator.params)


def test_stops_at_the_target_and_not_before():
    es, state = make()
    _, everything = train(es, copy_state(state), jnp.float32(1.0), generations=8)
    means = [record.mean_fitness for record in everything]
    assert means[4] > max(means[:4])  # else the target tests nothing
    _, history = train(es, state, jnp.float32(1.0), generations=8, target=means[4])
    assert len(history) == 5


def test_a_callback_stops_and_all_callbacks_run():
    es, state = make()
    seen = []
    callbacks = [lambda state, record: record.generation == 1, lambda state, record: seen.append(int(state.generation))]
    _, history = train(es, state, jnp.float32(1.0), generations=8, callbacks=callbacks)
    assert len(history) == 2 and seen == [1, 2]


def test_writes_metrics_and_a_figure(tmp_path):
    es, state = make()

    def held_out(state, record):
        record.extra["held_out"] = float("nan") if record.generation == 0 else 0.5

    folder = tmp_path / "new" / "run"
    state, history = train(es, state, jnp.float32(1.0), generations=3, callbacks=[held_out], run_folder=folder)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["generation"] for line in lines] == [0, 1, 2]
    assert [line["mean_fitness"] for line in lines] == [record.mean_fitness for record in history]
    assert [line["held_out"] for line in lines] == [None, 0.5, 0.5]
    assert "aux" not in lines[0] and "extra" not in lines[0]
    assert (folder / "fitness.png").read_bytes().startswith(b"\x89PNG")
    train(es, state, jnp.float32(1.0), generations=2, run_folder=folder)
    continued = [json.loads(line)["generation"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert continued == [0, 1, 2, 3, 4]


def test_the_figure_of_a_continued_run_has_all_of_it_and_costs_nobody_the_result(tmp_path, caplog):
    es, state = make()
    drawn = []

    def plot(history, folder):
        drawn.append([record.generation for record in history])
        raise OSError(28, "No space left on device", str(folder))

    for count in (3, 2):
        state, history = train(es, state, jnp.float32(1.0), generations=count, run_folder=tmp_path, plot=plot)
        assert len(history) == count and int(state.generation) == len(drawn[-1])
    assert drawn == [[0, 1, 2], [0, 1, 2, 3, 4]]
    kept = []
    look = lambda history, folder: kept.append(history[-1].fitness.shape)  # noqa: E731
    train(es, state, jnp.float32(1.0), generations=1, run_folder=tmp_path, plot=look, keep_arrays=True)
    assert kept == [(32,)]
    assert caplog.text.count("the figure was not drawn: [Errno 28] No space left on device") == 2


def test_metrics_are_on_disk_while_training_runs(tmp_path):
    es, state = make()

    def interrupt(state, record):
        if record.generation == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(es, state, jnp.float32(1.0), generations=5, callbacks=[interrupt], run_folder=tmp_path)
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
    assert (tmp_path / "fitness.png").exists()


def test_aux_reaches_callbacks():
    def with_aux(params, batch, key):
        return params["w"].sum(), {"members": jnp.float32(1)}

    es, state = make(with_aux, aux="sum")
    _, history = train(es, state, generations=1, keep_arrays=True)
    assert int(history[0].aux["members"]) == 32


def test_one_transfer_per_generation(monkeypatch):
    es, state = make()
    transfers, device_get = [], jax.device_get
    monkeypatch.setattr(jax, "device_get", lambda tree: transfers.append(1) or device_get(tree))
    train(es, state, jnp.float32(1.0), generations=4)
    assert len(transfers) == 4


def test_skipped_generations_warn_and_change_nothing(tmp_path):
    es, state = make(sometimes_nan)
    with pytest.warns(UserWarning, match="skipped: the fitness of all 32 members") as caught:
        trained, history = train(es, copy_state(state), jnp.float32(2.0), generations=2, run_folder=tmp_path)
    assert [str(w.message)[:12] for w in caught] == ["generation 0", "generation 1"]
    assert [record.skipped for record in history] == [True, True]
    assert_equal(trained.params, state.params)
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])["mean_fitness"] is None


def test_some_invalid_members_warn_once():
    es, state = make(sometimes_nan)
    with pytest.warns(UserWarning, match="of 32 members was not finite") as caught:
        _, history = train(es, state, jnp.float32(0.5), generations=4)
    assert len(caught) == 1 and sum(record.invalid > 0 for record in history) > 1


def test_plain_lines_when_not_a_terminal(capfd, monkeypatch):
    es, state = make()
    state, _ = train(es, state, jnp.float32(1.0), generations=2)
    assert capfd.readouterr() == ("", "")  # a short run
    monkeypatch.setattr(progress, "FIRST_SECONDS", 0.02)
    wait = lambda state, record: time.sleep(0.05)  # noqa: E731
    state, _ = train(es, state, jnp.float32(1.0), generations=3, callbacks=[wait], progress=False)
    assert capfd.readouterr() == ("", "")
    train(es, state, jnp.float32(1.0), generations=3, callbacks=[wait])
    out, err = capfd.readouterr()
    assert out == "" and err.startswith("generations, of 3: compiling, or in the first of this run, 0:00:0")
    assert re.search(r"^generations 2 of 3: generation 6  best .* members/s, 0:00:0\d, ETA 0:00:0\d$", err, re.MULTILINE)


def test_the_limit_that_comes_first_decides_what_is_left():
    def history(*tokens):
        return [SimpleNamespace(extra={"tokens": count}) for count in tokens]

    likely = functools.partial(training._likely_total, ("tokens", 1000))
    assert likely(None, history(10, 20)) == 1000 and likely(4, history(10)) == 1000
    assert likely(4, history(10, 20)) == 40 and likely(400, history(10, 20)) == 1000
    assert likely(4, history(510, 520)) == 540  # a run that is continued


def test_progress_line_on_standard_error(capfd, monkeypatch):
    """In 80 columns nothing is cut: the words have a line of their own."""
    pytest.importorskip("rich")
    monkeypatch.setenv("COLUMNS", "80")
    es, state = make()
    words = " ".join(f"word{number:02}" for number in range(11))
    train(es, state, jnp.float32(1.0), generations=2, progress=True, words=lambda record: words)
    out, err = capfd.readouterr()
    assert out == "" and "2/2" in err and "ETA" in err and words in err and "…" not in err


def test_quiet_without_rich_unless_asked(capfd, monkeypatch):
    for module in ("rich", "rich.console", "rich.progress"):
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    es, state = make()
    state, _ = train(es, state, jnp.float32(1.0), generations=1)
    assert capfd.readouterr() == ("", "")
    with pytest.raises(ModuleNotFoundError, match="rich"):
        train(es, state, jnp.float32(1.0), generations=1, progress=True)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        (dict(generations=-1), ValueError, "generations must be an integer >= 0, got -1"),
        (dict(generations=2.5), ValueError, "generations must be an integer"),
        (dict(generations=1, target="high"), ValueError, "target must be a number or None, got 'high'"),
        (dict(generations=1, target=float("nan")), ValueError, "target must be a number"),
        (dict(generations=1, callbacks=print), TypeError, "callbacks must be a sequence of functions"),
        (dict(generations=1, callbacks=[3]), TypeError, "callbacks must be a sequence of functions"),
    ],
)
def test_bad_arguments(options, error, words):
    es, state = make()
    with pytest.raises(error, match=words):
        train(es, state, jnp.float32(1.0), **options)


def test_a_run_that_has_ended_gets_its_figure_which_a_kill_may_have_cost(tmp_path, capfd):
    es, state = make()
    state, history = train(es, state, jnp.float32(1.0), generations=3, run_folder=tmp_path)
    (tmp_path / "fitness.png").unlink()
    capfd.readouterr()
    again, nothing = train(es, state, jnp.float32(1.0), generations=0, run_folder=tmp_path)
    train(es, es.init(PARAMS, key=jax.random.key(0)), generations=0, run_folder=tmp_path)  # whatever the state
    assert again is state and nothing == [] and (tmp_path / "fitness.png").exists() and len(read_records(tmp_path)) == 3
    assert capfd.readouterr() == ("", "")


def test_record_writes_null_for_what_is_not_finite():
    numbers = {field.name: 0.0 for field in dataclasses.fields(Record) if field.default is dataclasses.MISSING}
    del numbers["extra"], numbers["leaf_norms"]
    numbers |= {"mean_fitness": float("nan"), "best_fitness": float("inf"), "skipped": True}
    record = Record(**numbers, aux=object(), leaf_norms={"a": 1.0, "b": float("nan")})
    line = json.loads(record.to_json())
    assert line["mean_fitness"] is None and line["best_fitness"] is None and line["skipped"] is True
    assert line["leaf_norms"] == {"a": 1.0, "b": None}
