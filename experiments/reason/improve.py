"""Improve a model from Python, with rows and a reward of one's own: what `python -m eggroll.experiments.reason` does.

    improve("smollm2", rows, reward, out="tuned", template="chat").model        a Hugging Face folder

The run folder `out` has the rows, journal, checkpoints and metrics of every run.
"""

import dataclasses
import hashlib
import inspect
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from eggroll.envs.tasks import Reward
from eggroll.envs.tasks.calls import name_of
from eggroll.experiments.reason.__main__ import run
from eggroll.experiments.reason.config import Config
from eggroll.files import replace_file

ROWS = "rows.jsonl"
SET = ("model", "data", "reward", "folder", "task", "task_options", "seeds", "plan")  # by the arguments, or of other commands


class Improvement(NamedTuple):
    """The result of a run."""

    model: Path  # folder of the improved model
    summary: dict[str, Any]  # accuracies before and after, generations, seconds: the last line of the command


def improve(
    model: str | Path,
    rows: str | Path | Sequence[Mapping[str, Any]],
    reward: str | Sequence[str] | Reward,
    *,
    out: str | Path,
    **options: Any,
) -> Improvement:
    """Improve a model on verifiable rewards.

    Args:
        model: folder of a Hugging Face checkpoint with its tokenizer.
        rows: problems of JSON values, each with "prompt" and what the reward reads, or a JSONL file of them; they are split
            into train, validation and test (`eggroll.envs.tasks.read_rows`).
        reward: `reward(prompts=, completions=, **columns) -> list[float | None]`, or names such as "score.py:correct".
        out: run folder; without `resume=True` an earlier run in it is replaced.
        options: those of the command, with underscores, such as `generations=20` or `template="chat"`.

    Returns:
        The folder of the improved model, and the summary of the run.

    Raises:
        ValueError, OSError, ImportError: what the command says in one line.
    """
    known = {field.name for field in dataclasses.fields(Config)} - {*SET}
    if unknown := [name for name in options if name not in known]:
        raise ValueError(f"options must be of {', '.join(sorted(known))}, got {unknown[0]!r}.")
    out = Path(out).absolute()
    data = Path(rows) if isinstance(rows, str | Path) else _write_rows(out, rows, resume=options.get("resume", False))
    given = reward if callable(reward) else None
    names = (_identity(reward),) if callable(reward) else (reward,) if isinstance(reward, str) else tuple(reward)
    summary = run(Config(model=Path(model), data=data, reward=names, folder=out, **options), reward=given)
    return Improvement(out / "model", dict(summary))


def _write_rows(out: Path, rows: Sequence[Mapping[str, Any]], *, resume: bool) -> Path:
    """Write the rows into the run folder, from which a journal is verified; they must be those of a run that is resumed."""
    path = out / ROWS
    try:
        content = "".join(json.dumps(dict(row), allow_nan=False) + "\n" for row in rows).encode()
    except (TypeError, ValueError) as error:
        raise ValueError(f"rows must be of JSON values: {error}.") from None
    if resume and path.exists() and path.read_bytes() != content:
        raise ValueError(f"rows must be those that the run in {out} began with, which are in {path}.")
    out.mkdir(parents=True, exist_ok=True)
    replace_file(path, content)
    return path


def _identity(reward: Reward) -> str:
    """The name of a reward with the digest of its source, which tells a changed reward when a run is resumed."""
    try:
        source = inspect.getsource(reward)
    except (TypeError, OSError):  # an object, or typed into a prompt
        return name_of(reward)
    return f"{name_of(reward)} (source {hashlib.sha256(source.encode()).hexdigest()[:12]})"
