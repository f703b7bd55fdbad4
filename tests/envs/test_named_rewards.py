"""Rewards by name: files, modules, built-in ones, weights; what is wrong with them; worker processes that import them."""

import pytest

from eggroll.envs import tasks
from eggroll.envs.tasks import InvalidReward, RewardFailed, Row, Scorer, named_reward, reward_file, try_reward

SCORE = """
import re

from helper import LENGTH

def correct(completions, answer, **kwargs):
    return [float(text == right) for text, right in zip(completions, answer, strict=True)]

async def short(completions, **kwargs):
    return [float(len(text) < LENGTH) for text in completions]

def column(completions, *, solution, **kwargs):
    return [1.0] * len(completions)

def buggy(completions, **kwargs):
    return [undefined(text) for text in completions]

def odd(completions, **kwargs):
    return [float(text.split("####")[1]) for text in completions]

def tagged(completions, **kwargs):
    return [float(re.search("<answer>(.*)</answer>", text).group(1)) for text in completions]

def silent(completions, **kwargs):
    return [None] * len(completions)

TABLE = {}
"""
ROWS = (Row("1+1=", {"answer": "2"}),)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", ["", *__import__("sys").path])
    monkeypatch.delitem(__import__("sys").modules, "helper", raising=False)
    (tmp_path / "score.py").write_text(SCORE)
    (tmp_path / "helper.py").write_text("LENGTH = 3\n")
    (tmp_path / "broken.py").write_text("x = 1\nimport nothing_of_this_name\n")
    (tmp_path / "syntax.py").write_text("x = (1\n")
    return tmp_path


def score(reward, *completions, **columns):
    with Scorer(reward, workers=0) as scorer:
        return scorer([""] * len(completions), completions, **columns).values.tolist()


def test_files_modules_and_sums():
    assert score(named_reward(["score.py:correct"]), "a", "b", answer=["a", "a"]) == [1.0, 0.0]
    weighted = named_reward(["score.py:correct", "score.py:short=0.5"])
    assert score(weighted, "long", "b", answer=["long", "a"]) == [1.0, 0.5]
    assert score(named_reward(["score.py:short=-2"]), "a", answer=["a"]) == [-2.0]
    assert score(named_reward(["tests.envs.reward_functions:right"]), "a", "b", answer=["a", "a"]) == [1.0, 0.0]


def test_rewards_of_the_library():
    last = named_reward(["last_number"])
    assert score(last, "17 + 25 is 42.", "So 5", "none", answer=["42", 6, 7.0]) == [1.0, 0.0, 0.0]
    with pytest.raises(RewardFailed, match="the column 'answer' must have a number, got 'blue'"):
        score(last, "5", answer=["blue"])
    assert score(named_reward(["think_answer"]), "a") == [0.0]


def test_a_file_is_found_without_running_it(folder):
    assert str(reward_file("score.py:correct=0.5")) == "score.py" and reward_file("last_number") is None
    assert reward_file("tests.envs.reward_functions:right").name == "reward_functions.py"
    assert reward_file("broken.py:f").name == "broken.py" and reward_file("nothing.of.this:f") is None


def test_a_file_that_changes_is_another_reward(folder):
    (folder / "one.py").write_text("def f(completions, **kwargs): return [1.0]")
    first = named_reward(["one.py:f"])
    (folder / "one.py").write_text("def f(completions, **kwargs): return [2.0]")
    assert score(first, "") == [1.0] and score(named_reward(["one.py:f"]), "") == [2.0]
    assert not (folder / "__pycache__").exists() or not list((folder / "__pycache__").glob("one*"))


HAS = "which has correct, short, column, buggy, odd, tagged, silent."
WRONG = {
    "score.py:nothing": f"reward 'nothing' is missing in .*score.py, {HAS}",
    "score.py:TABLE": f"reward 'TABLE' is no function in .*score.py, {HAS}",
    "score.py": r"reward must be FILE.py:FUNCTION, .*, got 'score.py'; it has correct, short,",
    "score.py:short=much": "reward must have a finite number as its weight, .*, got 'score.py:short=much'",
    "score.py:short=inf": "a finite number as its weight",
    "broken.py:f": r"broken.py, line 2 raised ModuleNotFoundError: No module named 'nothing_of_this_name'",
    "syntax.py:f": r"syntax.py, line 1 raised SyntaxError: '\(' was never closed",
    "gone.py:f": "reward: there is no file .*gone.py",
    "nothing_here:f": "there is no module 'nothing_here'; a file is named as score.py:function",
    "lastnumber": "or one of last_number, math_verify, think_answer, got 'lastnumber'",
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_name_is_one_clear_error(name):
    with pytest.raises((InvalidReward, FileNotFoundError), match=WRONG[name]) as caught:
        named_reward([name])
    assert "\n" not in str(caught.value)


def test_a_column_that_rows_lack_is_named_with_those_there_are():
    splits = {"test": (Row("a", {"answer": "1", "id": 1}),)}
    with pytest.raises(
        InvalidReward, match=r"reward 'column' must .*: it needs the column 'solution', the rows have answer and"
    ):
        tasks.Task("mine", reward=named_reward(["score.py:column"]), splits=splits)


def test_workers_import_a_file_by_its_path(monkeypatch, tmp_path_factory):
    reward = named_reward(["score.py:correct", "score.py:short=0.5"])
    with Scorer(reward, workers=1, timeout=60) as scorer:
        assert scorer(["", ""], ["a", "long"], answer=["a", "a"]).values.tolist() == [1.5, 0.0]


def test_a_bug_is_found_before_a_run_and_odd_texts_are_a_warning():
    def attempt(name):
        with Scorer(named_reward([name]), workers=0) as scorer:
            try_reward(scorer, ROWS)

    attempt("score.py:correct")
    attempt("score.py:silent")
    with pytest.raises(RewardFailed, match=r"failed on all three texts .*: reward 'buggy' raised NameError: name 'undefined'"):
        attempt("score.py:buggy")
    with pytest.warns(UserWarning, match=r"failed on all three texts .*: reward 'odd' raised IndexError"):
        attempt("score.py:odd")
    with pytest.warns(UserWarning, match=r"failed on all three texts .*: reward 'tagged' raised AttributeError"):
        attempt("score.py:tagged")
