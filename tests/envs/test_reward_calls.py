"""How rewards are called, and what they may return: keywords, copies, coroutines, None, failures of some and of all."""

import asyncio
import functools
import time

import jax.numpy as jnp
import numpy as np
import pytest

from eggroll.envs import tasks
from eggroll.envs.tasks import InvalidReward, Row, Scorer, Task, Weighted
from eggroll.envs.tasks.calls import MAX_TEXT
from eggroll.envs.tasks.workers import TimedOut
from tests.envs import reward_functions as rewards


def score(reward, completions, /, *, prompts=None, minimum=None, **columns):
    with Scorer(reward, workers=0, minimum=minimum) as scorer:
        return scorer(prompts or [""] * len(completions), completions, **columns)


def values(reward, completions, /, **more):
    return score(reward, completions, **more).values.tolist()


def test_everything_is_passed_by_keyword():
    def trl(completions, **kwargs):
        assert sorted(kwargs) == ["answer", "prompts", "reward", "unused"]
        return [float(text == right) for text, right in zip(completions, kwargs["answer"], strict=True)]

    columns = {"answer": ["a", "c"], "unused": [0, 0], "reward": [0, 0]}
    assert values(trl, ["a", "b"], **columns) == [1.0, 0.0]
    assert values(Weighted((trl, 2.0)), ["a", "b"], **columns) == [2.0, 0.0]
    assert values(lambda *, answer, completions, **_: [3.0] * 2, ["a", "b"], answer=["", ""]) == [3.0, 3.0]


@pytest.mark.parametrize(
    ("reward", "columns", "expected"),
    [
        (tasks.number_matches, {"answer": ["42", "1"]}, [1.0, 0.0]),
        (tasks.arithmetic.answer_matches, {"answer": ["42", "1"]}, [1.0, 0.0]),
        (tasks.Matches("[0-3]+"), {}, [0.0, 0.0]),
        (tasks.THINK_ANSWER, {}, [0.0, 0.0]),
        (Weighted((tasks.number_matches, 1.0), (tasks.THINK_ANSWER, 1.0)), {"answer": ["42", "1"]}, [1.0, 0.0]),
    ],
    ids=["number", "arithmetic", "pattern", "form", "sum"],
)
def test_rewards_of_the_library_take_keywords(reward, columns, expected):
    assert reward(prompts=["", ""], completions=["42", "5"], unused=[0, 0], **columns) == expected


class Method:
    def score(self, completions, answer, **kwargs):
        return [1.0] * len(completions)

    async def __call__(self, completions, **kwargs):
        await asyncio.sleep(0)
        return [float(len(text)) for text in completions]


async def asynchronous(completions, **kwargs):
    return await Method()(completions)


@pytest.mark.parametrize(
    "reward",
    [asynchronous, Method(), functools.partial(asynchronous, extra=1), Weighted((asynchronous, 0.5), (Method(), 0.5))],
    ids=["function", "object", "partial", "sum"],
)
def test_asynchronous_rewards_are_awaited(reward):
    assert values(reward, ["a", "bcd"]) == [1.0, 3.0]


def test_asynchronous_rewards_are_awaited_where_a_loop_runs():
    async def notebook():
        return values(asynchronous, ["a", "bcd"])

    assert asyncio.run(notebook()) == [1.0, 3.0]


def test_a_cancelled_reward_fails_alone():
    async def cancelled(completions, **kwargs):
        if "cancel" in completions:
            raise asyncio.CancelledError
        return [1.0] * len(completions)

    scores = score(cancelled, ["fine", "cancel"])
    assert scores.values.tolist() == [1.0, 0.0] and "CancelledError" in scores.first_error


SIGNATURES = {  # what is wrong -> reward, words of the error
    "positions": (lambda p, c, **_: [0.0], "it needs the column 'p', the rows have answer and worked."),
    "positional only": (lambda prompts, completions, /, **kwargs: [0.0], "positional only"),
    "no column": (lambda prompts, completions, answer: [0.0], "unexpected keyword argument 'worked'"),
    "unknown": (lambda completions, completion_ids, **kwargs: [0.0], "needs the column 'completion_ids'"),
    "no arguments": (lambda: [0.0], "unexpected keyword argument 'prompts'"),
    "in a sum": (Weighted((tasks.number_matches, 1.0), (lambda: [0.0], 1.0)), "unexpected keyword argument 'prompts'"),
    "built-in": (len, "reward 'len' must take"),
}


