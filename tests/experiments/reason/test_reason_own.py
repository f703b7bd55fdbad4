"""The user's own rows and reward: from the command, from Python, resumed, replayed without the reward, and what is refused."""

import inspect
import json
from pathlib import Path
from types import SimpleNamespace as Namespace

import jax
import numpy as np
import pytest

from eggroll.envs import tasks
from eggroll.experiments.common.contents import check_contents
from eggroll.experiments.reason import __main__ as reason
from eggroll.experiments.reason.config import parse, restore_config
from eggroll.experiments.reason.contents import read_contents
from eggroll.experiments.reason.evolution import Evolution
from eggroll.experiments.reason.improve import improve
from eggroll.experiments.reason.inputs import prepare
from eggroll.journal import __main__ as journal
from eggroll.llm import hf
from eggroll.llm.decoding import Completions
from eggroll.llm.tokenizers import ByteTokenizer
from tests.eggroll.llm.language_models import QWEN3, random_params, write_checkpoint
from tests.experiments.reason.reason_runs import tiny
from tests.tables import slow
from tests.test_readme import code_blocks

pytestmark = [
    pytest.mark.usefixtures("standard_promotion"),
    pytest.mark.filterwarnings("ignore:no completion up to generation"),
]
SUMS = [{"prompt": f"{a}+{b}=", "answer": str(a + b), "worked": f"{a + b}\n"} for a in range(8) for b in range(8)]
SCORE = """
def letters(completions, **kwargs):
    return [float(sum(map(ord, text)) % 7) for text in completions]

def buggy(completions, solution="", **kwargs):
    return [undefined for text in completions]

def column(completions, *, solution, **kwargs):
    return [1.0] * len(completions)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One working folder for all tests: the small model is made once."""
    path = tmp_path_factory.mktemp("own")
    (path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in SUMS))
    (path / "numbers.jsonl").write_text("".join(json.dumps(row | {"worked": 0}) + "\n" for row in SUMS))
    (path / "score.py").write_text(SCORE)
    return path


@pytest.fixture(autouse=True)
def inside(folder, monkeypatch):
    monkeypatch.chdir(folder)


def letters(completions, **kwargs):
    return [float(sum(map(ord, text)) % 7) for text in completions]


OWN = ["--data", "rows.jsonl", "--reward", "score.py:letters"]


def run(capsys, *options):
    reason.main(tiny(*options))
    out = capsys.readouterr().out
    return json.loads(out.splitlines()[-1]), out


@pytest.mark.slow
def test_rows_and_reward_of_a_command(folder, capsys):
    """A run, its journal without the reward, a reward and rows that have changed."""
    summary, out = run(capsys, *OWN, "--generations", "2", "--folder", "out/own")
    assert summary["task"] == "rows" and summary["test_accuracy"] > 0 and "rows.jsonl: train 4" in out
    contents = json.loads((folder / "out/own/journal.header.json").read_text())["recipe"]["options"]["contents"]
    assert sorted(contents) == ["rows.jsonl", "score.py"] and all(len(digest) == 64 for digest in contents.values())
    (folder / "score.py").unlink()
    journal.main(["verify", "out/own"])
    (folder / "score.py").write_text(SCORE)
    for name in ("score.py", "rows.jsonl"):
        content = (folder / name).read_text()
        (folder / name).write_text(content + "\n")
        with pytest.raises(SystemExit, match=f"{name} has changed since the run began: .*; restore it, or continue with --acc"):
            reason.main(tiny(*OWN, "--generations", "3", "--folder", "out/own", "--resume"))
        if name == "rows.jsonl":
            with pytest.raises(SystemExit, match=r"rows.jsonl has changed since the run began: .*; restore it"):
                journal.main(["verify", "out/own"])
        (folder / name).write_text(content)


@pytest.mark.slow
def test_a_changed_reward_is_accepted_on_request(folder, capsys):
    run(capsys, *OWN, "--generations", "1", "--folder", "out/accept")
    (folder / "score.py").write_text(SCORE + "\n")
    summary, _ = run(capsys, *OWN, "--generations", "2", "--folder", "out/accept", "--resume", "--accept-change")
    assert summary["generations"] == 2
    summary, _ = run(capsys, *OWN, "--generations", "3", "--folder", "out/accept", "--resume")  # it is recorded
    assert summary["generations"] == 3
    (folder / "score.py").write_text(SCORE)
    with pytest.raises(SystemExit, match=r"score.py has changed since the run began"):
        run(capsys, *OWN, "--generations", "4", "--folder", "out/accept", "--resume")


