"""Rewards by name, as a command line has them, each with a weight if it has one.

    score.py:correct    score.py:short=0.1    my_package.rewards:correct    last_number

A name with a colon is a function of a file or of a module; without one it is a reward of `NAMED`. Naming a reward imports its
file, whose folder is added at the end of `sys.path`. Worker processes import it again, by its path.
"""

import contextlib
import functools
import hashlib
import importlib
import importlib.util
import inspect
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from eggroll.envs.tasks.calls import InvalidReward, Reward, shorten
from eggroll.envs.tasks.rewards import THINK_ANSWER, Weighted, math_matches, math_verify, number_matches

NAMED: dict[str, Reward] = {
    "last_number": number_matches,
    "math_verify": math_matches,
    "think_answer": THINK_ANSWER,
}
FORMS = f"FILE.py:FUNCTION, MODULE:FUNCTION or one of {', '.join(NAMED)}"


def named_reward(names: Sequence[str]) -> Reward:
    """Return the reward of a name, or the weighted sum of those of several.

    Args:
        names: at least one, such as "score.py:correct" or "score.py:short=0.1"; without a weight it is 1.

    Raises:
        InvalidReward: no such reward, or a weight that is no finite number; a file or module that cannot be imported, with the
            line that fails, or that lacks the function, with those that it has.
        FileNotFoundError: there is no such file.
        ModuleNotFoundError: math_verify is not installed.
    """
    parts = [_parse(name) for name in names]
    rewards = [(_find(name), weight) for name, weight in parts]
    return rewards[0][0] if [weight for _, weight in rewards] == [1.0] else Weighted(*rewards)


def reward_file(name: str) -> Path | None:
    """Return the file that a named reward is in, without running it; None for those of `NAMED`, and where there is none.

    To find a module within a package, the package is imported.
    """
    source, _, function = _parse(name)[0].rpartition(":")
    if not source or not function:
        return None
    if source.endswith(".py"):
        return Path(source)
    try:
        found = importlib.util.find_spec(source)
    except (ImportError, ValueError):
        return None
    return Path(found.origin) if found and found.has_location and found.origin else None


def _parse(text: str) -> tuple[str, float]:
    """Split a name from its weight."""
    name, equals, weight = text.rpartition("=")
    if not equals or ":" in weight or "/" in weight:  # the "=" is part of a path
        return text, 1.0
    try:
        value = float(weight)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise InvalidReward(f"reward must have a finite number as its weight, such as score.py:short=0.1, got {text!r}.")
    return name, value


def _find(name: str) -> Reward:
    source, colon, function = name.rpartition(":")
    if colon and source and function:
        return ImportedReward(str(Path(source).resolve()) if source.endswith(".py") else source, function)
    if name.endswith(".py") or colon:
        path = Path(name.strip(":"))
        known = f"; it has {_functions(_import(str(path)))}" if path.is_file() else ""
        raise InvalidReward(f"reward must be {FORMS}, got {name!r}{known}.")
    if name not in NAMED:
        raise InvalidReward(f"reward must be {FORMS}, got {name!r}.")
    if name == "math_verify":
        math_verify()
    return NAMED[name]


class ImportedReward:
    """A function of a file or a module, as a reward that processes import by its name.

    Args:
        source: absolute path of a file that ends in .py, or the name of a module.
        function: its name.

    Raises:
        InvalidReward, FileNotFoundError: as `named_reward`.
    """

    def __init__(self, source: str, function: str):
        self._source, self._name = source, function
        module = _import(source)
        found = getattr(module, function, None)
        if not callable(found):
            has = "is no function" if hasattr(module, function) else "is missing"
            raise InvalidReward(f"reward '{function}' {has} in {source}, which has {_functions(module)}.")
        self._function: Callable[..., Any] = found
        self.__name__ = function
        with contextlib.suppress(TypeError, ValueError):  # some built-in functions have none
            self.__signature__ = inspect.signature(found, follow_wrapped=False)  # what `calls.check_signature` reads

    def __reduce__(self) -> tuple:
        return ImportedReward, (self._source, self._name)

    def __call__(self, **arguments: Any) -> Any:
        """Call the function."""
        return self._function(**arguments)


def _functions(module: ModuleType) -> str:
    """Names of what a module defines and could be a reward."""
    own = [
        name
        for name, value in vars(module).items()
        if callable(value) and not name.startswith("_") and getattr(value, "__module__", None) == module.__name__
    ]
    return ", ".join(own) or "no function of its own"


def _import(source: str) -> ModuleType:
    if source.endswith(".py"):
        path = Path(source).resolve()
        if not path.is_file():
            raise FileNotFoundError(f"reward: there is no file {source}.")
        return _run(path, path.read_bytes())
    try:
        return importlib.import_module(source)
    except (Exception, SystemExit) as error:
        if isinstance(error, ModuleNotFoundError) and error.name and f"{source}.".startswith(f"{error.name}."):
            raise InvalidReward(f"reward: there is no module '{error.name}'; a file is named as score.py:function.") from None
        file = importlib.util.find_spec(source.partition(".")[0])
        raise InvalidReward(_failure(source, error, (file and file.origin) or "")) from None


@functools.lru_cache(maxsize=8)
def _run(path: Path, content: bytes) -> ModuleType:
    """Run a file once; another content is another module."""
    name = f"eggroll_reward_{path.stem}_{hashlib.sha256(bytes(path) + content).hexdigest()[:8]}"
    module = ModuleType(name)
    module.__file__ = str(path)
    sys.modules[name] = module  # dataclasses and pickles look it up
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    try:
        exec(compile(content, str(path), "exec"), module.__dict__)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise InvalidReward(_failure(str(path), error, str(path))) from None
    return module


def _failure(source: str, error: BaseException, file: str) -> str:
    """Describe an error of an import, with the last line of the file that it went through."""
    line = error.lineno if isinstance(error, SyntaxError) and error.filename == file else None
    trace = error.__traceback__
    while trace is not None:
        line = trace.tb_lineno if trace.tb_frame.f_code.co_filename == file else line
        trace = trace.tb_next
    words = error.msg if isinstance(error, SyntaxError) else " ".join(str(error).split())
    where = f", line {line}" if line else ""
    return shorten(f"reward: {source}{where} raised {type(error).__name__}: {words}")
