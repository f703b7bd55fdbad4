"""Improving a model on verifiable rewards: from the command to the files, resuming, replaying, options, and what is refused."""

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import eggroll
from eggroll.envs import tasks
from eggroll.experiments.reason import __main__ as reason
from eggroll.experiments.reason.config import parse, restore_config
from eggroll.experiments.reason.evolution import Evolution, make_optimizer
from eggroll.experiments.reason.inputs import load, make_sampling, prepare
from eggroll.experiments.reason.measure.memory import RunMemory
from eggroll.experiments.reason.problem import Problem, count_until, read_until
from eggroll.experiments.reason.progress import Progress
from eggroll.journal import __main__ as journal
from eggroll.llm import hf
from eggroll.llm.decoding import Completions
from eggroll.llm.shards import CONFIG
from tests.experiments.reason.reason_runs import TINY, letters, measure_copies, tiny
from tests.tables import slow

pytestmark = [
    pytest.mark.usefixtures("standard_promotion"),  # optax.adam relies on the former
    pytest.mark.filterwarnings("ignore:no completion up to generation"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One working folder for all tests: the small model is made once."""
    return tmp_path_factory.mktemp("reason")


@pytest.fixture(autouse=True)
def inside(folder, monkeypatch):
    monkeypatch.chdir(folder)


@pytest.fixture
def signal(monkeypatch):
    """A reward that a model which has learned nothing gets some of."""
    monkeypatch.setattr(sys.modules["eggroll.envs.tasks.arithmetic"], "answer_matches", letters)


@pytest.fixture
def last_is_best(monkeypatch):
    """Export the parameters of the last check, whatever it finds."""
    check = Progress.check

    def check_and_keep(self, *given, **options):
        self.best = -1.0
        return check(self, *given, **options)

    monkeypatch.setattr(Progress, "check", check_and_keep)


def run(capsys, *options):
    reason.main(tiny(*options))
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def weights(path):
    return hf.load(path / "model")[2]


def equal(one, other):
    return all(np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (one, other)), strict=True))


def test_a_run_leaves_its_files_and_holds_its_state_once(folder, capsys, signal, monkeypatch):
    copies = measure_copies(monkeypatch)
    whole = run(capsys, "--generations", "2", "--folder", "out/whole")
    assert whole["generations"] == 2 and whole["algorithm"] == "eggroll" and whole["ended"] == "generations"
    lines = [json.loads(line) for line in (folder / "out/whole/metrics.jsonl").read_text().splitlines()]
    assert ["texts_changed" in line for line in lines] == [True, False] and lines[0]["unperturbed_reward"] > 0
    assert set(lines[0]["leaf_norms"]) > {"blocks/q", "resident/embed"} and lines[0]["update_over_weights"] > 0
    assert "ended after 2 generations" in (folder / "out/whole/log.txt").read_text()
    for name in ("metrics.jsonl", "curves.png", "journal.bin", "summary.json", "model/config.json", "checkpoints"):
        assert (folder / "out/whole" / name).exists(), name
    assert len(copies) == 2 and max(copies) < 3.5, copies  # with Adam: the parameters and two moments


@pytest.mark.slow
def test_a_run_goes_on_bit_for_bit(folder, capsys, signal):
    whole = run(capsys, "--generations", "4", "--folder", "out/whole")
    first = run(capsys, "--generations", "3", "--folder", "out/parts")
    assert first["ended"] == "generations" and first["best_generation"] in (0, 2, 3)
    lines = [json.loads(line) for line in (folder / "out/parts/metrics.jsonl").read_text().splitlines()]
    assert [(line["generation"], "validation_accuracy" in line) for line in lines[2:]] == [(2, False), (3, True)]
    parts = run(capsys, "--generations", "4", "--folder", "out/parts", "--resume")
    assert whole["generations"] == parts["generations"] == 4
    out = folder / "out"
    assert (out / "whole/journal.bin").stat().st_size == (out / "parts/journal.bin").stat().st_size
    assert equal(weights(out / "whole"), weights(out / "parts"))
    lines = [json.loads(line) for line in (out / "parts/metrics.jsonl").read_text().splitlines()]
    assert [line["generation"] for line in lines] == [0, 1, 2, 3]
    assert ["validation_accuracy" in line for line in lines] == [False, True, False, True]
    checks = [parts["validation_accuracy_before"], *(line.get("validation_accuracy", -1) for line in lines)]
    assert parts["validation_accuracy"] == max(checks)  # the best is exported
    assert parts["best_generation"] == (0 if checks[0] == max(checks) else 1 + len(lines) - checks[::-1].index(max(checks)) - 1)
    assert all(line["tokens"] > 0 and line["moved"] > 0 for line in lines)
    journal.main(["verify", str(out / "whole")])  # rebuilt from scalars by the recipe in its header
    assert "2 checkpoints are rebuilt bit for bit" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [
        ["--int8.threshold", "1", "--precision", "stochastic"],
        ["--start.architecture", "rwkv7"],
        ["--optimizer", "sgd", "--int8.optimizer", "sgd", "--precision", "feedback", "--int8.window", "2"],
    ],
)
def test_int8_matrices_run_go_on_and_are_written_as_floats(more, folder, capsys, signal):
    options, out = ["--weights", "int8", *more], folder / f"out/int8-{len(more)}"
    run(capsys, *options, "--generations", "3", "--folder", f"{out}/whole")
    run(capsys, *options, "--generations", "2", "--folder", f"{out}/parts")
    summary = run(capsys, *options, "--generations", "3", "--folder", f"{out}/parts", "--resume")
    assert summary["generations"] == 3 and equal(weights(out / "whole"), weights(out / "parts"))
    lines = [json.loads(line) for line in (out / "parts/metrics.jsonl").read_text().splitlines()]
    assert [line["generation"] for line in lines] == [0, 1, 2, 3] and all(line["moved"] > 0 for line in lines[:3])
    matrices = [leaf for leaf in jax.tree.leaves(weights(out / "whole")["blocks"]) if leaf.ndim == 3]
    assert matrices and all(leaf.dtype == jnp.float32 for leaf in matrices)
    journal.main(["verify", f"{out}/whole"])
    assert "rebuilt bit for bit" in capsys.readouterr().out
    summary = run(capsys, *options, "--plan", "--memory-budget", "1000000")
    assert summary["model"].endswith("float32, int8 matrices")


@pytest.mark.slow
def test_grpo_in_the_same_frame(folder, capsys, signal, last_is_best):
    options = ["--algorithm", "grpo", "--grpo.prompts", "2", "--grpo.samples", "2", "--generations", "2", "--seeds", "2"]
    summary = run(capsys, *options, "--folder", "out/grpo")
    assert [row["generations"] for row in summary["seeds"]] == [2, 2] and summary["training_seconds"] > 0
    assert not equal(weights(folder / "out/grpo/seed-0"), weights(folder / "out/grpo/seed-1"))
    lines = (folder / "out/grpo/seed-1/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["generation"] for line in lines] == [0, 1] and "validation_accuracy" in json.loads(lines[1])


def evolution_of(*options):
    config = parse([*TINY, *options])
    config.check()
    inputs = prepare(config)
    return Evolution(config, load(config, inputs), make_sampling(config, inputs.tokenizer))


@pytest.mark.slow
@pytest.mark.parametrize(("group", "shape"), [slow([], (4, 9)), (["--group", "2"], (2, 4, 9)), slow(["--group", "4"], (4, 9))])
def test_groups_get_problems_of_their_own(group, shape):
    evolution = evolution_of(*group, "--temperature", "1", "--samples", "2", "--prompt-length", "9")
    (prompts, key), rows = evolution.questions(3, seed=0)
    assert prompts.tokens.shape == shape and key.shape == (*shape[:-2], 2)
    assert [len(own) for own in rows] == [4] * len(rows) and rows[0][0] == rows[0][1] != rows[0][2]
    assert len({row.prompt for own in rows for row in own}) == 2 * len(rows)
    state = evolution.start(seed=0)
    state, metrics = evolution.strategy.step(state, evolution.questions(0, seed=0))
    assert metrics.fitness.shape == (4, 2) and int(state.generation) == 1


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_an_anchor_pulls_int8_matrices_by_their_step_size(optimizer):
    def step(anchor):
        given = ["--weights", "int8", "--int8.optimizer", optimizer, "--anchor", str(anchor)]
        optimizer_of_run = make_optimizer(parse([*TINY, *given]))
        params = {"w": {"int8": jnp.full((2, 2), 5.0), "scale": jnp.ones(2)}, "b": jnp.ones(2)}
        state, moved = optimizer_of_run.init(params), jax.tree.map(lambda leaf: leaf + 3, params)
        updates, _ = optimizer_of_run.update(jax.tree.map(jnp.zeros_like, params), state, moved)
        return float(updates["w"]["int8"][0, 0]), float(updates["b"][0])

    integers, floats = step(0.1)
    rate = 0.3 if optimizer == "adam" else eggroll.paper_learning_rate(0.3 / 3.0, sigma=3.0, population_size=4)
    assert (integers, floats) == pytest.approx((-rate * 0.1 * 3, -0.001 * 0.1 * 3)) and step(0.0) == (0, 0)


def answered(rows, right):
    """Completions of one member after the other: the answer of its problem, or nothing."""
    tokens, length = np.zeros((len(rows), 4), np.int32), np.zeros(len(rows), np.int32)
    for index, (row, good) in enumerate(zip(rows, right, strict=True)):
        text = (row.columns["answer"] if good else "").encode() + b"\n"
        tokens[index, : len(text)], length[index] = list(text), len(text)
    return Completions(tokens, length, np.ones(len(rows), bool))


@pytest.mark.parametrize(("option", "expected"), [([], [[0.5, 0], [1, 0.5]]), (["--pass-k", "2"], [[1, 0], [1, 1]])])
def test_fitness_is_the_reward_of_the_right_problem(option, expected):
    evolution = evolution_of("--population-size", "2", "--temperature", "1", "--samples", "2", *option)
    _, rows = evolution.questions(0, seed=0)
    right = np.array([[[1, 0], [0, 0]], [[1, 1], [0, 1]]])
    outputs = answered([*rows[0], *rows[0]], right.reshape(-1))
    outputs = Completions(outputs.tokens.reshape(2, 4, 4), outputs.length.reshape(2, 4), outputs.ended.reshape(2, 4))
    fitness, report = evolution._score(outputs, rows)
    np.testing.assert_array_equal(fitness, expected)
    assert report.tokens == outputs.length.sum() and (report.scores.values > report.scores.minimum).sum() == 4
    shuffled = [[row for row in rows[0][::-1]]]  # control: problems of another order
    assert not np.array_equal(evolution._score(outputs, shuffled)[0], expected)


def test_partial_scores_alone_are_no_pass_and_say_so_once():
    evolution = object.__new__(Evolution)
    evolution.__dict__.update(_config=parse([*TINY, "--pass-k", "2"]), _has_warned=False)
    evolution._warn(np.array([0.5, 0.5]))
    evolution._warn(np.array([0.5, 1.0]))
    with pytest.warns(UserWarning, match="scores are between 0 and 0.5, but pass_k counts only those of at least 1 as right"):
        evolution._warn(np.array([0.0, 0.5]))
    evolution._warn(np.array([0.0, 0.5]))
    evolution.__dict__.update(_config=parse(TINY), _has_warned=False)
    evolution._warn(np.array([0.0, 0.5]))


@pytest.mark.slow
def test_a_mesh_gives_the_completions_of_one_device(capsys, signal):
    runs = [
        run(capsys, "--generations", "2", "--folder", f"out/mesh-{name}", *mesh)
        for name, mesh in (("without", []), ("with", ["--mesh", "population=1"]))
    ]
    assert runs[0]["tokens"] == runs[1]["tokens"]


@pytest.mark.slow
def test_nothing_ever_scores_says_so(capsys):
    with pytest.warns(UserWarning, match="no completion up to generation 2 scored more than 0"):
        run(capsys, "--generations", "2", "--folder", "out/silent")


def test_stops_are_tokens_or_cut_texts():
    inputs = prepare(parse(TINY))
    sampling = lambda *options: make_sampling(parse([*TINY, *options]), inputs.tokenizer)  # noqa: E731
    assert sampling() == sampling("--stop", "\\n") == sampling("--stop-token-ids", "10")  # as a shell passes the end of a line
    assert sampling("--stop", ";", "\n").stop_token_ids == (59, 10)
    assert sampling("--stop").stop_token_ids == ()
    assert sampling("--stop", "\\nQ:", ";").stop_token_ids == (59,)
    for text, cut in (("4\nQ: 5;", "4"), ("4;\nQ:", "4"), ("4\nA:", "4\nA:"), ("é;", "é")):
        assert read_until(inputs.tokenizer, inputs.tokenizer.encode(text), ("\nQ:", ";")) == cut
    for token in (257, -7):
        with pytest.raises(ValueError, match=rf"stop_token_ids must be tokens, from 0 to 256, got {token}\."):
            sampling("--stop-token-ids", "10", str(token))


class Words:
    """A tokenizer of some words, of which those in brackets are special."""

    words = ("a", "b", "<end>", "4", "\n\n", "\n", "Q", ":", "4\n")
    vocab_size, prefix = len(words), ()

    def encode(self, text):
        found = [token for token, word in enumerate(self.words) if text.startswith(word)][-1:]
        return [*found, *self.encode(text.removeprefix(self.words[found[0]]))] if text else []

    def decode(self, tokens, *, special=False):
        return "".join(self.words[token] for token in tokens if special or token != 2)


@pytest.mark.parametrize(
    ("words", "stop", "text", "count"),
    [
        (["4", "\n\n", "a"], ("\n",), "4", 2),  # within another token
        (["4\n", "a", "\n"], ("\n",), "4", 1),
        (["4", "Q", ":", "a"], ("Q:",), "4", 3),
        (["4", "<end>", "\n", "a"], ("<end>\n",), "4", 3),  # special tokens are in no text, but in stop texts
        (["b", "<end>", "4\n", "a", "a"], ("\n",), "b4", 3),
        (["4", "<end>", "a", "\n\n"], ("Q:", "a\n"), "4", 4),
        (["4", "<end>", "a"], ("Q:",), "4a", 3),
        (["4", "<end>", "a"], (), "4a", 3),
    ],
)
def test_stop_texts_are_found_in_what_tokens_say(words, stop, text, count):
    tokenizer = Words()
    tokens = [tokenizer.words.index(word) for word in words]
    assert read_until(tokenizer, tokens, stop) == text and count_until(tokenizer, tokens, stop) == count
    problem = Problem(Path(), None, None, tokenizer, None, "", None, None, stop)
    given = Completions(np.array([tokens, tokens]), np.array([len(tokens), 1]), np.array([False, False]))
    assert problem.count_tokens(given).tolist() == [count, 1] and problem.texts(given)[0] == text


def test_a_checkpoints_end_is_a_stop_with_any_stop_text(tmp_path):
    (tmp_path / "config.json").write_text('{"eos_token_id": 0}')
    sampling = lambda *options: make_sampling(parse(["--model", str(tmp_path), *options]), Words()).stop_token_ids  # noqa: E731
    with_eos = sampling("--stop", "Q:", "\n")
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 5]}')
    assert with_eos == (0, 5) and sampling() == sampling("--stop") == sampling("--stop", "\\n") == (2, 5)
    assert sampling("--stop-token-ids", "1") == (1,) and sampling("--stop-token-ids") == ()
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "generation_config.json").unlink()
    assert sampling("--stop", "Q:") == ()
    with pytest.raises(ValueError, match="names no eos_token_id: give --stop"):
        sampling()


@pytest.mark.slow
def test_prompts_are_padded_to_what_they_need(folder):
    config = parse([*TINY, "--template", "Add: {prompt}"])
    inputs = prepare(config)
    problem, sampling = load(config, inputs), make_sampling(config, inputs.tokenizer)
    rows = [tasks.Row("1+1=", {}), tasks.Row("17+25=", {})]
    assert inputs.lengths[:2] == (12, 12) and problem.prompts(rows).tokens.shape == (2, 12)
    longer = [*rows, tasks.Row("17+25+17=", {})]
    assert problem.prompts(longer).tokens.shape == (3, 16) and problem.prompts(rows[:1], samples=2).tokens.shape == (2, 12)
    short, long = (problem.complete(problem.params, problem.prompts(some), None, sampling=sampling) for some in (rows, longer))
    assert problem.texts(short) == problem.texts(long)[:2] and not problem.prompts(longer).mask[0, :6].any()
    with pytest.raises(ValueError, match=r"prompt_length must be at least 16, .* there is room for 12\."):
        inputs.lengths._replace(most=12).of_batch(16, held_out=False, prompt="17+25+17=")


def test_older_journals_have_older_names_of_options():
    options = json.loads(json.dumps(parse([*TINY, "--stop-token-ids", "10"]).options()))
    absent = ("max_new_tokens", "stop", "stop_token_ids", "reward_minimum")
    older = {name: value for name, value in options.items() if name not in absent}
    assert options["reward_minimum"] is None  # as good as absent, so that older runs are resumed
    older |= {"room": options["max_new_tokens"], "ending": options["stop_token_ids"]}
    assert restore_config(older).options() == parse([*TINY, "--stop-token-ids", "10"]).options()


def failing(completions, **_):
    """Fail on a quarter of the completions, and abstain from a quarter."""
    return [(float("nan"), 0.0, None, 0.0)[index % 4] for index in range(len(completions))]


@pytest.mark.slow
def test_a_reward_that_fails_is_told_once_and_counted(capsys, monkeypatch):
    def broken(config, inputs):
        problem = load(config, inputs)
        object.__setattr__(problem, "scorer", tasks.Scorer(failing, workers=0))
        return problem

    monkeypatch.setattr(reason, "load", broken)
    with pytest.warns(UserWarning) as told:
        summary = run(capsys, "--generations", "2", "--folder", "out/failing")
    assert sum("a reward failed and scored 0" in str(one.message) for one in told) == 1
    assert summary["failed_rewards"] == 2 * 4 * 2 / 4
    lines = [json.loads(line) for line in Path("out/failing/metrics.jsonl").read_text().splitlines()]
    assert [(line["failed_rewards"], line["abstained_rewards"]) for line in lines] == [(2, 2)] * 2


@pytest.mark.slow
def test_plan_reads_no_weights(capsys, monkeypatch):
    monkeypatch.setattr(hf, "load", lambda *_: pytest.fail("weights were read"))
    summary = run(capsys, "--plan", "--memory-budget", "1000000", "--chunk-size", "2")
    assert summary["members"] % 2 == 0 < summary["members"] and summary["budget"] == 1_000_000
    assert (summary["population_size"], summary["members_at_a_time"]) == (4, 2)
    parts = summary["evaluation"] + summary["encoding"], summary["update"], summary["check"]
    assert summary["peak"] == summary["parameters"] + summary["state"] + max(parts) and min(parts) > 0
    assert summary["evaluation"] > 2 * summary["cache"] and summary["state"] > 2 * summary["parameters"]


def test_members_and_shortage_of_a_plan_are_those_of_its_account():
    sizes = dict(
        parameters=100, state=200, evaluation=50, per_member=10, update=30, check=40, comparison=15, encoding=25, runtime=0
    )
    plan = RunMemory(shapes=None, population_size=8, members_at_a_time=4, budget=0, **sizes)
    assert plan.needed(4) == 375 and plan.needed(2) == 355 and plan.needed(20) == 300 + 210 + 25
    for budget, members, shortage in [(354, 0, 1), (355, 2, 0), (375, 4, 0), (394, 4, 0), (395, 6, 0)]:
        within = plan._replace(budget=budget)
        assert (within.members, within.shortage) == (members, shortage)
    assert plan._replace(update=100).needed(2) == 400 and plan._replace(comparison=80).needed(4) == 300 + 80 + 25


@pytest.mark.slow
def test_bfloat16_checkpoint_with_masters_and_an_anchor(folder, capsys, signal, last_is_best):
    config = parse(TINY)
    source = load(config, prepare(config))
    low = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), source.params)
    hf.save(folder / "low", source.config, low)
    given = ["--model", "low", "--dtype", "bfloat16", "--anchor", "0.1", "--freeze", "resident/.*"]
    run(capsys, *given, "--generations", "2", "--folder", "out/low")
    after = weights(folder / "out/low")
    assert equal(after["resident"], hf.load(folder / "low")[2]["resident"]) and not equal(after, hf.load(folder / "low")[2])
    assert json.loads((folder / "out/low/model" / CONFIG).read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--population-size", "7"], "population_size must be a multiple of group, an even number, got 7 and 7."),
        (["--group", "3"], "population_size must be a multiple of group, an even number, got 4 and 3."),
        (["--samples", "2"], "samples must be 1 for greedy completions, got 2; give a temperature."),
        (["--pass-k", "2"], "pass_k must be between 1 and samples, 1, got 2."),
        (["--sigma", "0"], "sigma must be a finite number > 0, got 0.0."),
        (["--task", "sums"], "name must be a task,"),
        (["--task-options", "digits"], "task_options must be such as digits=3, got 'digits'."),
        (["--task-options", "digit=3"], "unexpected keyword argument 'digit'"),
        (["--template", "Q:"], "template must contain {prompt}"),
        (["--template", "<|user|>{prompt}"], "has no special token '<|user|>', which the template needs."),
        (["--prompt-length", "2"], "prompt_length must be at least"),
        (["--stop", "\n", ""], "stop must be texts, got '', which has 0 tokens here."),
        (["--stop-token-ids", "300"], "stop_token_ids must be tokens, from 0 to 256, got 300."),
        (["--stop", "\n", "--stop-token-ids", "10"], "give stop or stop_token_ids, not both"),
        (["--room", "4"], "option --room is now --max-new-tokens."),
        (["--ending=1"], "option --ending is now --stop-token-ids."),
        (["--max-new-tokens", "40000"], "do not fit the model's context of 32768 tokens."),
        (["--prompts", "41"], "prompts must be at most 40, the problems of the train split, got 41."),
        (
            ["--model", "nowhere"],
            "model must be a folder with a checkpoint, got nowhere.",
        ),
        (["--freeze", "nothing/.*"], "'nothing/.*' matches no parameter"),
        (["--algorithm", "grpo", "--resume"], "--resume has no effect with --algorithm grpo: it belongs to eggroll."),
        (["--algorithm", "grpo", "--grpo.samples", "1"], "grpo.samples must be an integer >= 2, got 1."),
        (["--weights", "int8", "--int8.sigma", "0"], "int8.sigma must be a finite number > 0, got 0.0."),
        (["--weights", "int8", "--int8.learning-rate", "inf"], "int8.learning_rate must be a finite number > 0, got inf."),
        (["--weights", "int8", "--int8.threshold", "-1"], "int8.threshold must be a finite number >= 0 or None, got -1.0."),
        (["--weights", "int8", "--precision", "feedback"], "add --weights int8 --int8.optimizer sgd."),
        (["--weights", "int8", "--int8.window", "4"], "--int8.window has no effect without --precision feedback"),
        (["--weights", "int8", "--algorithm", "grpo"], "weights int8 are for eggroll, not for grpo"),
        (["--start.width", "17"], "start.width must be a multiple of 16, got 17."),
        (["--weights", "int8", "--anchor", "0.1", "--int8.threshold", "2"], "anchor must be 0 with weights int8 that"),
        (["--seed", "-1"], "seed must be an integer from 0 to 4294967295, got -1."),
        (["--seed", "4294967295", "--seeds", "2"], "seed must be an integer from 0 to 4294967294, got 4294967295."),
        (["--examples", "-1"], "examples must be an integer >= 0, got -1."),
        (["--reward-minimum", "nan"], "reward_minimum must be a finite number or None, got nan."),
        (["--mesh", "members=2"], "mesh must be such as population=4,data=2"),
        pytest.param(["--memory-budget", "9"], "memory_budget of 9 bytes is too small: one pair needs", marks=pytest.mark.slow),
    ],
)
def test_wrong_options_are_refused_by_a_clear_error(options, sentence, capsys):
    kept = Path("out/wrong/journal.bin")  # of a run, which stays
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_bytes(b"generations")
    with pytest.raises(SystemExit) as stopped:
        reason.main(tiny("--generations", "1", "--folder", "out/wrong", *options))
    text = str(stopped.value)
    assert text.startswith("error: ") and sentence in text and "\n" not in text
    assert kept.read_bytes() == b"generations"


@pytest.mark.slow
def test_other_settings_are_refused_on_resume(capsys):
    run(capsys, "--generations", "2", "--folder", "out/other")
    with pytest.raises(SystemExit, match="other settings: sigma"):
        reason.main([*TINY, "--generations", "3", "--folder", "out/other", "--resume", "--sigma", "0.5"])
