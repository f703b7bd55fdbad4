"""The benchmark of zeroth-order steps, in small: it runs and its JSON has what it promises."""

import importlib.util
import json

import jax
import numpy as np
import pytest

from eggroll.experiments.bench import populations, zo


@pytest.mark.slow
def test_numbers_of_a_small_run(capsys):
    zo.run(zo.ZO(blocks=2, width=8, tokens=8, directions=(1, 2), matrix=64, repeats=2, models=("tiny",)))
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(summary["offload_ratios"]) == {"1", "2"} and summary["offload_ratio"] == summary["offload_ratios"]["2"]
    assert set(summary["forwards_per_second"]) == {"mezo", "adamezo", "lozo", "lozo_m", "fzoo", "spsa15", "grzo"}
    assert summary["lowrank_batched_speedup"] > 0 and set(summary["transfer_ratio"]) == {"normal", "rademacher"}
    assert summary["memory"]["mezo_ratio"] == summary["memory"]["sizes"]["tiny"]["mezo_ratio"]
    assert all(0 < summary["memory"][f"{axis}_ratio"] < summary["memory"]["mezo_ratio"] for axis in ("population", "data"))
    assert summary["torch_ratio"] is None or set(summary["torch_ratio"]) == {"mezo", "mezo_normal", "lozo"}


def test_the_forms_of_the_large_matrix_compute_the_same():
    forms = zo._batched(zo.ZO(matrix=64))
    batched, separate = forms["batched"](), forms["separate"]()
    np.testing.assert_allclose(np.ravel(batched), np.ravel(jax.device_get(separate)), rtol=1e-4, atol=1e-4)


def test_forwards_are_counted():
    assert {name: zo.forwards_of(tuner) for name, tuner in zo._recipes().items()} == {
        "mezo": 2,
        "adamezo": 2,
        "lozo": 2,
        "lozo_m": 2,
        "fzoo": 9,
        "spsa15": 17,
        "grzo": 2,
    }


def test_unknown_populations_are_refused():
    with pytest.raises(SystemExit, match="case must be one of mlp, toy, got 'huge'"):
        populations.run(populations.Populations(case="huge"))


def test_unknown_models_are_refused():
    with pytest.raises(SystemExit, match="models must be among smollm2, 1b, tiny, got huge"):
        zo.run(zo.ZO(models=("huge",)))


def test_a_missing_torch_is_said(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert zo._torch_ratios(zo.ZO(models=("tiny",))) is None
    assert "torch_ratio needs torch and transformers: make parity" in capsys.readouterr().out
