"""Tasks by name."""

import importlib.util
import inspect
from collections.abc import Callable
from typing import Any

from eggroll.envs.tasks.arithmetic import arithmetic
from eggroll.envs.tasks.files import gsm8k, mathematics
from eggroll.envs.tasks.protocol import Task
from eggroll.envs.tasks.reasoning import PREFIX, datasets, reasoning
from eggroll.envs.tasks.short_countdown import short_countdown


def _countdown(**options: Any) -> Task:
    return reasoning("countdown", **{"min_numbers": 3, "max_numbers": 4, **options})


TASKS: dict[str, Callable[..., Task]] = {
    "arithmetic": arithmetic,
    "countdown": _countdown,  # with the numbers of the EGGROLL paper
    "gsm8k": gsm8k,
    "math": mathematics,
    "short_countdown": short_countdown,
}


def names() -> list[str]:
    """Return the names that `load` takes; those of reasoning-gym, "reasoning_gym/...", where it is installed."""
    installed = importlib.util.find_spec("reasoning_gym") is not None
    return [*TASKS, *(PREFIX + name for name in (datasets() if installed else []))]


def load(name: str, *, seed: int = 0, **options: Any) -> Task:
    """Make a task.

    Args:
        name: "arithmetic", "gsm8k", "math", "countdown", "short_countdown", or "reasoning_gym/" and the name of one of its data
            sets.
        seed: chooses the problems, or which are held out; the same seed gives the same task.
        options: of the task: those of `arithmetic`, `short_countdown`, `gsm8k`, `mathematics` or `reasoning`.

    Returns:
        The task.

    Raises:
        ValueError: no such task; the message lists the known ones. An option is out of its bounds.
        ModuleNotFoundError: the task needs a package that is not installed; the message has the command that installs it.
        TypeError: the task has no such option, or needs one that is not given.
    """
    if name.startswith(PREFIX):
        return reasoning(name.removeprefix(PREFIX), seed=seed, **options)
    if name not in TASKS:
        raise ValueError(f"name must be a task, {', '.join(TASKS)} or {PREFIX}<data set>, got {name!r}.")
    needed = [key for key, option in inspect.signature(TASKS[name]).parameters.items() if _is_needed(option)]
    if any(key not in options for key in needed):
        given = " ".join(f"{key}={key}.jsonl" for key in needed)
        raise TypeError(f"task {name} needs {' and '.join(needed)}, which are JSONL files, such as {given}")
    return TASKS[name](seed=seed, **options)


def _is_needed(option: inspect.Parameter) -> bool:
    return option.kind is option.KEYWORD_ONLY and option.default is option.empty
