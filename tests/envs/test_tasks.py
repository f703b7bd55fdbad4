"""Tasks for language models: numbers and forms of answers, splits that never overlap, the order of batches, sums, files."""

import collections
import importlib.util
import itertools
import json
import math
import pickle
import re
import sys
from decimal import Decimal

import numpy as np
import pytest

from eggroll.envs import tasks
from eggroll.envs.tasks import Batches, Matches, Row, Task, Weighted, arithmetic, reasoning

needs_reasoning_gym = pytest.mark.skipif(not importlib.util.find_spec("reasoning_gym"), reason="reasoning-gym is not installed")
needs_math_verify = pytest.mark.skipif(not importlib.util.find_spec("math_verify"), reason="math-verify is not installed")


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("42", "42"),
        ("The answer is 42.", "42"),
        ("It costs $1,234.50.", "1234.50"),
        ("so 1,000,000 in all", "1000000"),
        ("-7", "-7"),
        ("x = -7", "-7"),
        ("x=-7", "-7"),
        ("\N{MINUS SIGN}7", "-7"),
        ("10-7", "7"),
        ("10 - 7 = 3", "3"),
        ("(5)-3", "3"),
        ("-$5", "-5"),
        ("$-5", "-5"),
        ("50%", "50"),
        ("12.5%.", "12.5"),
        ("3.0", "3"),
        (".5", "0.5"),
        ("-.5", "-0.5"),
        ("1, 2, 3", "3"),
        ("1,2,3", "3"),
        ("1,2345", "2345"),
        ("2,500 or 2500?", "2500"),
        ("#### 18", "18"),
        ("42 apples", "42"),
        ("007", "7"),
        ("9" * 5000, "9" * 5000),
        ("no number", None),
        ("", None),
        ("$ , . - %", None),
        ("\N{ARABIC-INDIC DIGIT FIVE}", None),
    ],
)
def test_last_number(text, number):
    assert tasks.last_number(text) == (None if number is None else Decimal(number))


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        (" 42\n", "42"),
        ("<think>1</think> 42", "42"),
        ("thought that the prompt opened</think>42", "42"),
        ("<think>1</think> <answer> 42 </answer>", "42"),
        ("<answer>1</answer><answer>2</answer> rubbish", "2"),
        ("<answer>1", "<answer>1"),
        ("<think>it is 42", ""),
        ("", ""),
    ],
)
def test_final_answer(completion, answer):
    assert tasks.final_answer(completion) == answer


def test_numbers_are_rewarded():
    completions = ["so 1,234.", "<think>1234", "<think>9</think>it is $1234.00", "", "no", "1235"]
    assert tasks.number_matches([""] * 6, completions, answer=["1,234"] * 6, other=[0] * 6) == [1, 0, 1, 0, 0, 0]


@pytest.mark.slow
@needs_math_verify
def test_mathematics_is_rewarded():
    given = [r"It is $\frac{2}{4}$.", "0.5", r"<think>3</think>\boxed{\frac12}", r"\frac{1}{3}", "rubbish \\frac{", ""]
    assert tasks.math_matches([""] * 6, given, answer=[r"\frac{1}{2}"] * 6) == [1, 1, 1, 0, 0, 0]


@pytest.mark.parametrize(
    ("completion", "score"),
    [
        ("<think>a\nb</think>\n<answer>42</answer>\n", 1),
        ("<think></think><answer></answer>", 1),
        ("<answer>42</answer>", 0),
        ("<think>a</think> so <answer>42</answer>", 0),
        ("<think>a</think><answer>42</answer> and more", 0),
        ("<think>a</think><think>b</think><answer>42</answer>", 0),
        ("<think><answer>1</answer></think><answer>42</answer>", 0),
        ("", 0),
    ],
)
def test_form_of_thought_and_answer(completion, score):
    assert tasks.THINK_ANSWER([""], [completion], answer=["42"]) == [score]


def test_patterns_match_the_whole_completion():
    assert Matches(r"[0-9]+\n?")([""] * 4, ["12", "12\n", "a12", "12 "]) == [1, 1, 0, 0]


