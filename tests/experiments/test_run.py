"""A run as the user sees it: its folder, its last line."""

import re
import sys
import warnings

import jax.numpy as jnp
import numpy as np

from eggroll.experiments.common.log import logged
from eggroll.experiments.common.run import print_summary, run_folder


def test_summary_is_one_line_of_json(capsys):
    print_summary({"a": float("nan"), "b": np.float32(1.5), "c": jnp.arange(2), "d": [float("inf"), None, True], "e": "x"})
    assert capsys.readouterr().out == '{"a": null, "b": 1.5, "c": [0, 1], "d": [null, null, true], "e": "x"}\n'


def test_run_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run_folder("first").resolve() == tmp_path / "runs" / "first"
    assert run_folder("elsewhere/second").resolve() == tmp_path / "elsewhere" / "second"
    assert run_folder(tmp_path / "third").is_dir() and run_folder("first").is_dir()


def test_a_warning_is_one_plain_line_which_the_log_has_too(tmp_path, capsys, monkeypatch):
    """Standard error, which is copied unless a terminal draws a bar on it, gets what `formatwarning` returns."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    usual = warnings.formatwarning
    with logged(tmp_path, append=False):
        assert warnings.formatwarning("sigma is too small", UserWarning, "a.py", 3) == "warning: sigma is too small\n"
        assert warnings.formatwarning("old", DeprecationWarning, "a.py", 3).startswith("a.py:3: ")
    assert warnings.formatwarning is usual
    assert re.search(r"^\S+ \S+ warning: sigma is too small$", (tmp_path / "log.txt").read_text(), re.MULTILINE)
