"""The user's own rows: prompts in one column, the other columns for the reward, and splits by the hash of a key.

    u(key) = first 8 bytes of SHA-256(key) / 2^64        test where u < 0.2, validation where u < 0.3, train elsewhere

A row's split depends on its own key alone: rows that are added later move no others, and rows with the same key, by default the
prompt, are never in two splits. Within a split rows are in the order of u, so that its first rows are a random choice.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from eggroll.envs.tasks.protocol import SPLITS, Row
from eggroll.envs.tasks.records import Record, read_records

TEST, HELD_OUT = 0.2, 0.3  # shares of the keys in test, and in test or validation
ENOUGH = math.ceil(math.log(0.01) / math.log(1 - (HELD_OUT - TEST)))  # keys of which 99 % of the time one is in validation


class Rows(NamedTuple):
    """Rows in splits that share neither a key nor a prompt."""

    splits: dict[str, tuple[Row, ...]]
    repeated: int  # rows that were left out, because another has the same prompt and the same columns

    def describe(self) -> str:
        """Return the sizes in words."""
        sizes = ", ".join(f"{split} {len(rows):,}" for split, rows in self.splits.items())
        return f"{sizes} rows" + (f"; {self.repeated:,} repeated rows are left out" if self.repeated else "")


def read_rows(path: str | Path, *, prompt: str = "prompt", key: str | None = None) -> Rows:
    """Read a JSONL file.

    Args:
        path: of the file; each line is an object with the same fields.
        prompt: the field with the prompt; all others are columns for the reward.
        key: a field, such as the document that a question is about, whose rows stay together; None: the prompt.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is malformed or lacks a field that another has; a prompt or key is neither text nor a number; rows
            with one prompt have several keys; a split is empty, and the message says how many rows are enough.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"data must be a JSONL file, there is none at {path}.")
    records = read_records(path)
    _check_fields(records, {"--prompt-column": prompt, "--key-column": prompt if key is None else key})
    placed: dict[str, tuple[float, str, str]] = {}  # prompt -> u, key, place
    rows: dict[str, list[Row]] = {split: [] for split in SPLITS}
    repeated = 0
    for record in records:
        text, name = record.text(prompt), record.text(key or prompt)
        u, other, place = placed.setdefault(text, (_position(name), name, record.place))
        if other != name:
            raise ValueError(f"{record.place} has the prompt of {place}, but another '{key}': {name!r}, not {other!r}.")
        row = Row(text, {field: value for field, value in record.fields.items() if field != prompt})
        rows["test" if u < TEST else "validation" if u < HELD_OUT else "train"].append(row)
    for split, own in rows.items():
        distinct = _distinct(own)
        repeated += len(own) - len(distinct)
        rows[split] = sorted(distinct, key=lambda row: placed[row.prompt][0])
        if not own:
            count, kind = len({name for _, name, _ in placed.values()}), f"values of '{key}'" if key else "prompts"
            raise ValueError(
                f"{path} has {count} different {kind}, none of which falls into {split}: by their hashes {1 - HELD_OUT:.0%} are"
                f" for train, {HELD_OUT - TEST:.0%} for validation, {TEST:.0%} for test. {ENOUGH} are enough almost always."
            )
    return Rows({split: tuple(own) for split, own in rows.items()}, repeated)


def _position(key: str) -> float:
    """The hash of a key as a number from 0 to 1."""
    return int.from_bytes(hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()[:8], "big") / 2**64


def _check_fields(records: Sequence[Record], named: Mapping[str, str]) -> None:
    known: dict[str, str] = {}  # field -> the first line that has it
    for record in records:
        for field in record.fields:
            known.setdefault(field, record.place)
    for option, field in named.items():
        if field not in known:
            path = records[0].place.rpartition(", ")[0]
            raise ValueError(f"{path} has no column '{field}' but {', '.join(known)}: name the right one with {option}.")
    for record in records:
        for field, place in known.items():
            if field not in record.fields:
                raise ValueError(f"{record.place}: field '{field}' is missing, which {place.rpartition(', ')[2]} has.")


def _distinct(rows: Sequence[Row]) -> list[Row]:
    """The rows without repetitions."""
    return [*{(row.prompt, json.dumps(row.columns, sort_keys=True)): row for row in reversed(rows)}.values()][::-1]
