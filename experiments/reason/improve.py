"""Improve a model from Python, with rows and a reward of one's own: what `python -m eggroll.experiments.reason` does.

    improve("smollm2", rows, reward, out="tuned", template="chat").model        a Hugging Face folder

The run folder `out` has the rows, journal, checkpoints and metrics of every run.
"""

import hashlib
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
            into train, validation and test (`eggroll.envs.tasks.read_rows`). A run is resumed with the same.
        reward: `reward(prompts=, completions=, **columns) -> list[float | None]`, or names such as "score.py:correct".
        out: run folder; without `resume=True` an earlier run in it is replaced.
        options: those of the command, with underscores, such as `generations=20`, `template="chat"` or `int8={"sigma": 1.0}`.

    Returns:
        The folder of the improved model, and the summary of the run.

    Raises:
        ValueError, OSError, ImportError: what the command says in one line.
    """
    out = Path(out).absolute()
    given = Path(rows) if isinstance(rows, str | Path) else _encode(rows)
    data = given if isinstance(given, Path) else out / f"rows-{hashlib.sha256(given).hexdigest()[:12]}.jsonl"
    names = _names(reward)
    config = replace_options(_configure(options), {"model": Path(model), "data": data, "reward": names, "folder": out})
    config.check()
    if isinstance(given, bytes):  # a journal is verified from them, that of an earlier run from its own
        out.mkdir(parents=True, exist_ok=True)
        replace_file(data, given)
    return Improvement(out / "model", dict(run(config, reward=reward if callable(reward) else None)))


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


def _encode(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Return rows as the content of a JSONL file."""
    try:
        return "".join(json.dumps(dict(row), allow_nan=False) + "\n" for row in rows).encode()
    except (TypeError, ValueError) as error:
        raise ValueError(f"rows must be of JSON values: {error}.") from None


def _names(reward: str | Sequence[str] | Reward) -> tuple[str, ...]:
    """Return the names of a reward."""
    if callable(reward):
        return (name_of(reward),)
    names = (reward,) if isinstance(reward, str) else tuple(reward) if isinstance(reward, Sequence) else ()
    if not names or not all(isinstance(name, str) for name in names):
        raise ValueError(f"reward must be one function, or names such as score.py:correct, got {reward!r}.")
    return names
