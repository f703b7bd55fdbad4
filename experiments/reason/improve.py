"""Improve a model from Python, with rows and a reward of one's own: what `python -m eggroll.experiments.reason` does.

    improve("smollm2", rows, reward, out="tuned", template="chat").model        a Hugging Face folder

The run folder `out` has the rows, journal, checkpoints and metrics of every run.
"""

import hashlib
import inspect
import json
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from eggroll.envs.tasks import Reward
from eggroll.envs.tasks.calls import name_of
from eggroll.experiments.common.options import option_types, replace_options
from eggroll.experiments.reason.__main__ import run
from eggroll.experiments.reason.config import Config, preset_defaults
from eggroll.experiments.reason.presets import PRESETS
from eggroll.files import replace_file
from eggroll.journal.lock import RunLock

ROWS = "rows.jsonl"
SET = ("model", "data", "reward", "folder", "task", "task_options", "seeds", "plan", "probe")  # by the arguments, or elsewhere


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
        options: those of the command, with underscores, such as `generations=20`, `template="chat"` or `int8={"sigma": 1.0}`.

    Returns:
        The folder of the improved model, and the summary of the run.

    Raises:
        ValueError, OSError, ImportError: what the command says in one line.
    """
    out = Path(out).absolute()
    data = Path(rows) if isinstance(rows, str | Path) else out / ROWS
    given = reward if callable(reward) else None
    names = (_identity(reward),) if callable(reward) else (reward,) if isinstance(reward, str) else tuple(reward)
    config = replace_options(_configure(options), {"model": Path(model), "data": data, "reward": names, "folder": out})
    config.check()
    if not isinstance(rows, str | Path):
        _write_rows(data, rows, resume=config.resume)
    return Improvement(out / "model", dict(run(config, reward=given)))


def _configure(options: Mapping[str, Any]) -> Config:
    """Return the configuration of some options, of which those of a group are a mapping."""
    preset = options.get("preset", "small")
    if preset not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {preset!r}.")
    types = {name: hint for name, hint in option_types(Config()).items() if name not in SET}
    flat: dict[str, Any] = {}
    for name, value in options.items():
        flat |= {f"{name}.{key}": part for key, part in value.items()} if isinstance(value, Mapping) else {name: value}
    for name, value in flat.items():
        if name not in types:
            raise ValueError(f"options must be of {', '.join(sorted(types))}, got {name!r}.")
        if any(typing.get_origin(hint) is tuple for hint in (types[name], *typing.get_args(types[name]))) and value is not None:
            flat[name] = (value,) if isinstance(value, str) else tuple(value)
    return replace_options(preset_defaults(preset), flat)


def _write_rows(path: Path, rows: Sequence[Mapping[str, Any]], *, resume: bool) -> None:
    """Write the rows into the run folder, from which a journal is verified; they must be those of a run that is resumed."""
    try:
        content = "".join(json.dumps(dict(row), allow_nan=False) + "\n" for row in rows).encode()
    except (TypeError, ValueError) as error:
        raise ValueError(f"rows must be of JSON values: {error}.") from None
    if resume and path.exists() and path.read_bytes() != content:
        raise ValueError(f"rows must be those that the run in {path.parent} began with, which are in {path}.")
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = RunLock(path.parent)
    try:
        replace_file(path, content)
    finally:
        lock.release()


def _identity(reward: Reward) -> str:
    """The name of a reward with the digest of its source, which tells a changed reward when a run is resumed."""
    try:
        source = inspect.getsource(reward)
    except (TypeError, OSError):  # an object, or typed into a prompt
        return name_of(reward)
    return f"{name_of(reward)} (source {hashlib.sha256(source.encode()).hexdigest()[:12]})"
