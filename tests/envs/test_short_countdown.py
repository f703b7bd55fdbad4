"""Short countdown: problems that can be solved and that no split shares, and which completions are right."""

import itertools
import re

import pytest

from eggroll.envs import tasks
from eggroll.envs.tasks.short_countdown import reaches_target

SIZES = {"train": 200, "validation": 20, "test": 50}


@pytest.mark.parametrize("numbers", [2, 3])
def test_every_problem_has_an_answer_and_is_asked_once(numbers):
    task = tasks.load("short_countdown", seed=3, numbers=numbers, largest=30, **SIZES)
    rows = [row for split, size in SIZES.items() for row in task.split(split)[:size]]
    assert len({(*sorted(row.columns["numbers"]), row.columns["target"]) for row in rows}) == len(rows) == sum(SIZES.values())
    for row in rows:
        given, target = row.columns["numbers"], row.columns["target"]
        assert len(given) == numbers and max(given) <= 30 and min(*given, target) > 0
        assert row.prompt == f"numbers {', '.join(map(str, given))} target {target}:"
        orders, signs = itertools.permutations(given), [*itertools.product("+-", repeat=numbers - 1)]
        answers = [str(first) + "".join(map("{}{}".format, s, rest)) for first, *rest in orders for s in signs]
        right = [text for text in answers if eval(text) == target]  # an independent judge
        assert right
        columns = {name: [row.columns[name]] * len(answers) for name in ("numbers", "target")}
        scores = reaches_target([row.prompt] * len(answers), answers, **columns)
        assert [text for text, score in zip(answers, scores, strict=True) if score] == right


def test_the_seed_makes_the_problems():
    first, again, other = (tasks.load("short_countdown", seed=seed, **SIZES).split("train") for seed in (1, 1, 2))
    assert first == again != other


@pytest.mark.parametrize(
    ("completion", "score"),
    [
        (" 3 + 8", 1),
        ("8+3\n and more", 1),
        (" 3 + 8 ", 1),
        (" 3 + 8 = 11", 0),
        (" 8 - 3", 0),
        (" 11", 0),
        (" 3 + 8 + 0", 0),
        (" 03 + 8", 0),
        (" +3 + 8", 0),
        (" 3 ++ 8", 0),
        ("\n3 + 8", 0),
        ("", 0),
        ("9" * 5000, 0),
    ],
)
def test_only_the_numbers_and_the_target_count(completion, score):
    assert reaches_target(["numbers 3, 8 target 11:"], [completion], numbers=[[3, 8]], target=[11]) == [score]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"numbers": 5}, "numbers must be between 2 and 4, got 5."),
        ({"test": 0}, "train, validation and test must be at least 1, and largest at least 2, got (2048, 256, 0) and 99."),
        ({"largest": 3, **SIZES}, "2 numbers up to 3 gave 9 problems, fewer than 200 + 20 + 50: raise largest."),
    ],
)
def test_bad_options_are_a_clear_error(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        tasks.load("short_countdown", **options)
