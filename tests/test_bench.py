"""The benchmark measures what it says, on a workload of no size."""

import json

import jax
import jax.numpy as jnp
import pytest

from experiments.bench import engine
from experiments.bench.cases import Case
from experiments.bench.timing import interleaved_ms, machine


def tiny():
    params = {"w": jnp.ones((6, 5))}
    return Case(lambda params, x: jnp.mean(x @ params["w"]), params, jnp.ones((8, 3, 6)), 4, 4)


@pytest.fixture
def one_case(monkeypatch):
    monkeypatch.setattr(engine, "CASES", {"tiny": tiny})


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


def test_unknown_case_is_one_sentence():
    with pytest.raises(SystemExit, match="error: cases must be out of mlp8, mlp128, transformer, policy, got mlp9"):
        engine.run(engine.Engine(cases=("mlp9",)))


def test_forms_are_interleaved():
    calls = []
    forms = {name: (lambda name=name: calls.append(name) or jnp.zeros(())) for name in "ab"}
    assert set(interleaved_ms(forms, repeats=3)) == {"a", "b"}
    assert calls[4:] == ["a", "b"] * 3


def test_machine_names_device_and_versions():
    about = machine()
    assert about["jax"] == jax.__version__ and about["device"]
