"""The user's own code by its name: `--import my_maze.py` registers environments, `--network my_maze.py:Policy` is a class."""

import functools
import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any


def import_code(source: str, option: str) -> ModuleType:
    """Import a module by its name, or a file that ends in .py, once.

    Args:
        source: "package.module", found as Python finds modules, or the path of a file, whose folder joins `sys.path`.
        option: that names it, for errors.

    Raises:
        ValueError: it does not exist, or raises an error; the message has its type, and the line of the file.
    """
    try:
        return _import_file(Path(source).resolve()) if source.endswith(".py") else importlib.import_module(source)
    except _NoFile as error:
        raise ValueError(f"{option}: there is no file {source}.") from error
    except ModuleNotFoundError as error:
        if not (error.name and f"{source}.".startswith(f"{error.name}.")):
            raise ValueError(_failure(source, option, error)) from error
        raise ValueError(
            f"{option}: there is no module '{error.name}'; name a file, such as my_env.py, or a module that Python finds."
        ) from error
    except (Exception, SystemExit) as error:
        raise ValueError(_failure(source, option, error)) from error


def find_class(name: str, option: str) -> Any:
    """Return what "source:name" names, with a source as `import_code` takes it.

    Raises:
        ValueError: as `import_code`, or the module has no class of that name; the message lists those that it has.
    """
    source, _, wanted = name.rpartition(":")
    module = import_code(source, option)
    found = getattr(module, wanted, None)
    if not isinstance(found, type):
        own = [key for key, value in vars(module).items() if isinstance(value, type) and value.__module__ == module.__name__]
        raise ValueError(f"{option}: {source} has no class {wanted!r}; it has {', '.join(own) or 'no class of its own'}.")
    return found


class _NoFile(Exception):
    """The file that was named does not exist."""


@functools.cache
def _import_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise _NoFile
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    if path.stem in sys.modules:
        raise ImportError(f"a module '{path.stem}' is imported already; give the file another name")
    sys.modules[path.stem] = module  # dataclasses and pickles look it up
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[path.stem]
        raise
    return module


def _failure(source: str, option: str, error: BaseException) -> str:
    """Describe an error of an import, with the last line of the source that it went through."""
    own, line, trace = Path(source).name, None, error.__traceback__
    while trace is not None:
        name = Path(trace.tb_frame.f_code.co_filename)
        line = trace.tb_lineno if own in (name.name, name.stem) else line
        trace = trace.tb_next
    if isinstance(error, SyntaxError):
        line = error.lineno
    where = f", line {line}" if line else ""
    return f"{option}: {source}{where} raised {type(error).__name__}: {' '.join(str(error).split())[:500]}"