@pytest.mark.parametrize("case", SIGNATURES)
def test_a_wrong_signature_is_an_error_before_any_call(case):
    reward, words = SIGNATURES[case]
    columns = {"answer": ["1"], "worked": [""]}
    with pytest.raises(InvalidReward) as caught:
        score(reward, ["a"], **columns)
    text = str(caught.value)
    assert "must take prompts, completions, answer and worked by keyword, such as `def reward(completions, **kwargs)`" in text
    assert words in text and "\n" not in text
    with pytest.raises(InvalidReward, match="by keyword"):  # of a task, before a model is loaded
        Task("mine", reward=reward, splits={"test": (Row("a", {"answer": "1", "worked": ""}),)})


@pytest.mark.parametrize("reward", [{"a": 1.0}, None, 1.0, "f"])
def test_what_is_no_function_is_an_error(reward):
    for make in (Scorer, lambda r: score(Weighted((r, 1.0)), ["a"]), lambda r: Task("t", reward=r, splits={"test": (ROW,)})):
        with pytest.raises(InvalidReward, match=r"a reward must be a function such as `def reward\(.*\)`, got a "):
            make(reward)


ROW = Row("a", {})


def test_a_column_must_not_take_the_name_of_an_argument():
    with pytest.raises(ValueError, match="a column must not be called prompts or completions, got prompts"):
        Task("mine", reward=tasks.THINK_ANSWER, splits={"test": (Row("a", {"prompts": "b"}),)})


def test_a_decorated_reward_is_checked_as_it_is_called():
    def plain(completions):
        return [1.0] * len(completions)

    @functools.wraps(plain)
    def decorated(completions, **kwargs):
        return plain(completions)

    assert values(decorated, ["a"], answer=["1"]) == [1.0]


def test_a_type_error_inside_a_reward_is_its_failure():
    def failing(completions, **kwargs):
        return [float(len(text) + (1 if text != "bad" else "1")) for text in completions]

    scores = score(failing, ["a", "bad"])
    assert scores.values.tolist() == [2.0, 0.0] and scores.errors == 1 and "raised TypeError" in scores.first_error


@pytest.mark.parametrize("edit", [lambda x: x.pop(0), lambda x: x.clear(), lambda x: x.append("x"), lambda x: x.sort()])
def test_edits_in_place_shift_no_score(edit):
    texts = ["b", "a", "d", "c"]

    def editing(prompts, completions, answer, metadata, **kwargs):
        scores = [float(ord(text)) for text in completions]
        for column in (prompts, completions, answer, metadata[0]["numbers"]):
            edit(column)
        return scores

    def after(prompts, completions, answer, metadata, **kwargs):
        assert prompts == answer == completions == texts and metadata[0]["numbers"] == texts
        return [float(ord(text)) for text in completions]

    metadata = [{"numbers": list(texts)} for _ in texts]
    columns = {"prompts": list(texts), "answer": list(texts), "metadata": metadata}
    assert values(editing, texts, **columns) == [98.0, 97.0, 100.0, 99.0]
    assert values(Weighted((editing, 1.0), (after, 1.0)), texts, **columns) == [196.0, 194.0, 200.0, 198.0]
    assert metadata[0]["numbers"] == texts == ["b", "a", "d", "c"]


def test_scores_are_counted_against_the_completions_that_were_given():
    def shorter(completions, **kwargs):
        completions.pop()
        return [1.0] * len(completions)

    with pytest.raises(InvalidReward, match="one float per completion, 3, got 2 values"):
        score(shorter, ["a", "b", "c"])


