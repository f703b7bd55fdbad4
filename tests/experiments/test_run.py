"""A run as the user sees it: its folder, its last line."""

import jax.numpy as jnp
import numpy as np

from eggroll.experiments.common.run import print_summary, run_folder


def test_summary_is_one_line_of_json(capsys):
    print_summary({"a": float("nan"), "b": np.float32(1.5), "c": jnp.arange(2), "d": [float("inf"), None, True], "e": "x"})
    assert capsys.readouterr().out == '{"a": null, "b": 1.5, "c": [0, 1], "d": [null, null, true], "e": "x"}\n'


def test_run_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run_folder("first").resolve() == tmp_path / "runs" / "first"
    assert run_folder("elsewhere/second").resolve() == tmp_path / "elsewhere" / "second"
    assert run_folder(tmp_path / "third").is_dir() and run_folder("first").is_dir()