def test_weighted_sum():
    reward = Weighted((tasks.number_matches, 1.0), (tasks.THINK_ANSWER, -0.25))
    texts = ["42", "<think></think><answer>42</answer>", "41"]
    assert reward([""] * 3, texts, answer=["42"] * 3) == [1.0, 0.75, 0.0]
    assert pickle.loads(pickle.dumps(reward)) == reward


def test_pass_at_k_is_the_mean_over_all_draws():
    passed = np.array([[True, False, False, True, False], [False] * 5, [True] * 5])
    draws = {k: [list(draw) for draw in itertools.combinations(range(5), k)] for k in range(1, 6)}
    for k, chosen in draws.items():
        expected = np.mean([passed[:, draw].any(axis=1) for draw in chosen], axis=0)
        np.testing.assert_allclose(tasks.pass_at_k(passed, k=k), expected, atol=1e-12)
    assert tasks.pass_at_k(np.zeros((2, 3, 4), bool), k=2).shape == (2, 3)
    assert tasks.pass_at_k([True, False], k=1) == 0.5


def rows(*prompts):
    return tuple(Row(prompt, {"answer": "1"}) for prompt in prompts)


def test_batches_have_every_problem_once_an_epoch_and_need_the_step_alone():
    numbers = rows(*map(str, range(10)))
    batches = Batches(numbers, batch_size=4, seed=3)
    seen = [row.prompt for step in range(10) for row in batches(step)]  # four epochs
    epochs = [seen[first : first + 10] for first in range(0, 40, 10)]
    assert all(sorted(epoch, key=int) == [row.prompt for row in numbers] for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 4
    assert Batches(numbers, batch_size=4, seed=3)(7) == batches(7) != Batches(numbers, batch_size=4, seed=4)(7)


def test_columns_of_rows_become_lists():
    prompts, columns = tasks.collate([Row("a", {"answer": "1", "n": 2}), Row("b", {"answer": "3", "n": 4})])
    assert prompts == ["a", "b"] and columns == {"answer": ["1", "3"], "n": [2, 4]}
    assert tasks.collate([]) == ([], {})


def test_arithmetic_is_worked_out():
    assert arithmetic.worked(17, 25) == "7+5=12,1+2+1=4;42\n"
    assert arithmetic.worked(17, 25, forget=0) == "7+5=12,1+2=3;32\n"
    assert arithmetic.worked(7, 25) == "7+5=12,0+2+1=3;32\n"
    assert arithmetic.worked(99, 99) == "9+9=18,9+9+1=19;198\n"
    assert arithmetic.worked(0, 0) == "0+0=0;0\n"
    assert arithmetic.worked(999, 1) == "9+1=10,9+0+1=10,9+0+1=10;1000\n"
    assert arithmetic.worked(999, 1, forget=1) == "9+1=10,9+0+1=10,9+0=9;900\n"


def everything(task):
    return {split: tuple(task.split(split)) for split in tasks.SPLITS}


@pytest.mark.parametrize(("digits", "longest"), [(2, 20), (3, 30)])
def test_arithmetic_task(digits, longest):
    task = tasks.load("arithmetic", seed=5, digits=digits, train=3000, validation=100, test=200)
    splits = everything(task)
    assert [len(rows) for rows in splits.values()] == [3000, 100, 200]
    tasks.check_disjoint(splits)
    pairs = [tuple(sorted(re.findall(r"\d+", row.prompt))) for part in splits.values() for row in part]
    assert len(set(pairs)) == 3300  # no split has the other order of another's sum
    for part in splits.values():
        prompts, columns = tasks.collate(part)
        assert task.reward(prompts, columns["worked"], **columns) == [1.0] * len(part)
        assert all(row.columns["answer"] == str(eval(row.prompt[:-1].replace("+", ".0+"))).removesuffix(".0") for row in part)
        assert max(len(text) for text in columns["worked"]) <= longest
        assert len({len(prompt) for prompt in prompts}) >= 3


def test_arithmetic_noise_is_a_share_of_forgotten_carries_in_train_alone():
    clean, noisy = (everything(tasks.load("arithmetic", seed=1, noise=noise)) for noise in (0.0, 0.3))
    assert noisy["validation"] == clean["validation"] and noisy["test"] == clean["test"]
    wrong = 0
    for row, right in zip(noisy["train"], clean["train"], strict=True):
        assert (row.prompt, row.columns["answer"]) == (right.prompt, right.columns["answer"])
        if row.columns["worked"] != right.columns["worked"]:
            wrong += 1
            assert arithmetic.answer_matches([row.prompt], [row.columns["worked"]], answer=[row.columns["answer"]]) == [0]
            assert len(row.columns["worked"]) < len(right.columns["worked"])  # without a "+1"
    assert wrong == round(0.3 * 4096)


def test_tasks_are_the_same_for_a_seed():
    first, again, other = (everything(tasks.load("arithmetic", seed=seed, noise=0.2)) for seed in (3, 3, 4))
    assert first == again != other


@pytest.mark.parametrize(
    ("completion", "score"),
    [
        ("7+5=12,1+2+1=4;42\n", 1),
        ("7+5=12,1+2+1=4;42", 1),
        ("42\nand more;1", 1),
        ("rubbish;42\n", 1),
        ("7+5=12,1+2+1=4;32\n", 0),
        ("7+5=12,1+2+1=4;042\n", 0),
        ("7+5=12,1+2+1=4;42 \n", 0),
        ("7+5=42\n", 0),
        (";;;\n", 0),
        ("\n42", 0),
        ("", 0),
        ("\N{ARABIC-INDIC DIGIT FOUR}2", 0),
        (";" * 10000 + "x", 0),
        ("4" * 10000, 0),
    ],
)
def test_arithmetic_reward_reads_rubbish(completion, score):
    assert arithmetic.answer_matches(["17+25="], [completion], answer=["42"], worked=[""]) == [score]


def jsonl(path, *lines):
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return path


def problems(numbers):
    return [{"question": f"How many is {n}?", "answer": f"It is {n}.\n#### {n:,}"} for n in numbers]


def test_gsm8k_files(tmp_path):
    train = jsonl(tmp_path / "train.jsonl", *problems([*range(1995, 2015), 1995]))
    test = jsonl(tmp_path / "test.jsonl", *problems(range(2010, 2020)))
    task = tasks.load("gsm8k", train=train, test=test, validation=5)
    splits = everything(task)
    assert [len(part) for part in splits.values()] == [10, 5, 10]  # five of train are in test, one comes twice
    tasks.check_disjoint(splits)
    (row,) = [row for part in splits.values() for row in part if "1999" in row.prompt]
    assert row == Row("How many is 1999?", {"answer": "1,999", "worked": "It is 1999.\n#### 1,999"})
    assert task.reward([row.prompt], ["Well, 1999."], answer=["1,999"], worked=[""]) == [1]
    assert everything(tasks.load("gsm8k", train=train, test=test, validation=5)) == splits
    assert everything(tasks.load("gsm8k", train=train, test=test, validation=5, seed=1)) != splits


@pytest.mark.slow
@needs_math_verify
def test_math_files(tmp_path):
    train = jsonl(tmp_path / "train.jsonl", *[{"problem": f"Half of {n}?", "answer": f"\\frac{{{n}}}{{2}}"} for n in range(5)])
    test = jsonl(tmp_path / "test.jsonl", {"problem": "What is x times x?", "answer": "x^2"})
    task = tasks.load("math", train=train, test=test, validation=2)
    prompts, columns = tasks.collate(task.split("test"))
    assert task.reward(prompts, [r"$x \cdot x$"], **columns) == [1]


BAD_LINES = [
    ({"answer": "#### 1"}, r"test\.jsonl, line 2: field 'question' is missing; the line has answer\."),
    ({"question": "q"}, r"test\.jsonl, line 2: field 'answer' is missing; the line has question\."),
    ({"question": "q", "answer": "1"}, r"test\.jsonl, line 2: field 'answer' must end in '#### ' and a number, got '1'\."),
    (
        {"question": "q", "answer": "#### x"},
        r"test\.jsonl, line 2: field 'answer' must end in '#### ' and a number, got '#### x'",
    ),
    ({"question": ["q"], "answer": "#### 1"}, r"test\.jsonl, line 2: field 'question' must be text or a number, got a list\."),
    ("{no json", r"test\.jsonl, line 2: not valid JSON"),
    ("[1]", r"test\.jsonl, line 2: expected a JSON object, got a list\."),
]


@pytest.mark.parametrize(("line", "message"), BAD_LINES)
def test_bad_lines_are_named(tmp_path, line, message):
    train = jsonl(tmp_path / "train.jsonl", *problems(range(5)))
    test = jsonl(tmp_path / "test.jsonl", *problems([9]), line)
    with pytest.raises(ValueError, match=message):
        tasks.load("gsm8k", train=train, test=test, validation=1)


def test_empty_and_missing_files_are_errors(tmp_path):
    train = jsonl(tmp_path / "train.jsonl", *problems(range(5)))
    with pytest.raises(ValueError, match=r"empty\.jsonl is empty: expected one JSON object a line"):
        tasks.load("gsm8k", train=train, test=jsonl(tmp_path / "empty.jsonl"), validation=1)
    with pytest.raises(FileNotFoundError, match="absent"):
        tasks.load("gsm8k", train=train, test=tmp_path / "absent.jsonl", validation=1)
    with pytest.raises(ValueError, match=r"validation must be between 1 and 3, for .*train.jsonl has 4 problems that"):
        tasks.load("gsm8k", train=train, test=jsonl(tmp_path / "test.jsonl", *problems([0])), validation=4)


def task_of(**splits):
    return Task("mine", reward=tasks.number_matches, splits=splits)


BAD_CALLS = {
    "name": (
        lambda: tasks.load("gsm9k"),
        "name must be a task, arithmetic, countdown, gsm8k, math, short_countdown or reasoning_gym/<data set>, got",
    ),
    "split": (
        lambda: tasks.load("arithmetic").split("dev"),
        "split must be one of train, validation, test of task 'arithmetic', got",
    ),
    "empty split": (lambda: task_of(train=rows("a"), test=()), "split 'test' of task 'mine' has no rows"),
    "overlap": (
        lambda: task_of(train=rows("a", "b"), test=rows("b")),
        "splits train and test must not overlap, both have the prompt 'b'",
    ),
    "digits": (lambda: tasks.load("arithmetic", digits=1), "digits must be 2 or 3, got 1"),
    "sizes": (lambda: tasks.load("arithmetic", train=5000), "at least 1 and 5050 in sum, got 5000 [+] 256 [+] 512"),
    "no size": (lambda: tasks.load("arithmetic", test=0), "at least 1 and 5050 in sum, got 4096 [+] 256 [+] 0"),
    "noise": (
        lambda: tasks.load("arithmetic", noise=0.9),
        "noise must be between 0 and 0.4.., the share of train sums with a carry",
    ),
    "nan noise": (lambda: tasks.load("arithmetic", noise=math.nan), "noise must be between 0 and"),
    "batch": (lambda: Batches(rows("a", "b"), batch_size=3), "batch_size must be between 1 and the 2 rows, got 3"),
    "no batch": (lambda: Batches(rows("a", "b"), batch_size=0), "batch_size must be between 1 and the 2 rows, got 0"),
    "columns": (lambda: tasks.collate([*rows("a"), Row("b", {})]), "column 'answer' is missing in the row with the prompt 'b'"),
    "pattern": (lambda: Matches("("), r"pattern must be a regular expression, got '\('"),
    "no part": (lambda: Weighted(), r"parts must be one \(reward, finite weight\) or more"),
    "weight": (lambda: Weighted((tasks.THINK_ANSWER, math.inf)), r"parts must be .* got the weights \[inf\]"),
    "k": (lambda: tasks.pass_at_k([True, False], k=3), "k must be between 1 and the 2 samples of a prompt, got 3"),
    "scores": (
        lambda: tasks.pass_at_k([1.0, 0.0], k=1),
        r"passed must be bool \[..., samples\], such as scores >= 1, got float64 \[2\]",
    ),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_input_is_a_clear_error(case):
    call, message = BAD_CALLS[case]
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("package", ["reasoning_gym", "math_verify"])
def test_missing_packages_are_named_with_their_command(monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    tasks.rewards.math_verify.cache_clear()
    name = {"reasoning_gym": "countdown", "math_verify": "math"}[package]
    with pytest.raises(ModuleNotFoundError, match=f"the module {package}; pip install .* installs it"):
        tasks.load(name, **({"train": "a", "test": "b"} if name == "math" else {}))


def test_names_are_loadable():
    assert {"arithmetic", "countdown", "gsm8k", "math", "short_countdown"} <= set(tasks.names())


@pytest.mark.slow
@needs_reasoning_gym
def test_countdown():
    task = tasks.load("countdown", seed=7, train=1000, validation=8, test=8)
    assert len(task.split("train")) == 1000
    numbers = collections.Counter(len(row.columns["metadata"]["numbers"]) for row in task.split("train")[:20])
    assert set(numbers) == {3, 4}
    prompts, columns = tasks.collate(task.split("test"))
    right = [f"<think></think><answer>{text}</answer>" for text in columns["answer"]]
    assert task.reward(prompts, right, **columns) == [1.0] * 8
    rubbish = ["rubbish((", "1+1", "", "\0", "a" * 999, "1/0", "<think>", "()"]
    assert max(task.reward(prompts, rubbish, **columns)) <= 0.05
    with tasks.Scorer(task.reward, workers=1, timeout=2.0) as scorer:
        completions = [*columns["answer"][:3], "9**9**9**9"]  # which is worked out, for hours
        scores = scorer(prompts[:4], completions, **{name: column[:4] for name, column in columns.items()})
    assert scores.values.tolist() == [1.0] * 3 + [0.0] and scores.timeouts == 1


@pytest.mark.slow
@needs_reasoning_gym
def test_reasoning_problems_are_made_from_seeds_that_no_split_shares():
    first, again, other = (tasks.load("reasoning_gym/chain_sum", seed=seed, train=50, test=20) for seed in (0, 0, 1))
    assert first.split("train")[:] == again.split("train")[:]
    assert first.split("train")[-1] == first.split("train")[49]
    assert not {row.prompt for row in first.split("train")} & {row.prompt for row in other.split("train")}
    tasks.check_disjoint(everything(first))
    with pytest.raises(IndexError):
        first.split("train")[50]


@pytest.mark.slow
@needs_reasoning_gym
def test_equal_problems_of_different_seeds_are_dropped():
    few = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}  # a few hundred problems
    task = tasks.load("reasoning_gym/chain_sum", train=150, validation=30, test=30, **few)
    maker = reasoning.Maker("chain_sum", few)
    plain = {maker(seed).prompt for seed in range(150)}
    held_out = {row.prompt for split in ("validation", "test") for row in task.split(split)}
    assert plain & held_out  # seeds alone do not keep the splits apart
    tasks.check_disjoint(everything(task))
    with pytest.raises(ValueError, match="chain_sum must have more problems than validation and test hold"):
        everything(tasks.load("reasoning_gym/chain_sum", train=99, validation=30, test=2000, **few))


@pytest.mark.slow
@needs_reasoning_gym
@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("countdwn", {}, "reasoning_gym must have the data set, got 'countdwn'; it has .*countdown"),
        ("countdown", {"seed": 1365}, "seed must be between 0 and 1364, got 1365"),
        ("countdown", {"test": 0}, "train, validation and test must be between 1 and 1048576, got 65536, 128 and 0"),
    ],
)
def test_bad_options_of_reasoning_gym(name, options, message):
    with pytest.raises(ValueError, match=message):
        tasks.load(f"reasoning_gym/{name}", **options)
