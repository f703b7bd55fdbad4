"""Environments by name."""

import difflib

from envs.protocol import Environment


def make(name: str) -> Environment:
    """Make an environment by its name.

    Args:
        name: a name of gymnax, for example "CartPole-v1".

    Returns:
        The `Environment`.

    Raises:
        ValueError: no suite has it; the message suggests the nearest names.
        ModuleNotFoundError: gymnax is not installed.
    """
    from envs import gymnax

    known = gymnax.names()
    if name not in known:
        raise ValueError(f"env must name an environment, got {name!r}; {_suggestion(name, known)}.")
    return gymnax.make(name)


def _suggestion(name: str, known: list[str]) -> str:
    by_lower = {other.lower(): other for other in known}
    near = difflib.get_close_matches(str(name).lower(), by_lower, n=3, cutoff=0.4)
    return f"did you mean {' or '.join(by_lower[other] for other in near)}" if near else f"known are {', '.join(known)}"
