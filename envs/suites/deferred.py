"""Modules that a suite imports at its top and needs only to draw: they are imported when they are first used.

gymnax imports seaborn, with pandas and scipy.stats, and matplotlib for the pictures of a few environments; that takes longer
than importing JAX.
"""

import contextlib
import importlib
import importlib.util
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any


class _Deferred(ModuleType):
    """Stands for a module until one of its names is asked for."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        _remove(self)
        return getattr(importlib.import_module(self.__name__), name)


@contextlib.contextmanager
def deferred(*names: str) -> Iterator[None]:
    """Have modules imported at their first use, by code that imports them within this context.

    Args:
        names: dotted, a package before its submodules; those that are imported already, or not installed, stay as they are.
    """
    placed: dict[str, _Deferred] = {}
    for name in names:
        package, _, child = name.rpartition(".")
        if name in sys.modules or (package and package not in placed):
            continue
        module = _Deferred(name)
        if package:
            setattr(placed[package], child, module)
        else:
            spec = importlib.util.find_spec(name)  # without importing it
            if spec is None:
                continue
            module.__path__ = list(spec.submodule_search_locations or ())
        placed[name] = module
    sys.modules.update(placed)
    try:
        yield
    finally:
        for module in placed.values():
            _remove(module)


def _remove(module: ModuleType) -> None:
    """Make room for the module itself, and for its package."""
    for name in (module.__name__, module.__name__.rpartition(".")[0]):
        if isinstance(sys.modules.get(name), _Deferred):
            del sys.modules[name]
