"""The one memo of the library: plans, chunk sizes and compiled programs.

A strategy is a plain frozen value. What is derived from it is kept here, by the value of the strategy, the function, and the
shapes and dtypes that it was made for. The memo is bounded: the entries used least recently are dropped.
An entry keeps the strategy alive, with everything that its functions close over: pass large arrays as the batch.
"""

import collections
import dataclasses
import threading
import warnings
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import jax
import numpy as np

LIMIT = 256  # entries other than plans
MAX_PLANS = 1024  # small, and never dropped for programs: a run replayed with another plan would silently be another run
MANY = 16  # programs of the same code that are compiled before a warning

_entries: collections.OrderedDict[tuple[Hashable, ...], Any] = collections.OrderedDict()
_lock = threading.RLock()


class Identity:
    """Key of one object: equal to the keys of the same object only."""

    def __init__(self, value: Any):
        self.value = value  # a reference, so that no other object gets its identity

    def __hash__(self) -> int:
        return id(self.value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Identity) and other.value is self.value


def key_of(value: Any) -> Hashable:
    """Turn a value into a key: itself if it has a hash; else containers and dataclasses by their parts, others by identity."""
    try:
        hash(value)
        return value
    except TypeError:
        pass
    if isinstance(value, list | tuple):
        return type(value), tuple(map(key_of, value))
    if isinstance(value, Mapping):
        return type(value), tuple((name, key_of(part)) for name, part in value.items())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return type(value), tuple(key_of(getattr(value, field.name)) for field in dataclasses.fields(value))
    return Identity(value)


def signature(tree: Any) -> Hashable:
    """Structure, shapes and dtypes of a pytree of arrays, numbers or shapes."""
    leaves, structure = jax.tree.flatten(tree)
    arrays = [leaf if hasattr(leaf, "dtype") else np.asarray(leaf) for leaf in leaves]
    return structure, tuple((array.shape, array.dtype) for array in arrays)


def find(*key: Any) -> Any:
    """Return the entry of a key; None where there is none."""
    place = tuple(map(key_of, key))
    with _lock:
        if place in _entries:
            _entries.move_to_end(place)
        return _entries.get(place)


def find_all(*prefix: Any) -> list[Any]:
    """Return the entries whose key starts with `prefix`."""
    start = tuple(map(key_of, prefix))
    with _lock:
        return [value for parts, value in _entries.items() if parts[: len(start)] == start]


def store(*key: Any, value: Any) -> None:
    """Store an entry, and drop those used least recently: programs beyond `LIMIT`, plans beyond `MAX_PLANS`."""
    place = tuple(map(key_of, key))
    with _lock:
        _entries[place] = value
        _entries.move_to_end(place)
        for kind_is_plan, most in ((True, MAX_PLANS), (False, LIMIT)):
            alike = [other for other in _entries if (other[0] == "plan") == kind_is_plan]
            for oldest in alike[: max(0, len(alike) - most)]:
                del _entries[oldest]


def remember(*key: Any, make: Callable[[], Any]) -> Any:
    """Return the entry of a key; made and stored where there is none."""
    found = find(*key)
    if found is None:
        found = make()
        store(*key, value=found)
    return found


def compile_once(
    *key: Any,
    function: Callable,
    counted: tuple[Any, Any] | None = None,
    out_shardings: Any = None,
    donate_argnums: int | tuple[int, ...] = (),
) -> Callable:
    """Return `jax.jit(function)`, the same object for the same key.

    Args:
        *key: everything that `function` depends on but its arguments.
        function: traced when the program runs for the first time.
        counted: (strategy, the user's function): many programs of the same code are a warning, given once.
        out_shardings: as for `jax.jit`, like `donate_argnums`.
        donate_argnums: arguments whose memory the program reuses.
    """

    def make() -> Callable:
        if counted is not None:
            _count(*counted)
        return jax.jit(function, out_shardings=out_shardings, donate_argnums=donate_argnums)

    return remember(*key, make=make)


def num_entries() -> int:
    """Return how many entries the memo holds."""
    return len(_entries)


def _count(strategy: Any, function: Any) -> None:
    code = getattr(function, "__code__", None) or getattr(getattr(function, "func", None), "__code__", type(function))
    count = 1 + (find("count", strategy, code) or 0)
    store("count", strategy, code, value=count)
    if count == MANY:
        warnings.warn(
            f"{getattr(function, '__qualname__', type(function).__name__)} was compiled {count} times: pass the same function "
            "object in every generation, not a new lambda or partial, and batches of a few shapes only.",
            stacklevel=5,
        )
