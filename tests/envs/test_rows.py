"""The user's rows: splits by a key that later rows do not change, repeated rows, and what is wrong with a file."""

import json

import pytest

from eggroll.envs.tasks import read_rows

ADDITIONS = [{"prompt": f"{a}+{b}=", "answer": a + b, "left": a} for a in range(30) for b in range(30)]


@pytest.fixture
def write(tmp_path):
    def write(rows):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write


def split_of(rows):
    return {row.prompt: split for split, own in rows.splits.items() for row in own}


def test_shares_columns_and_order(write):
    rows = read_rows(write(ADDITIONS))
    sizes = {split: len(own) / len(ADDITIONS) for split, own in rows.splits.items()}
    assert sizes == pytest.approx({"train": 0.7, "validation": 0.1, "test": 0.2}, abs=0.04)  # 3 standard errors
    row = rows.splits["train"][0]
    assert row.columns == {"answer": sum(map(int, row.prompt[:-1].split("+"))), "left": int(row.prompt.split("+")[0])}
    assert read_rows(write(ADDITIONS[::-1])) == rows  # the order is that of the hashes
    assert rows.describe() == "train {:,}, validation {:,}, test {:,} rows".format(*map(len, rows.splits.values()))


def test_later_rows_move_no_others(write):
    few, all_of_them = split_of(read_rows(write(ADDITIONS[:500]))), split_of(read_rows(write(ADDITIONS)))
    assert few == {prompt: split for prompt, split in all_of_them.items() if prompt in few}
    assert [all_of_them[f"0+{b}="] for b in range(6)] == [
        "validation",
        "validation",
        "train",
        "train",
        "train",
        "train",
    ]  # in every version


def test_rows_of_a_key_stay_together(write):
    splits = read_rows(write(ADDITIONS), key="left").splits
    owners = [{row.columns["left"] for row in own} for own in splits.values()]
    assert sum(map(len, owners)) == len(set.union(*owners)) == 30
    without = split_of(read_rows(write(ADDITIONS)))
    assert len({without[f"1+{b}="] for b in range(30)}) == 3  # control


def test_repeated_rows_are_left_out_and_other_answers_stay_with_their_prompt(write):
    other = {**ADDITIONS[0], "answer": "zero"}
    rows = read_rows(write([*ADDITIONS, ADDITIONS[0], ADDITIONS[7], other]))
    assert rows.repeated == 2 and rows.describe().endswith("; 2 repeated rows are left out")
    (own,) = (own for own in rows.splits.values() if any(row.prompt == "0+0=" for row in own))
    assert [row.columns["answer"] for row in own if row.prompt == "0+0="] == [0, "zero"]


@pytest.mark.parametrize(
    ("rows", "options", "words"),
    [
        (
            ADDITIONS[:3],
            {},
            r"rows.jsonl has 3 different prompts, none of which falls into .*: by their hashes 70% .* 44 are enough",
        ),
        (ADDITIONS[:60], {"key": "left"}, r"has 2 different values of 'left', none of which"),
        (ADDITIONS, {"prompt": "question"}, r"has no column 'question' but prompt, answer, left: .* with --prompt-column"),
        (ADDITIONS, {"key": "id"}, r"has no column 'id' but prompt, answer, left: .* with --key-column"),
        ([*ADDITIONS, {"prompt": "1"}], {}, r"line 901: field 'answer' is missing, which line 1 has"),
        ([*ADDITIONS, {**ADDITIONS[0], "prompt": [1]}], {}, r"line 901: field 'prompt' must be text or a number, got a list"),
        (
            [*ADDITIONS, {**ADDITIONS[0], "left": 9}],
            {"key": "left"},
            r"line 901 has the prompt of .*, line 1, but another 'left': '9', not '0'",
        ),
        ([], {}, "rows.jsonl is empty: expected one JSON object a line"),
    ],
)
def test_what_is_wrong_is_named(write, rows, options, words):
    with pytest.raises(ValueError, match=words):
        read_rows(write(rows), **options)


def test_a_missing_file_names_the_option(tmp_path):
    with pytest.raises(FileNotFoundError, match="data must be a JSONL file, there is none at"):
        read_rows(tmp_path / "rows.jsonl")