GIVEN = {
    "float32": np.float32([0.5, 2]),
    "numpy integers": np.array([1, 2]),
    "numpy bools": np.array([True, False]),
    "jax": jnp.array([0.5, 2.0], jnp.float32),
    "jax bfloat16": jnp.array([0.5, 2.0], jnp.bfloat16),
    "scalars": [np.float32(0.5), jnp.float32(2.0)],
    "integers": (1, 2),
    "bools": [True, False],
    "no axis": [np.array(0.5), np.array(2.0)],
}


@pytest.mark.parametrize("case", GIVEN)
def test_numbers_of_every_kind(case):
    expected = [float(value) for value in GIVEN[case]]
    assert values(lambda completions, **_: GIVEN[case], ["a", "b"]) == expected
    assert values(Weighted((lambda completions, **_: GIVEN[case], 1.0)), ["a", "b"]) == expected


@pytest.mark.parametrize(
    "bad", [1j, np.complex64(1), "1.0", b"1", [1.0], np.array([1.0]), float("nan"), -np.inf, 10**400, object()]
)
@pytest.mark.parametrize("weighted", [False, True])
def test_what_is_no_finite_number_fails(bad, weighted):
    def reward(completions, **kwargs):
        return [1.0 if text == "fine" else bad for text in completions]

    scores = score(Weighted((reward, 1.0)) if weighted else reward, ["fine", "bad"])
    assert scores.values.tolist() == [1.0, 0.0] and scores.errors == 1
    assert "must give finite numbers, got" in scores.first_error and len(scores.first_error) <= MAX_TEXT + 3


@pytest.mark.parametrize("values", [{0: 1.0, 1: 1.0}, {1.0, 2.0}, "12", 1.0, np.array(1.0), iter([1.0, 1.0])])
def test_what_is_no_list_is_an_error(values):
    with pytest.raises(InvalidReward, match="must return one float per completion, 2, got a "):
        score(lambda completions, **_: values, ["a", "b"])


def saying(completions, **kwargs):
    """Score what a completion says; "" abstains."""
    if "raise" in completions:
        raise ValueError("of a completion")
    return [float(text) if text else None for text in completions]


def test_a_completion_without_a_score_takes_the_mean_of_its_prompt():
    scores = score(saying, ["-1", "", "2", "5", ""], prompts=["a", "a", "a", "b", "b"])
    assert scores.values.tolist() == [-1.0, 0.5, 2.0, 5.0, 5.0]
    assert scores.has_score.tolist() == [True, False, True, True, False]
    assert (scores.abstained, scores.errors, scores.first_error) == (2, 0, None)
    assert values(saying, ["1", "", "4"], prompts=["a", "b", "c"]) == [1.0, 2.5, 4.0]  # nobody else has the prompt
    assert values(saying, ["0.1", "0.1", "0.1", ""]) == [0.1] * 4  # exactly: equal scores are no signal


def test_a_batch_without_any_score_is_told_once():
    with Scorer(saying, workers=0) as scorer:
        with pytest.warns(UserWarning, match="reward 'saying' gave None for all 2 completions of a batch"):
            scores = scorer(["", ""], ["", ""])
        assert scorer(["", ""], ["", ""]).abstained == 2  # a second warning would be an error
    assert scores.values.tolist() == [0.0, 0.0] and scores.abstained == 2


def test_a_part_without_a_score_is_left_out_of_its_sum():
    def half(completions, **kwargs):
        return [None if len(text) > 1 else 0.5 for text in completions]

    reward = Weighted((saying, 2.0), (half, 1.0))
    assert reward(prompts=[""] * 3, completions=["1", "10", "20"]) == [2.5, 20.0, 40.0]
    assert Weighted((saying, 1.0), (saying, 1.0))(prompts=["", ""], completions=["", "3"]) == [None, 6.0]
    assert Weighted((Weighted((saying, 1.0)), 1.0))(prompts=["", ""], completions=["", "3"]) == [None, 3.0]