def test_a_reward_takes_the_place_of_a_tasks_own():
    inputs = prepare(parse(tiny("--reward", "last_number", "score.py:letters=0.5")))
    assert inputs.task.reward(prompts=[""], completions=["so 2"], answer=["2"], worked=[""]) == [1 + letters(["so 2"])[0] / 2]
    assert inputs.task.split("test")[0].columns["worked"]


@pytest.mark.parametrize("length", [[], ["--prompt-length", "9"]])
def test_a_row_without_tokens_is_named_before_a_run(length, monkeypatch):
    Path("empty.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*SUMS, {**SUMS[0], "prompt": ""}]))
    config = parse(tiny("--data", "empty.jsonl", *OWN[2:], *length))
    prepare(config)  # every text begins with a token
    monkeypatch.setattr(ByteTokenizer, "prefix", ())
    with pytest.raises(ValueError, match=r"prompts must have tokens, got '' in the row of the \w+ split with answer '0'"):
        prepare(config)


def test_options_are_restored_from_a_journal(folder):
    config = parse(tiny(*OWN, "--key-column", "answer", "--prompt-column", "prompt"))
    assert restore_config(json.loads(json.dumps(config.options()))).options() == config.options()
    plain = parse(tiny()).options()
    assert [plain[name] for name in ("data", "reward", "contents", "key_column", "prompt_column")] == [None] * 5  # as if absent


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--data", "rows.jsonl"], "data needs a --reward: FILE.py:FUNCTION, MODULE:FUNCTION or one of last_number"),
        (["--data", "none.jsonl", *OWN[2:]], "data must be a JSONL file, there is none at none.jsonl."),
        ([*OWN[:2], "--reward", "score.py:nothing"], "which has letters, buggy, column."),
        ([*OWN[:2], "--reward", "score.py:column"], "it needs the column 'solution', the rows have answer and worked."),
        ([*OWN[:2], "--reward", "score.py:buggy"], "reward 'buggy' raised NameError: name 'undefined' is not defined"),
        (
            ["--task", "gsm8k", "--task-options", "validation=8"],
            "--task-options: task gsm8k needs train and test, which are JSONL files, such as train=",
        ),
        (["--model", "model.gguf"], "got a GGUF file: `python -m eggroll.llm.fetch model.gguf FOLDER` converts it."),
        (["--model", "HuggingFaceTB/SmolLM2-135M-Instruct"], "`python -m eggroll.llm.fetch smollm2` makes one of SmolLM2"),
        ([*OWN, "--prompts", "60"], "prompts must be at most 4"),
        (["--data", "numbers.jsonl", *OWN[2:]], "the column 'worked' must be text for a warm start, got 0; give --model."),
    ],
)
def test_what_users_get_wrong_is_one_clear_error(options, sentence, monkeypatch):
    monkeypatch.setattr(hf, "load", lambda *_: pytest.fail("weights were read"))
    with pytest.raises(SystemExit) as stopped:
        reason.main(tiny(*options, "--folder", "out/wrong"))
    text = str(stopped.value)
    assert text.startswith("error: ") and sentence in text and "\n" not in text


@pytest.mark.parametrize("wrong", ["weights", "shape", "tokenizer", slow("eos"), "gptq"])
def test_what_does_not_load_is_not_planned(wrong, tmp_path, monkeypatch):
    pytest.importorskip("safetensors")
    pytest.importorskip("tokenizers")
    model = hf.save(tmp_path / "model", QWEN3, random_params(QWEN3))
    (model / "SHA256SUMS").unlink()
    config = json.loads((model / "config.json").read_text())
    words = {
        "weights": "has no weights: expected model.safetensors",
        "shape": "has shape .*, but config.json expects",
        "tokenizer": "there is no tokenizer at",
        "gptq": "config.json describes weights quantised by 'gptq', which are not read: use the model's unquantised folder",
    }
    if wrong == "weights":
        (model / "model.safetensors").unlink()
    if wrong in ("shape", "gptq"):
        more = {"intermediate_size": 7} if wrong == "shape" else {"quantization_config": {"quant_method": "gptq", "bits": 4}}
        (model / "config.json").write_text(json.dumps(config | more))
    if wrong == "eos":
        write_checkpoint(model)
        (model / "generation_config.json").unlink(missing_ok=True)
        (model / "SHA256SUMS").unlink(missing_ok=True)
        fields = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps(fields | {"eos_token_id": None}))
        words["eos"] = "names no eos_token_id: give --stop"
    with pytest.raises(SystemExit, match=words[wrong]):
        reason.main(["--model", str(model), "--plan", "--memory-budget", "1000000"])


def sizes():
    return dict(population_size=4, prompts=2, max_new_tokens=4, generations=1, check_every=1, validation_size=4, test_size=4)


