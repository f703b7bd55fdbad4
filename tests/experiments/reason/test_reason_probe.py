"""Settings of a run: what a probe measures and recommends, what a run says after one generation."""

import json
from pathlib import Path

import numpy as np
import pytest

from eggroll.experiments.reason import __main__ as reason
from eggroll.experiments.reason.measure.probe import walk
from eggroll.experiments.reason.measure.recommendation import SILENT, SigmaRow, StepRow, choose_sigma, fits
from eggroll.experiments.reason.measure.unperturbed import Comparison, compare
from tests.experiments.reason.reason_runs import letters, tiny


def test_members_are_compared_with_the_unperturbed_model_of_their_group():
    members = ["1", "2", "1", "3", "5", "5", "5", "6"]  # two groups of two members, two problems
    found = compare(
        members,
        ["1", "2", "5", "6"],
        fitness=np.array([[1, 0], [1, 0], [0, 0], [0, 1]]),
        own=np.array([[1, 1], [1, 1]]),
        groups=2,
    )
    assert found.texts_changed == 2 / 8 and found.members.tolist() == [[1, 0], [0, 0.5]]
    assert found.kept == 1.5 / 4 and found.least == 0
    first = compare(members, ["1", "2"], fitness=np.eye(4)[:, :2], own=np.ones((1, 2)), groups=2)
    np.testing.assert_allclose(found.kept_error, np.std([0.625, -0.375, -0.375, 0.125], ddof=1) / 2)
    assert first.texts_changed == 1 / 4 and first.members.shape == (1, 2)


@pytest.mark.parametrize(
    ("kept", "changed", "tied", "words"),
    [
        (0.9, 0.1, 0.95, "95% of the pairs have members of the same reward.* 10% of the texts .*: sigma is too small"),
        (0.9, 0.8, 0.95, "ask more problems of a member"),
        (0.3, 0.8, 0.95, "a mean reward of 0.3 where the unperturbed model has 1: try a smaller sigma"),
        (0.9, 0.1, 0.85, "^$"),
    ],
)
def test_what_one_generation_shows(kept, changed, tied, words):
    found = Comparison(changed, np.ones((1, 8)), np.full((1, 8), kept), 0.0)
    assert pytest.approx(found.kept) == kept
    with pytest.raises(AssertionError, match=words):
        raise AssertionError(found.advice(tied, pairs=16, sigma=0.01))
    assert not found.advice(tied, pairs=15, sigma=0.01)
    silent = Comparison(changed, np.zeros((1, 8)), np.zeros((1, 8)), 0.0)
    assert not silent.advice(1.0, pairs=16, sigma=0.01) and np.isnan(silent.kept)


def sigmas(*rows, error=0.01):
    return [SigmaRow(sigma, 0.5, tied, 0.1, kept, error, has_scored) for sigma, tied, kept, has_scored in rows]


@pytest.mark.parametrize(
    ("rows", "sigma", "words"),
    [
        ([(0.001, 0.94, 1, True), (0.003, 0.9, 0.8, True), (0.01, 0.85, 0.5, True)], 0.003, "the largest measured one"),
        ([(0.001, 0.94, 1, True), (0.003, 0.97, 0.8, True)], 0.001, "the largest measured one"),
        ([(0.001, 0.98, 1, True), (0.003, 0.97, 0.9, True)], 0.003, "97% of its pairs are tied: give members more problems"),
        ([(0.001, 0.5, 0.4, True), (0.003, 0.5, 0.1, True)], 0.001, "keep only 40% .* probe smaller ones with --sigma 0.0001"),
        ([(0.001, 0.9, np.nan, True), (0.003, 0.8, np.nan, True)], 0.003, "ties the fewest pairs"),
        ([(0.001, 1, np.nan, False)], None, SILENT[:40]),
    ],
)
def test_the_recommended_sigma(rows, sigma, words):
    chosen, said = choose_sigma(sigmas(*rows))
    assert chosen == sigma
    assert ("uncertain: they keep" in choose_sigma(sigmas(*rows, error=0.1))[1]) == ("the largest measured" in said)
    with pytest.raises(AssertionError, match=words):
        raise AssertionError(said)


def test_a_walk_ends_between_good_and_bad_or_with_the_time():
    step = lambda size: StepRow(size, 0.3, size, size, 0.5, False)  # noqa: E731
    sizes = lambda first, ok=True: [row[0] for row in walk(step, first, good=fits, has_time=lambda took: ok)]  # noqa: E731
    assert sizes(0.01) == [0.01, 0.03, 0.1, 0.17, 0.3]
    assert sizes(1.0) == [0.1, 0.17, 0.3, 1.0] and sizes(1.0, ok=False) == [1.0]
    assert sizes(0.001) == [0.001, 0.003, 0.01, 0.03]
    assert not fits(step(0.1)._replace(over_sigma=0.4)) and not fits(step(0.1)._replace(is_worse=True))


@pytest.mark.slow
@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("kind", ["scored", "silent", "int8"])
def test_a_probe_recommends_settings_and_writes_nothing(kind, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    if kind != "silent":
        monkeypatch.setattr("eggroll.envs.tasks.arithmetic.answer_matches", letters)
    more = ["--weights", "int8"] if kind == "int8" else []
    reason.main(tiny("--probe", "--population-size", "16", "--folder", "out/probe", "--seconds", "30", *more))
    out = capsys.readouterr().out
    summary = json.loads(out.splitlines()[-1])
    assert not Path("out").exists() and summary["sigmas"] and 0.01 in [row["sigma"] for row in summary["sigmas"]]
    if kind == "silent":
        assert summary["sigma"] is None is summary["learning_rate"] and not summary["steps"] and SILENT in out
    elif kind == "scored":
        assert f"try: --sigma {summary['sigma']:g}" in out and 0.001 in [row["learning_rate"] for row in summary["steps"]]
    else:
        assert f"--int8.sigma {3 * summary['sigma'] / 0.01:g}" in out and not summary["steps"]


def test_a_probe_is_of_eggroll_and_no_plan():
    for options, words in (
        (["--algorithm", "grpo"], "--probe has no effect with --algorithm grpo"),
        (["--plan"], "give plan or probe, not both"),
    ):
        with pytest.raises(SystemExit, match=words):
            reason.main(["--probe", *options])
