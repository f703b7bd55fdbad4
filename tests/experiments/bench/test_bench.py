"""The benchmark measures what it says, on a workload of no size."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import eggroll
from eggroll.experiments.bench import cases, egg, engine, feedback, floor
from eggroll.experiments.bench.cases import Case
from eggroll.experiments.bench.timing import interleaved_ms, machine
from eggroll.experiments.egg.config import Config


def tiny():
    params = {"w": jnp.ones((6, 5))}
    return Case(lambda params, x: jnp.mean(x @ params["w"]), params, jnp.ones((8, 3, 6)), 4, 4)


@pytest.fixture
def one_case(monkeypatch):
    monkeypatch.setitem(cases.CASES, "tiny", tiny)


def test_last_line_is_json_with_every_number(one_case, capsys, standard_promotion):
    engine.run(engine.Engine(cases=("tiny",), repeats=2, dense_repeats=1))
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[0] == "case" and lines[2].split()[0] == "tiny"
    row = json.loads(lines[-1])["tiny"]
    assert set(row) == {
        "inference_ms",
        "forward_ms",
        "update_ms",
        "generation_ms",
        "generation_ratio",
        "chunked_ratio",
        "dense_ratio",
    }
    assert all(value > 0 for value in row.values())
    assert row["generation_ratio"] == pytest.approx(row["inference_ms"] / row["generation_ms"])


def test_dense_form_can_be_left_out(one_case, capsys, standard_promotion):
    engine.run(engine.Engine(cases=("tiny",), repeats=2, dense_repeats=0, tune=True))
    output = capsys.readouterr().out
    assert json.loads(output.splitlines()[-1])["tiny"]["dense_ratio"] is None and "generation at 8" in output


def test_unknown_case_is_refused_by_a_clear_error():
    with pytest.raises(SystemExit, match="error: cases must be among mlp8, mlp128, transformer, policy, got mlp9"):
        engine.run(engine.Engine(cases=("mlp9",)))


@pytest.mark.slow
def test_feedback_is_timed_over_whole_windows_and_keeps_scalars(capsys, standard_promotion):
    feedback.run(feedback.FeedbackBench(layers=2, width=16, members=4, windows=(2,), rounds=2))
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert rows["feedback 2 + sgd"]["state_bytes"] == 4 * (1 + 2 * (2 + 2)) and rows["master + sgd"]["state_bytes"] == 4 * 512
    with pytest.raises(SystemExit, match=r"rounds must be a multiple of the windows \(3,\), got 50"):
        feedback.run(feedback.FeedbackBench(windows=(3,)))


def test_floor_times_forms_that_give_the_same_fitness(monkeypatch, capsys, standard_promotion):
    monkeypatch.setitem(cases.CASES, "tiny", tiny)
    floor.run(floor.Floor(cases=("tiny",), repeats=2))
    row = json.loads(capsys.readouterr().out.splitlines()[-1])["tiny"]
    assert set(row) == {f"{form}_{value}" for form in floor.FORMS for value in ("ms", "ratio")}
    case, spec = tiny(), eggroll.LowRank(1)
    forward = engine.engine_forms(case, spec, chunk_size=case.chunk_size)["forward"]
    np.testing.assert_allclose(floor.given_form(case, spec)(), forward(), rtol=1e-6)


def test_forms_are_interleaved():
    calls = []
    forms = {name: (lambda name=name: calls.append(name) or jnp.zeros(())) for name in "ab"}
    assert set(interleaved_ms(forms, repeats=3)) == {"a", "b"}
    assert calls[4:] == ["a", "b"] * 3


def test_machine_names_device_processor_and_versions():
    about = machine()
    assert about["jax"] == jax.__version__ and about["device"] and about["processor"] and about["cores"] >= 1


@pytest.mark.slow
def test_the_integer_benchmark_measures_a_generation(capsys, tmp_path):
    (tmp_path / "a.txt").write_bytes(b"the quick brown fox" * 20)
    (tmp_path / "b.txt").write_bytes(b"jumps over" * 20)
    train = Config(
        layers=1, width=8, population_size=8, group=4, bytes_per_update=3, data=(tmp_path,), cache=tmp_path / "cache"
    )
    egg.run(egg.EGG(train, repeats=2))
    row = json.loads(capsys.readouterr().out.splitlines()[-1])
    times = ["inference_ms", "forward_ms", "update_ms", "generation_ms"]
    assert list(row) == ["bytes_per_second", *times, "generation_ratio", "peak_bytes", "least", "about"]
    assert row["generation_ratio"] == pytest.approx(row["inference_ms"] / row["generation_ms"])
    assert row["bytes_per_second"] == pytest.approx(8 * 3 * 1000 / row["generation_ms"]) and row["peak_bytes"] > 2**26
    assert all(row["least"][name] <= row[name] for name in times)
    with pytest.raises(SystemExit, match="error: alpha must be in"):
        egg.run(egg.EGG(dataclasses.replace(train, alpha=2.0)))


@pytest.mark.slow
def test_inference_of_the_integer_benchmark_reads_what_the_members_read(tmp_path):
    """Without noise a generation gives what it gives."""
    (tmp_path / "a.txt").write_bytes(b"the quick brown fox" * 20)
    (tmp_path / "b.txt").write_bytes(b"jumps over" * 20)
    train = Config(
        layers=1, width=8, population_size=8, group=4, bytes_per_update=3, data=(tmp_path,), cache=tmp_path / "cache"
    )
    forms = egg._forms(dataclasses.replace(train, shift=16))
    states, scores = forms["inference"]()
    fitness, _, perturbed = forms["forward"]()
    assert abs(int(scores.sum()) - int(fitness.sum())) < 8 * 3 * 256 and scores.shape == (4, 2, 3)
    assert int(jnp.abs(states.astype(jnp.int32) - perturbed.astype(jnp.int32)).max()) <= 8
