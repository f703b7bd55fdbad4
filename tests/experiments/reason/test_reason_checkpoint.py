"""A checkpoint of transformers, improved by command: tasks of several kinds, scoring in processes, and what users get wrong."""

import json
import re

import jax
import numpy as np
import pytest

from eggroll.experiments.reason import __main__ as reason
from eggroll.llm import hf
from tests.eggroll.llm.language_models import write_checkpoint

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("standard_promotion"),
    pytest.mark.filterwarnings("ignore:no completion up to generation"),
]
TINY = [
    "--model",
    "qwen",
    "--population-size",
    "4",
    "--prompts",
    "2",
    "--max-new-tokens",
    "6",
    "--generations",
    "2",
    "--check-every",
    "1",
]
TINY += ["--validation-size", "4", "--test-size", "4", "--examples", "1"]
PROBLEMS = [{"question": f"What is {n} + {n}?", "answer": f"{n} + {n} is {2 * n}.\n#### {2 * n}"} for n in range(12)]
GSM8K = ["--task", "gsm8k", "--task-options", "train=train.jsonl", "test=test.jsonl", "validation=4"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A working folder with a checkpoint and problems."""
    path = tmp_path_factory.mktemp("checkpoint")
    write_checkpoint(path / "qwen")
    for name, rows in (("train", PROBLEMS[:8]), ("test", PROBLEMS[8:]), ("bare", [{"question": "1?", "solution": "1"}])):
        (path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(autouse=True)
def inside(folder, monkeypatch):
    monkeypatch.chdir(folder)


def lengths(prompts, completions, **_):
    """A reward that a random model gets some of; processes that score import it."""
    return [float(len(text) % 3) for text in completions]


def run(capsys, *options):
    reason.main([*TINY, *options])
    out = capsys.readouterr().out
    return json.loads(out.splitlines()[-1]), out


def test_gsm8k_from_files_with_scoring_processes_and_the_chat_template(folder, capsys, monkeypatch):
    monkeypatch.setattr("eggroll.envs.tasks.files.number_matches", lengths)
    options = [*GSM8K, "--template", "chat", "--workers", "2", "--folder", "out/gsm8k"]
    summary, out = run(capsys, *options)
    assert summary["generations"] == 2 and summary["failed_rewards"] == 0 and "What is" in out
    before, after = (jax.tree.leaves(hf.load(folder / name)[2]) for name in ("qwen", "out/gsm8k/model"))
    equal = all(np.array_equal(one, other) for one, other in zip(before, after, strict=True))
    assert equal == (summary["best_generation"] == 0)  # the start, if no check beat it
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (folder / "out/gsm8k/model" / name).exists(), name


def test_countdown_of_reasoning_gym(capsys):
    pytest.importorskip("reasoning_gym")
    options = ["--task", "countdown", "--task-options", "train=16", "validation=4", "test=4", "--folder", "out/countdown"]
    with pytest.warns(UserWarning, match=r"no completion up to generation 1 scored more than 0\.01"):  # it gives that for any
        summary, _ = run(capsys, *options, "--template", r"User: {prompt}\n\nAssistant: <think")
    assert summary["generations"] == 2 and summary["task"] == "countdown"


def test_the_template_of_a_shell_has_line_ends(capsys):
    _, out = run(capsys, *GSM8K, "--template", r"Q: {prompt}\nA:", "--plan", "--memory-budget", "100000000")
    length = int(re.search(r"2 texts of (\d+) \+ 6 tokens", out)[1])
    _, out = run(capsys, *GSM8K, "--template", "Q: {prompt}\nA:", "--plan", "--memory-budget", "100000000")
    assert int(re.search(r"2 texts of (\d+) \+ 6 tokens", out)[1]) == length


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ([*GSM8K, "--max-new-tokens", "510"], "do not fit the model's context of 512 tokens."),
        ([*GSM8K, "--prompt-length", "3"], "prompt_length must be at least"),
        ([*GSM8K, "--template", "<|user|>{prompt}"], "the model's tokenizer has no special token '<|user|>'"),
        (["--task", "gsm8k", "--task-options", "train=bare.jsonl", "test=test.jsonl"], "line 1: field 'answer' is missing"),
        (
            ["--task", "gsm8k", "--task-options", "train=none.jsonl", "test=test.jsonl"],
            "option train of task gsm8k must be a JSONL file",
        ),
        (["--task", "gsm8k", "--task-options", "train=train.jsonl", "test=test.jsonl"], "validation must be between 1 and 7"),
        (
            ["--task", "gsm8k"],
            "--task-options: task gsm8k needs train and test, which are JSONL files, such as train=train.jsonl",
        ),
        (["--task", "reasoning_gym/none"], "reasoning_gym must have the data set, got 'none'; it has"),
    ],
)
def test_what_users_get_wrong_is_refused_by_a_clear_error(options, sentence):
    if "none" in options[-1] and "reasoning" in options[-1]:
        pytest.importorskip("reasoning_gym")
    with pytest.raises(SystemExit) as stopped:
        reason.main([*TINY, "--folder", "out/wrong", *options])
    text = str(stopped.value)
    assert text.startswith("error: ") and sentence in text and "\n" not in text


def test_a_reward_of_the_wrong_length_is_refused_by_a_clear_error(monkeypatch):
    monkeypatch.setattr("eggroll.envs.tasks.files.number_matches", lambda prompts, completions, **_: [1.0])
    with pytest.raises(SystemExit, match="must return one float per completion, 4, got 1 values"):
        reason.main([*TINY, *GSM8K, "--folder", "out/length"])


def test_small_models_have_no_chat_template():
    with pytest.raises(SystemExit, match="template chat needs --model, a checkpoint whose tokenizer has a chat template"):
        reason.main(["--template", "chat"])
