"""What a run says at its end: accuracies before and after, the paired interval; and the options of a preset."""

import json
import math
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from eggroll.envs import tasks
from eggroll.experiments.reason import __main__ as reason
from eggroll.experiments.reason.config import parse
from eggroll.experiments.reason.measure.outcome import compare, make_report, paired_interval
from eggroll.experiments.reason.presets import PRESETS
from eggroll.experiments.reason.problem import Check
from eggroll.experiments.reason.progress import Progress, number_of
from tests.experiments.reason.reason_runs import tiny

pytestmark = pytest.mark.usefixtures("standard_promotion")  # optax.adam relies on it

BEFORE = np.array([0, 0, 1, 1, 0], np.float32)
AFTER = np.array([1, 1, 1, 0, 1], np.float32)  # differences 1, 1, 0, -1, 1: mean 0.4, variance 0.8


def test_the_interval_is_of_the_differences_of_the_same_problems():
    half = 1.96 * math.sqrt(0.8 / 5)
    assert paired_interval(BEFORE, AFTER) == pytest.approx((0.4 - half, 0.4 + half))
    assert paired_interval(AFTER, BEFORE) == pytest.approx((-0.4 - half, -0.4 + half))
    unscored = np.array([np.nan, 1], np.float32)
    assert paired_interval(np.append(BEFORE, unscored), np.append(AFTER, unscored[::-1])) == paired_interval(BEFORE, AFTER)
    assert all(map(math.isnan, paired_interval(unscored, unscored)))


def test_intervals_cover_the_difference_of_95_of_100_samples():
    """Problems that are right before with probability 0.3 and after with 0.5, and dependent; 256 of them, 400 times."""
    before, after = (np.random.default_rng(0).random((400, 256)) < share for share in (0.3, 0.5))  # the same draws
    intervals = [paired_interval(*pair) for pair in zip(before.astype(np.float32), after.astype(np.float32), strict=True)]
    covered = np.mean([low <= 0.2 <= high for low, high in intervals])
    assert 0.92 < covered < 0.98
    widths = np.mean([high - low for low, high in intervals])
    assert widths == pytest.approx(2 * 1.96 * math.sqrt(0.2 * 0.8 / 256), rel=0.02)  # of pairs, narrower than of two samples


def test_the_report_has_numbers_and_completions():
    before, after = (
        Check(float(scores.mean()), 1.0, 3.0, [("1+1=", text, score)], scores)
        for scores, text, score in ((BEFORE, "3", 0.0), (AFTER, "2", 1.0))
    )
    result = compare(before, after)
    assert result | {"interval": None} == {
        "accuracy_before": pytest.approx(0.4),
        "accuracy_after": pytest.approx(0.8),
        "interval": None,
        "problems": 5,
    }
    lines = make_report(3, result, before, after).splitlines()
    assert lines[0] == "seed 3: accuracy on 5 test problems 0.400 before, 0.800 after: +0.400, 95 % interval -0.384 to +1.184"
    assert lines[1].split() == ["'1+1='", "before", "'3'", "(0.00)", "after", "'2'", "(1.00)"]


def test_the_clock_counts_time_or_work():
    record = SimpleNamespace(generation=0, seconds=1000.0, extra={}, aux=None)
    for clock, least, most in (("wall", 1000, 1000), ("processor", 0.05, 100)):
        progress = Progress(None, check_every=10, examples=0, clock=clock)
        end = time.process_time() + 0.05
        while time.process_time() < end:
            pass
        progress(None, record)
        assert least <= progress.seconds <= most and record.extra["seconds_spent"] == progress.seconds
        progress(None, record)  # which did nothing in between
        assert least <= progress.seconds <= 2 * most


def checked(progress, generation, accuracy):
    progress._validation = lambda params, examples: Check(accuracy, 1.0, 1.0, [], None)
    progress.check(generation, None, words="")
    return progress


@pytest.mark.parametrize("measure", [["of others"], 3])
def test_the_best_of_other_problems_is_not_compared(measure, capsys):
    """Its accuracy is not that of these problems: the parameters that the run is resumed with are checked again."""
    first = checked(Progress(None, check_every=10, examples=0, start=0.5, measure=number_of(["of two"])), 10, 1.0)
    resumed = Progress(None, check_every=10, examples=0, start=0.3, measure=number_of(measure))
    resumed.load(first.save())
    state = SimpleNamespace(generation=15, params={})
    resumed._validation = lambda params, examples: Check(0.4, 1.0, 1.0, [], None)
    resumed.resume(state)
    assert (resumed.best, resumed.best_generation) == (0.4, 15) and "other validation problems" in capsys.readouterr().out
    again = Progress(None, check_every=10, examples=0, start=0.3, measure=number_of(measure))
    again.load(checked(resumed, 20, 0.8).save())
    again.resume(state)  # of these problems: nothing is checked
    assert (again.best, again.best_generation) == (0.8, 20) and not again.begins_anew


def test_the_best_of_an_earlier_version_is_kept():
    """It has the arrays of today, without what its accuracy was measured by."""
    earlier = {"numbers": np.array([7.0, 0.9]), "counts": np.array([5, 1, 1, 10], np.int64)}
    progress = Progress(None, check_every=10, examples=0, start=0.5, measure=number_of(None))
    progress.load(earlier)
    assert (progress.best, progress.best_generation, progress.scored, progress.begins_anew) == (0.9, 10, True, False)


@pytest.mark.filterwarnings("ignore:no completion up to generation")
@pytest.mark.slow
def test_a_run_has_them_in_its_last_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    reason.main(tiny("--generations", "1", "--seeds", "2"))
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert summary["model"] == "small transformer" and summary["problems"] == 4 and "interval" not in summary
    for seed in summary["seeds"]:
        assert len(seed["interval"]) == 2 and seed["accuracy_after"] == seed["test_accuracy"]


def test_a_preset_gives_defaults_that_options_change():
    config = parse(["--preset", "smollm2-sums", "--sigma", "0.01"])
    config.check()
    preset = PRESETS["smollm2-sums"]
    assert config.sigma == 0.01 and config.model == Path("smollm2") and config.seconds == preset["seconds"]
    assert "preset" not in config.options() and config.options()["template"] == preset["template"]
    for name, options in PRESETS.items():
        for more in ((), ("--algorithm", "grpo"), ("--weights", "int8")):
            config = parse(["--preset", name, *more])
            config.check()
            assert config.grpo.learning_rate == options.get("grpo.learning_rate", 3e-4)


def test_sums_with_spaces_share_problems_and_reward_with_the_others():
    plain, spaced = (tasks.load("arithmetic", spaces=spaces) for spaces in (False, True))
    for one, other in zip(plain.split("test"), spaced.split("test"), strict=True):
        assert other.prompt == one.prompt.replace("+", " + ").replace("=", " =") and other.columns == one.columns
    assert spaced.reward([""] * 4, [" 42\n", "42", " 4 2", "  42"], answer=["42"] * 4) == [1, 1, 0, 0]
