"""Rewards within a run of `experiments.reason`: those that fail or abstain, in training and on held-out problems."""

import sys
from pathlib import Path

import numpy as np
import pytest

from eggroll.envs.tasks import Row, Scorer, Task
from eggroll.experiments.reason import __main__ as reason
from eggroll.experiments.reason import problem as problems
from eggroll.experiments.reason.config import parse
from eggroll.experiments.reason.evolution import Evolution
from eggroll.experiments.reason.inputs import load, make_sampling, prepare
from eggroll.experiments.reason.problem import Problem, Sampling, Validation
from eggroll.experiments.reason.prompt_lengths import Lengths
from eggroll.llm.decoding import Completions
from eggroll.llm.tokenizers import ByteTokenizer
from tests.experiments.reason.reason_runs import TINY

pytestmark = pytest.mark.usefixtures("standard_promotion")  # optax.adam relies on the former


def saying(completions, **kwargs):
    """Score what a completion says."""
    if "raise" in completions:
        raise ValueError("x" * 10_000)
    return [None if text == "none" else float(text) for text in completions]


def failing(completions, **kwargs):
    raise ZeroDivisionError("no")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("rewards")


@pytest.fixture(autouse=True)
def inside(folder, monkeypatch):
    monkeypatch.chdir(folder)
    give(monkeypatch, saying)


def give(monkeypatch, reward):
    monkeypatch.setattr(sys.modules["eggroll.envs.tasks.arithmetic"], "answer_matches", reward)


def evolution_of(*options):
    config = parse([*TINY, *options])
    config.check()
    inputs = prepare(config)
    return Evolution(config, load(config, inputs), make_sampling(config, inputs.tokenizer))


def completions_of(texts, *shape):
    tokens, length = np.zeros((len(texts), 8), np.int32), np.zeros(len(texts), np.int32)
    for index, text in enumerate(texts):
        tokens[index, : len(text) + 1], length[index] = list(text.encode() + b"\n"), len(text) + 1
    return Completions(tokens.reshape(*shape, 8), length.reshape(shape), np.ones(shape, bool))


def test_a_reward_that_always_fails_ends_the_run(monkeypatch):
    give(monkeypatch, failing)
    message = (
        "error: reward 'failing' failed on all 4 completions; the first error: reward 'failing' raised ZeroDivisionError: no"
    )
    with pytest.raises(SystemExit) as stopped:
        reason.main([*TINY, "--generations", "1", "--folder", "out/failing"])
    assert str(stopped.value) == message


def test_a_wrong_signature_is_refused_before_the_model_is_read(monkeypatch):
    give(monkeypatch, lambda texts: [0.0] * len(texts))
    monkeypatch.setattr(reason, "load", lambda *_: pytest.fail("weights were read"))
    with pytest.raises(SystemExit, match="must take prompts, completions, answer and worked by keyword, such as `def reward"):
        reason.main([*TINY, "--generations", "1", "--folder", "out/signature"])


TWO_OF_TWO = [  # members, prompts, samples
    [["1", "none"], ["none", "none"]],
    [["0", "0"], ["1", "0"]],
]


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ([], [[(1 + 1 / 3) / 2, 0.5], [0, 0.5]]),  # a completion takes the mean of its problem
        (["--pass-k", "1"], [[1, 0.5], [0, 0.5]]),  # it is left out; without any, a member takes the mean of the others
        (["--pass-k", "2"], [[0, 1], [0, 1]]),  # of one sample there is no pass@2
    ],
)
def test_completions_without_a_score_carry_no_information(option, expected):
    evolution = evolution_of("--population-size", "2", "--temperature", "1", "--samples", "2", *option)
    _, rows = evolution.questions(0, seed=0)
    outputs = completions_of(np.ravel(TWO_OF_TWO).tolist(), 2, 4)
    fitness, report = evolution._score(outputs, rows)
    np.testing.assert_allclose(fitness, expected, atol=1e-12)
    assert report.scores.abstained == 3 and (report.scores.values >= 1).sum() == 2


def test_groups_have_means_of_their_own():
    evolution = evolution_of("--group", "2", "--prompts", "1", "--temperature", "1", "--pass-k", "1")
    _, rows = evolution.questions(0, seed=0)
    fitness, _ = evolution._score(completions_of(["1", "none", "none", "0"], 4, 1), rows)
    assert fitness.tolist() == [[1.0], [1.0], [0.0], [0.0]]


def test_the_minimum_is_an_option_and_long_errors_are_cut():
    evolution = evolution_of("--population-size", "2", "--reward-minimum", "-3")
    _, rows = evolution.questions(0, seed=0)
    fitness, report = evolution._score(completions_of(["1", "raise", "0", "none"], 2, 2), rows)
    assert fitness.tolist() == [[1.0, -3.0], [0.0, -3.0]]
    assert report.scores.minimum == -3 and len(report.scores.first_error) < 600


@pytest.mark.parametrize(
    ("texts", "accuracy"),
    [
        (["1", "-1", "1", "raise"], 0.0),  # no better than the wrong answer of another batch
        (["1", "1", "raise"], 2 / 3),  # the last batch has no other completion
        (["1", "0", "none", "none"], 0.5),
        (["1", "1", "none"], 1.0),
    ],
)
def test_held_out_problems(monkeypatch, texts, accuracy):
    monkeypatch.setattr(problems, "BATCH_SIZE", 2)
    task = Task("toy", reward=saying, splits={"test": tuple(Row(str(index), {}) for index in range(len(texts)))})
    problem = Problem(Path(), None, None, ByteTokenizer(), task, "{prompt}", Lengths(8, 8, 8), Scorer(saying, workers=0))
    validation = Validation(problem, "test", size=len(texts), sampling=Sampling(8, 0.0, 1.0, (10,)))
    padded = [*texts, "0"][: 2 * -(-len(texts) // 2)]
    batches = iter(completions_of(padded[first : first + 2], 2) for first in range(0, len(padded), 2))
    monkeypatch.setattr(validation, "_decode", lambda params, prompts: next(batches))
    assert validation(None, examples=4).accuracy == pytest.approx(accuracy)


def test_held_out_problems_without_any_score(monkeypatch):
    with pytest.warns(UserWarning, match="gave None for all 2 completions"):
        test_held_out_problems(monkeypatch, ["none", "none"], 0.0)