@pytest.mark.slow
def test_a_call_from_python_is_the_command(folder, capsys):
    write_checkpoint(folder / "qwen")
    rows = [{"prompt": row["prompt"], "answer": row["answer"]} for row in SUMS]
    tuned = improve("qwen", rows, letters, out="out/python", **sizes())
    (folder / "bare.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    named = improve("qwen", "bare.jsonl", "score.py:letters", out="out/named", **sizes())
    params = [jax.tree.leaves(hf.load(run.model)[2]) for run in (tuned, named)]
    assert all(np.array_equal(one, other) for one, other in zip(*params, strict=True))
    assert tuned.summary["generations"] == 1 and tuned.model == folder / "out/python/model"
    journal.main(["verify", "out/python"])
    longer = improve("qwen", rows, letters, out="out/python", resume=True, **sizes() | {"generations": 2})
    assert longer.summary["generations"] == 2
    with pytest.raises(ValueError, match="has a run with other settings: data"):
        improve("qwen", rows[1:], letters, out="out/python", resume=True, **sizes())
    with pytest.raises(ValueError, match="has a run with other settings: reward"):
        improve("qwen", rows, lambda completions, **_: [1.0] * len(completions), out="out/python", resume=True, **sizes())


@pytest.mark.parametrize(
    ("rows", "options", "words"),
    [
        ([{"prompt": "a", "answer": object()}], {}, "rows must be of JSON values: Object of type object is not JSON"),
        ([{"prompt": "a"}], {"steps": 3}, "options must be of accept_change, .*, got 'steps'"),
        ([{"prompt": "a"}], {"probe": True}, "options must be of .*, got 'probe'"),
        ([{"prompt": "a"}], {"int8": {"sigmas": 1.0}}, "options must be of .*, got 'int8.sigmas'"),
        ([{"prompt": "a"}], {"preset": "smol"}, "preset must be one of small, .*, got 'smol'"),
        ([{"prompt": "a"}], {"optimizer": "adamw"}, "optimizer must be one of adam, sgd, got 'adamw'"),
        ([{"prompt": "a"}], {"population_size": 3}, "population_size must be a multiple of group"),
    ],
)
def test_wrong_arguments_in_python_leave_the_folder_as_it_is(rows, options, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        improve("qwen", rows, letters, out=tmp_path, **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("reward", [[letters], [], None, ["score.py:letters", letters]])
def test_a_reward_in_python_is_a_function_or_names(reward, tmp_path):
    with pytest.raises(ValueError, match=r"reward must be one function, or names such as score\.py:correct, got "):
        improve("qwen", SUMS, reward, out=tmp_path)


def test_rows_of_an_earlier_run_are_not_replaced(tmp_path, monkeypatch):
    """Its journal is verified from them, whatever becomes of the next call."""
    given = []
    monkeypatch.setattr("eggroll.experiments.reason.improve.run", lambda config, reward: given.append(config.data) or {})
    for rows in (SUMS, SUMS[1:], SUMS):
        improve("qwen", rows, letters, out=tmp_path)
    assert given[0] == given[2] != given[1] and all(data.parent == tmp_path for data in given)
    assert [len(data.read_text().splitlines()) for data in given] == [64, 63, 64]


def test_a_function_is_named_and_its_source_is_one_of_the_contents(monkeypatch):
    """As for the file of a reward: a change is refused, or accepted on request."""
    known = read_contents(None, ("letters",), function=letters)
    assert list(known) == ["reward letters"] and read_contents(None, ("len",), function=len) is None
    monkeypatch.setattr(inspect, "getsource", lambda function: "another")
    changed = read_contents(None, ("letters",), function=letters)
    with pytest.raises(ValueError, match="reward letters has changed since the run began"):
        check_contents(known, changed, advice="restore it")


@pytest.mark.slow
@pytest.mark.parametrize("accept", [False, True])
def test_a_changed_function_is_accepted_on_request(accept, folder, capsys, monkeypatch):
    write_checkpoint(folder / "qwen")
    options = sizes() | {"out": f"out/function-{accept}"}
    improve("qwen", SUMS, letters, **options)
    monkeypatch.setattr(inspect, "getsource", lambda function: "another")
    options |= {"generations": 2, "resume": True}
    if not accept:
        with pytest.raises(ValueError, match="reward letters has changed since the run began"):
            improve("qwen", SUMS, letters, **options)
        return
    assert improve("qwen", SUMS, letters, **options, accept_change=True).summary["generations"] == 2
    assert improve("qwen", SUMS, letters, **options | {"generations": 3}).summary["generations"] == 3  # it is recorded


def test_a_replay_computes_no_lengths(folder, monkeypatch):
    """A held-out prompt that the run did not ask is as long as it likes."""

    def write(rows):
        (folder / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return tasks.read_rows("long.jsonl").splits["test"][-1].prompt

    long = [row | {"prompt": row["prompt"] + " " * 33_000} for row in SUMS]
    last = write(long)
    assert write([*SUMS, *(row for row in long if row["prompt"] == last)]) == last
    config = parse(tiny("--data", "long.jsonl", *OWN[2:]))
    options = config.options() | {"seed": 0}
    assert prepare(config).lengths.longest < 10
    with pytest.raises(ValueError, match="do not fit the model's context of 32768 tokens"):
        prepare(restore_config(options))
    monkeypatch.setattr("eggroll.experiments.reason.inputs.encode_prompt", pytest.fail)  # no row is read
    monkeypatch.setattr(reason, "load", lambda config, inputs: inputs)
    monkeypatch.setattr(reason, "Evolution", lambda config, inputs, _: Namespace(strategy=inputs, start=lambda seed: seed))
    inputs, _ = reason.remake(options)
    assert inputs.lengths.of_batch(5, held_out=False, prompt="") == 16


def test_options_in_python_are_those_of_the_command(monkeypatch, tmp_path):
    given = []
    monkeypatch.setattr("eggroll.experiments.reason.improve.run", lambda config, reward: given.append(config) or {})
    options = {"preset": "smollm2-sums", "stop": "END", "freeze": ["resident/.*"], "weights": "int8", "int8": {"sigma": 1.0}}
    improve("qwen", [{"prompt": "a"}], letters, out=tmp_path, **options)
    more = ["--weights", "int8", "--int8.sigma", "1.0", "--stop", "END", "--freeze", "resident/.*", "--model", "qwen"]
    rows = ["--data", str(given[0].data), "--folder", str(tmp_path), "--reward", *given[0].reward]
    assert given == [parse(["--preset", "smollm2-sums", *more, *rows])]


@pytest.mark.parametrize(
    ("texts", "own", "expected", "unperturbed"),
    [
        (["1", "2", "3", "-1"], "x", [1, 2, 3, -1], -1),  # it fails there alone: the lowest score
        (["0", "0", "1", "none"], "1", [0, 0, 1, 1 / 3], 1),  # the mean is that of the members
        (["1", "1", "1", "x"], "-5", [1, 1, 1, 0], -5),  # and so is the lowest score, at most 0
        (["1", "1", "2", "2"], "none", [1, 1, 2, 2], 1.5),
    ],
)
def test_the_unperturbed_model_is_scored_with_the_members_and_changes_nothing_of_theirs(texts, own, expected, unperturbed):
    def odd(completions, **_):
        return [None if text == "none" else float(text) if text != "x" else undefined for text in completions]  # noqa: F821

    scorer, evolution, rows = tasks.Scorer(odd, workers=0), object.__new__(Evolution), [tasks.Row("", {})]
    problem = Namespace(
        score_beside=lambda asked, outputs, count: (given, *scorer.score_beside([""] * len(given), given, {}, count=count))
    )
    evolution.__dict__.update(_config=parse(["--prompts", "1"]), _problem=problem, _await_checkpoint=lambda: None)
    outputs, compared = (Completions(np.ones((n, 1, 1)), np.ones((n, 1)), np.ones((n, 1))) for n in (4, 1))
    given = texts
    alone, _ = evolution._score(outputs, [rows])
    given = [*texts, own]
    fitness, report = evolution._score(outputs, [rows], compared)
    np.testing.assert_allclose(fitness.ravel(), expected, rtol=1e-6)
    np.testing.assert_array_equal(fitness, alone)
    assert report.comparison.unperturbed.tolist() == [[unperturbed]]
    assert report.scores.errors == ("x" in texts)


def test_members_that_all_fail_end_the_run_though_the_unperturbed_model_does_not():
    scorer = tasks.Scorer(lambda completions, **_: [float(text) for text in completions], workers=0)
    with pytest.raises(tasks.RewardFailed, match="failed on all 2 completions"):
        scorer.score_beside([""] * 3, ["x", "x", "1"], {}, count=2)


@pytest.mark.slow
def test_the_example_of_the_page_runs(tmp_path, monkeypatch, capsys):
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    write_checkpoint(tmp_path / "smollm2")
    (source,) = (block for block in code_blocks("docs/reasoning.md", "python") if "improve(" in block)
    assert len(source.splitlines()) <= 10
    names: dict = {}
    exec(compile(source.replace("generations=20", "generations=1"), "docs/reasoning.md", "exec"), names)
    assert Path(names["tuned"].model, "model.safetensors").exists()
