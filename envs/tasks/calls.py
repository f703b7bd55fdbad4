"""How a reward is called, as TRL does: everything by keyword, on copies of the lists, awaited where it is asynchronous.

    reward(prompts=[...], completions=[...], answer=[...], ...) -> one number per completion, None to abstain

Owns the call, its signature and what counts as a number; not time limits (`workers`), nor what failures score (`scoring`).
"""

import asyncio
import inspect
import math
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

Reward = Callable[..., Sequence[float | None] | Awaitable[Sequence[float | None]]]

SIGNATURE = "def reward(completions, **kwargs)"
MAX_TEXT = 500  # characters of an error


class InvalidReward(ValueError):
    """A reward does not follow the protocol."""


def name_of(reward: Reward) -> str:
    """Return the name of a reward in errors: of a function, or of the class of an object."""
    return getattr(reward, "__name__", type(reward).__name__)


def shorten(text: str) -> str:
    """Return the beginning of an error."""
    return text if len(text) <= MAX_TEXT else text[:MAX_TEXT] + "..."


def check_callable(reward: Any) -> None:
    """Raise InvalidReward for a reward that is no function."""
    if not callable(reward):
        raise InvalidReward(f"a reward must be a function such as `{SIGNATURE}`, got a {type(reward).__name__}.")


def check_signature(reward: Reward, columns: Iterable[str]) -> None:
    """Check that a reward takes prompts, completions and all columns by keyword; it is not called.

    Raises:
        InvalidReward: it does not, or is no function.
        ValueError: a column is called "prompts" or "completions".
    """
    check_callable(reward)
    columns = tuple(columns)
    if taken := {"prompts", "completions"}.intersection(columns):
        raise ValueError(f"a column must not be called prompts or completions, got {' and '.join(sorted(taken))}.")
    names = ["prompts", "completions", *columns]
    try:
        signature = inspect.signature(reward, follow_wrapped=False)  # of what is called, not of what a decorator wraps
    except (TypeError, ValueError):
        return  # some built-in functions have none
    wrong = f"reward '{name_of(reward)}' must take {_list(names)} by keyword, such as `{SIGNATURE}`"
    for name, parameter in signature.parameters.items():
        by_keyword = parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        if by_keyword and parameter.default is parameter.empty and name not in names:
            raise InvalidReward(f"{wrong}: it needs the column '{name}', the rows have {_list(columns) or 'no columns'}.")
    try:
        signature.bind(**dict.fromkeys(names))
    except TypeError as error:
        raise InvalidReward(f"{wrong}: {error}.") from None


def call(reward: Reward, prompts: Sequence[str], completions: Sequence[str], columns: Mapping[str, Sequence[Any]]) -> list:
    """Return what a reward gives.

    Raises:
        InvalidReward: that is not a list of one entry per completion.
    """
    lists = {"prompts": prompts, "completions": completions, **columns}
    values: Any = reward(**{name: _copy(list(entries)) for name, entries in lists.items()})
    if inspect.isawaitable(values):
        values = _run(values)
    length = _length(values)
    if length != len(completions):
        got = f"a {type(values).__name__}" if length is None else f"{length} values"
        raise InvalidReward(f"reward '{name_of(reward)}' must return one float per completion, {len(completions)}, got {got}.")
    return values.tolist() if hasattr(values, "tolist") else list(values)


def number(value: Any) -> float:
    """Return an entry of what a reward gives as a float; NaN if it is no real number."""
    try:
        is_real = not isinstance(value, str | bytes) and not np.iscomplexobj(value) and np.ndim(value) == 0
        return float(value) if is_real else math.nan
    except (TypeError, ValueError, OverflowError):
        return math.nan


def _list(names: Sequence[str]) -> str:
    """Join names as English does."""
    return " and ".join(filter(None, (", ".join(names[:-1]), *names[-1:])))


def _copy(value: Any) -> Any:
    """Deep-copy lists and dicts: a reward that edits its arguments affects no other call."""
    if type(value) is list:
        return [_copy(entry) for entry in value]
    if type(value) is dict:
        return {name: _copy(entry) for name, entry in value.items()}
    return value


def _length(values: Any) -> int | None:
    """Return the number of entries; None for what is no list or array."""
    if isinstance(values, str | bytes | Mapping | Set):
        return None
    try:
        return len(values)
    except TypeError:  # also of an array without axes, which has __len__
        return None


def _run(values: Awaitable) -> Any:
    """Wait for an asynchronous reward."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(_wait(values))
    with ThreadPoolExecutor(1) as thread:  # a notebook already runs a loop in this thread
        return thread.submit(asyncio.run, _wait(values)).result()


async def _wait(values: Awaitable) -> Any:
    return await values
