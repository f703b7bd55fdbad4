"""Scoring: rewards that raise, hang, end their process or break the protocol, in worker processes and in this one."""

import multiprocessing
import os
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest

from eggroll.envs.tasks import MINIMUM, THINK_ANSWER, Scorer, Weighted
from eggroll.envs.tasks.workers import Pool
from tests.envs import reward_functions as rewards


@pytest.fixture(scope="module")
def wayward():
    with Scorer(rewards.wayward, workers=2, timeout=1.0) as scorer:
        yield scorer


def score(scorer, completions, **columns):
    return scorer([""] * len(completions), completions, **columns)


@pytest.mark.parametrize("workers", [0, 2])
def test_scores_keep_their_order_and_columns_their_rows(workers):
    texts = [str(number) for number in range(37)]
    with Scorer(rewards.right, workers=workers) as scorer:
        scores = score(scorer, texts, answer=[text if int(text) % 3 else "other" for text in texts], unused=texts)
    np.testing.assert_array_equal(scores.values, [float(number % 3 != 0) for number in range(37)])
    assert scores.values.dtype == np.float64
    assert (scores.errors, scores.timeouts, scores.first_error) == (0, 0, None)


def test_no_completions(wayward):
    assert score(wayward, []).values.shape == (0,)


FAILURES = {  # completion -> errors, timeouts, words of the message
    "raise": (1, 0, "reward 'wayward' raised ZeroDivisionError: of a completion"),
    "nan": (1, 0, "reward 'wayward' must give finite numbers, got nan."),
    "text": (1, 0, "reward 'wayward' must give finite numbers, got '1.0'."),
    "exit": (1, 0, "reward 'wayward' ended its process with exit code 3."),
    "hang": (0, 1, "reward 'wayward' exceeded its time limit of 1 s."),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_only_the_failing_completion_is_lost(wayward, failure):
    scores = score(wayward, [*["fine"] * 20, failure, *["fine"] * 20])
    np.testing.assert_array_equal(scores.values, [1.0] * 20 + [MINIMUM] + [1.0] * 20)
    assert (scores.errors, scores.timeouts, scores.first_error) == FAILURES[failure]
    assert score(wayward, ["fine"] * 5).values.tolist() == [1.0] * 5  # killed workers were replaced


@pytest.mark.parametrize("failure", ["raise", "nan", "text"])
def test_errors_are_caught_in_this_process_too(failure):
    with Scorer(rewards.wayward, workers=0, minimum=-1.0) as scorer:
        scores = score(scorer, ["fine", failure, failure, "fine"])
    assert scores.values.tolist() == [1.0, -1.0, -1.0, 1.0]
    assert (scores.errors, scores.timeouts, scores.first_error) == (2, 0, FAILURES[failure][2])


@pytest.mark.slow
def test_several_kinds_of_failure_in_one_batch(wayward):
    scores = score(wayward, ["fine", "hang", "exit", "nan", "raise", "hang", "fine"])
    assert scores.values.tolist() == [1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0]
    assert (scores.errors, scores.timeouts) == (3, 2)
    assert scores.first_error == FAILURES["hang"][2]


WEIGHTED = Weighted((THINK_ANSWER, 1.0), (rewards.too_few, 1.0))


@pytest.mark.parametrize(
    ("reward", "workers", "message"),
    [
        (rewards.too_few, 0, "reward 'too_few' must return one float per completion, 3, got 2 values"),
        (rewards.too_few, 1, "reward 'too_few' must return one float per completion, 1, got 0 values"),  # of a call with one
        (rewards.no_list, 0, "reward 'no_list' must return one float per completion, 3, got a float"),
        (WEIGHTED, 0, "reward 'too_few' must return one float per completion, 3, got 2 values"),
    ],
    ids=["here", "elsewhere", "no list", "in a sum"],
)
def test_another_number_of_scores_is_an_error(reward, workers, message):
    with Scorer(reward, workers=workers) as scorer, pytest.raises(ValueError, match=message):
        score(scorer, ["a", "b", "c"])


def test_lists_of_different_lengths_are_an_error(wayward):
    with pytest.raises(ValueError, match="answer must have one entry per completion, 2, got 1"):
        score(wayward, ["a", "b"], answer=["a"])
    with pytest.raises(ValueError, match="prompts must have one entry per completion, 1, got 2"):
        wayward(["a", "b"], ["a"])


def test_calls_are_made_elsewhere_and_by_all_workers():
    with Scorer(rewards.process, workers=2) as scorer:
        for _ in range(50):  # both have started after a while
            processes = set(score(scorer, ["a"] * 8).values)
            if len(processes) == 2:
                break
            time.sleep(0.1)
    assert len(processes) == 2 and os.getpid() not in processes


def test_a_worker_that_dies_between_batches_is_replaced():
    with Scorer(rewards.process, workers=1) as scorer:
        (before,) = score(scorer, ["a"]).values
        os.kill(int(before), 9)
        while int(before) in {process.pid for process in multiprocessing.active_children()}:
            time.sleep(0.01)
        (after,) = score(scorer, ["a"]).values
    assert after != before and after > 0


def test_close_leaves_no_process_behind(tmp_path):
    before = set(multiprocessing.active_children())
    scorer = Scorer(rewards.wayward, workers=2, timeout=0.5)
    started = set(multiprocessing.active_children()) - before
    assert len(started) == 2
    assert score(scorer, [f"child {tmp_path / 'pid'}", "fine"]).timeouts == 1
    scorer.close()
    scorer.close()
    assert set(multiprocessing.active_children()) <= before
    grandchild = Path(f"/proc/{(tmp_path / 'pid').read_text()}/stat")  # what a killed reward had started ends with it
    assert not grandchild.exists() or grandchild.read_text().split()[2] == "Z"
    with pytest.raises(RuntimeError, match="the scorer is closed"):
        score(scorer, ["a"])


def test_a_reward_that_cannot_be_pickled_is_an_error():
    message = r"reward '<lambda>' must be a function at the top level of a module, but it cannot be pickled"
    with pytest.raises(TypeError, match=message):
        Scorer(lambda prompts, completions, **columns: [0.0] * len(completions), workers=1)
    with Scorer(lambda prompts, completions, **columns: [2.0] * len(completions), workers=0) as scorer:
        assert score(scorer, ["a"]).values.tolist() == [2.0]


def test_a_reward_that_workers_cannot_import_is_an_error(monkeypatch):
    module = types.ModuleType("of_this_process_only")
    exec("def mine(prompts, completions, **columns): return [1.0]", module.__dict__)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    message = "a worker could not import the reward: ModuleNotFoundError: No module named 'of_this_process_only'."
    with Scorer(module.mine) as scorer, pytest.raises(RuntimeError, match=message):
        score(scorer, ["a"])


@pytest.mark.slow
def test_a_script_without_a_main_guard_is_told_so(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("from envs.tasks import THINK_ANSWER, Scorer\nScorer(THINK_ANSWER)([''], [''])\n")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    run = subprocess.run([sys.executable, script], capture_output=True, text=True, env=environment, timeout=120)
    last = run.stderr.splitlines()[-1]
    assert run.returncode == 1 and last.startswith(
        "RuntimeError: a worker ended before it had started; a script that scores needs"
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"workers": -1}, "workers must be at least 0, got -1"),
        ({"timeout": 0}, "timeout must be above 0 seconds, got 0"),
        ({"workers": 0, "timeout": 5.0}, "timeout has no effect with workers=0: .* got 5.0"),
        ({"minimum": float("nan")}, "minimum must be a finite number or None, got nan"),
    ],
)
def test_settings_out_of_bounds_are_errors(settings, message):
    with pytest.raises(ValueError, match=message):
        Scorer(rewards.length, **settings)


def test_a_column_that_cannot_be_sent_leaves_the_scorer_usable():
    with Scorer(rewards.length, workers=1) as scorer:
        with pytest.raises(Exception, match=r"[Pp]ickle"):
            score(scorer, ["a"], answer=[lambda: None])
        assert score(scorer, ["abc"]).values.tolist() == [3.0]


def test_a_pool_needs_a_function_that_can_be_pickled():
    with pytest.raises(TypeError, match="cannot be pickled"):
        Pool(lambda job: job, workers=1, timeout=1.0, memory=1 << 30)
