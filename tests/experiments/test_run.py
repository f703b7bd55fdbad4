"""A run as the user sees it: its folder, its texts, its last line."""

import io
import sys
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from eggroll.experiments.common.run import print_summary, print_text, run_folder
from eggroll.experiments.common.seeds import prepare_folder, refuse_model_of_the_user, seed_folder
from eggroll.experiments.reason.progress import print_examples
from eggroll.runs.log import NAME, logged


def test_summary_is_one_line_of_json(capsys):
    print_summary({"a": float("nan"), "b": np.float32(1.5), "c": jnp.arange(2), "d": [float("inf"), None, True], "e": "x"})
    assert capsys.readouterr().out == '{"a": null, "b": 1.5, "c": [0, 1], "d": [null, null, true], "e": "x"}\n'


def test_texts_are_printed_to_a_stream_that_cannot_encode_them(tmp_path, monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), encoding="iso-8859-1")
    monkeypatch.setattr(sys, "stdout", out)
    with logged(tmp_path, append=False):
        print_text("é\ufffd")
    print_examples([("1+1=", "\ufffd2\ud800", 1.0)])
    assert out.buffer.getvalue().decode("iso-8859-1") == "é\\ufffd\n    1.00  1+1=\\ufffd2\\ud800\n"
    assert "é\\ufffd\n" in (tmp_path / NAME).read_text(encoding="utf-8")


def test_run_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run_folder("first").resolve() == tmp_path / "runs" / "first"
    assert run_folder("elsewhere/second").resolve() == tmp_path / "elsewhere" / "second"
    assert run_folder(tmp_path / "third").is_dir() and run_folder("first").is_dir()
    several = SimpleNamespace(folder=Path("first"), seeds=2, resume=False)
    assert seed_folder(several, 1, default="").resolve() == tmp_path / "runs" / "first" / "seed-1"


def test_a_new_run_removes_what_an_earlier_one_left_and_nothing_else(tmp_path):
    """A folder without a run has files of the user, and a model may be what is read."""
    for name in ("model", "checkpoint", "checkpoints", "best", "data"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    (tmp_path / "samples").symlink_to(tmp_path / "data")
    for resume in (False, True):
        words = "has no run, but checkpoints, samples, best, checkpoint, which a run would replace"
        with pytest.raises(ValueError, match=words), prepare_folder(tmp_path, resume=resume):
            pass

    with pytest.raises(ValueError, match="has no run, but model, which a run would replace; choose another folder"):
        refuse_model_of_the_user(tmp_path)

    def begin(*, resume):
        with prepare_folder(tmp_path, resume=resume):
            return {path.name for path in tmp_path.iterdir()} - {"run.lock"}

    (tmp_path / "metrics.jsonl").write_text("")
    refuse_model_of_the_user(tmp_path)
    users = {"model", "checkpoint", "checkpoints", "best", "data", "samples"}
    assert begin(resume=True) == {*users, "metrics.jsonl"}
    assert begin(resume=False) == {"model", "data"}
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "config.partial").touch()  # of a run that was killed at its very start
    (tmp_path / "fitness.png").touch()
    assert begin(resume=True) == begin(resume=False) == {"model", "data", "checkpoints", "fitness.png"}
    (tmp_path / "fitness.png").unlink()
    (tmp_path / "checkpoints" / "config.json").write_text('{"file_sha256": "x"}')  # and a little later
    assert begin(resume=False) == {"model", "data"}


def test_a_resumed_seed_is_found_where_earlier_versions_put_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    several = SimpleNamespace(folder=Path("first"), seeds=2, resume=True)
    (tmp_path / "first" / "seed-1").mkdir(parents=True)
    assert [str(seed_folder(several, seed, default="")) for seed in (0, 1)] == ["runs/first/seed-0", "first/seed-1"]
    (tmp_path / "runs" / "first" / "seed-1").mkdir()
    assert str(seed_folder(several, 1, default="")) == "runs/first/seed-1"
