"""The log of a run has what was printed and its progress, with a terminal or without."""

import io
import os
import sys
import time
import warnings

import pytest

from eggroll.runs import progress
from eggroll.runs.log import NAME, logged


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("stream", [Terminal, io.StringIO])
def test_the_log_gets_what_is_printed_and_plain_lines_of_progress(tmp_path, monkeypatch, stream):
    pytest.importorskip("rich")
    monkeypatch.setattr(progress, "FIRST_SECONDS", 0.02)
    monkeypatch.setenv("TERM", "xterm")
    out, error = stream(), stream()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", error)
    with logged(tmp_path, append=False):
        print("before")
        with progress.progress_line("generations", 7.0) as show:
            show(3, "mean 0.25")
            print("a check")
            print("a warning", file=sys.stderr)
            time.sleep(0.1)
        print("after")
    assert (sys.stdout, sys.stderr) == (out, error)
    log = (tmp_path / NAME).read_text()
    assert [log.count(text) for text in ("before", "a check", "a warning", "after")] == [1, 1, 1, 1]
    assert "generations 3 of 7: mean 0.25" in log and "\x1b" not in log and "\r" not in log
    shown = out.getvalue() + error.getvalue()
    assert [shown.count(text) for text in ("before", "a check", "a warning", "after")] == [1, 1, 1, 1]
    assert ("\x1b" in shown) == (stream is Terminal)


def test_the_log_says_which_error_ended_the_run(tmp_path):
    with pytest.raises(ValueError, match="seven"), logged(tmp_path, append=False):
        raise ValueError("seven")
    assert (tmp_path / NAME).read_text().endswith("ended by ValueError seven\n")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
def test_a_full_disk_does_not_replace_what_ended_the_run(tmp_path):
    (tmp_path / NAME).symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"journal\.bin"), logged(tmp_path, append=True):
        raise OSError(28, "No space left on device", "journal.bin")
    with logged(tmp_path, append=True):  # nor does it end a run
        print("shown")


def test_the_log_has_every_character(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    with logged(tmp_path, append=False):
        print("\u2713 \ud800")
    assert "\u2713 \\ud800\n" in (tmp_path / NAME).read_text(encoding="utf-8")


def test_a_warning_is_one_plain_line(tmp_path):
    usual = warnings.formatwarning
    with logged(tmp_path, append=False):
        assert warnings.formatwarning("sigma is too small", UserWarning, "a.py", 3) == "warning: sigma is too small\n"
        assert warnings.formatwarning("old", DeprecationWarning, "a.py", 3).startswith("a.py:3: ")
    assert warnings.formatwarning is usual


def test_a_bar_whose_end_changes_knows_the_time_left(monkeypatch):
    pytest.importorskip("rich")
    bar = progress._make_bar()
    monkeypatch.setattr(progress, "_make_bar", lambda: bar)
    with progress.progress_line("steps", 100.0, enabled=True) as show:
        for done in (1, 2, 3):
            show(done, "", 50 + done)
            time.sleep(0.01)
    assert bar.tasks[0].total == 53 and bar.tasks[0].time_remaining is not None