@pytest.mark.parametrize(
    ("completions", "minimum", "expected"),
    [
        (["1", "raise", "-1"], None, -1.0),  # a wrong answer gets -1
        (["1", "raise", "1"], None, 0.0),  # no other was wrong; right is not what it was
        (["1", "raise", "0.5"], -2.0, -2.0),
        (["-5", "raise", "1"], -2.0, -5.0),
        (["3", "raise", "4"], 2.0, 2.0),
        (["nan", "raise", "-1"], None, -1.0),
        (["", "raise", "-1"], None, -1.0),
    ],
)
def test_a_failure_is_never_better_than_a_wrong_answer(completions, minimum, expected):
    for reward in (saying, Weighted((tasks.Matches("no"), 1.0), (saying, 1.0))):  # one part fails
        scores = score(reward, completions, minimum=minimum)
        assert scores.values[1] == scores.minimum == expected == scores.values.min()


def test_a_batch_does_not_depend_on_earlier_ones():
    with Scorer(saying, workers=0) as scorer:
        scorer(["", ""], ["-7", "raise"])
        assert scorer(["", ""], ["-1", "raise"]).values.tolist() == [-1.0, -1.0]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_reward_that_fails_on_a_whole_batch_ends_the_run(workers):
    with Scorer(rewards.wayward, workers=workers, timeout=30.0 if workers else None) as scorer:
        with pytest.raises(tasks.RewardFailed) as caught:
            scorer([""] * 3, ["raise", "nan", "text"])
        assert str(caught.value) == (
            "reward 'wayward' failed on all 3 completions; the first error: "
            "reward 'wayward' raised ZeroDivisionError: of a completion"
        )
        assert scorer([""] * 2, ["raise", "fine"]).values.tolist() == [0.0, 1.0]  # still usable


def test_a_reward_that_always_exceeds_its_time_ends_the_run():
    started = time.monotonic()
    message = "failed on all 2 completions; the first error: reward 'wayward' exceeded its time limit of 0.2 s"
    with Scorer(rewards.wayward, workers=2, timeout=0.2) as scorer, pytest.raises(tasks.RewardFailed, match=message):
        scorer(["", ""], ["hang", "hang"])
    assert time.monotonic() - started < 60


class Hanging:
    """A pool in which single completions hang, except some, and calls of several always do."""

    def __init__(self, *fine):
        self.fine, self.jobs = fine, 0

    def map(self, jobs):
        self.jobs += len(jobs)
        return [[1.0] if job.completions in ([text] for text in self.fine) else TimedOut() for job in jobs]

    def close(self):
        pass


def test_a_large_batch_that_hangs_is_not_waited_for():
    with Scorer(rewards.wayward, workers=0) as scorer:
        scorer._pool = pool = Hanging()
        texts = [str(number) for number in range(1000)]
        with pytest.raises(tasks.RewardFailed, match="failed on all 1000 completions together, and on each of 32 alone; the"):
            scorer([""] * 1000, texts)
        assert pool.jobs == 1 + 32
        scorer._pool = pool = Hanging(*texts[::2])  # control
        assert scorer([""] * 1000, texts).timeouts == 500 and pool.jobs == 1 + 32 + 1000


@pytest.mark.parametrize("case", ["raised", "value"])
def test_long_errors_are_cut(case):
    def long(completions, **kwargs):
        if case == "raised":
            raise ValueError("x" * 10_000)
        return ["x" * 10_000] * len(completions)

    with pytest.raises(tasks.RewardFailed) as caught:
        score(long, ["a", "b"])
    assert 400 < len(str(caught.value)) < 700


def test_the_mean_of_equal_values_is_no_signal():
    assert np.mean([0.1] * 3) != 0.1
    assert tasks.fill_with_mean(np.array([0.1, np.nan, 0.1, 0.1]), [0] * 4).tolist() == [0.1] * 4


def test_samples_without_a_score_are_left_out_of_pass_at_k():
    passed = np.array([[True, False, True], [True, False, False], [False, True, True]])
    judged = np.array([[True, False, False], [True, True, False], [True, True, True]])
    np.testing.assert_allclose(tasks.pass_at_k(passed, k=1, has_score=judged), [1.0, 0.5, 2 / 3])
    np.testing.assert_allclose(tasks.pass_at_k(passed, k=2, has_score=judged), [np.nan, 1.0, 1.0])
    assert tasks.pass_at_k([True, False], k=1, has_score=[True, False]) == 1.0
