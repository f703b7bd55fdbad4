"""Processes that outlive their parent: found by a mark in their environment, which their own children inherit.

mark = new_mark()                   a variable for the environment of a process
survivors(mark, within=5.0)         marked processes that are still running after 5 seconds (Linux)
"""

import contextlib
import secrets
import time
from pathlib import Path

Mark = dict[str, str]


def new_mark() -> Mark:
    """Return a variable that no other process has."""
    return {"EGGROLL_FAULTDRILL": secrets.token_hex(8)}


def survivors(mark: Mark, *, within: float) -> list[int]:
    """Return the processes with a mark that are still running after `within` seconds."""
    deadline = time.monotonic() + within
    while (found := _running(mark)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return found


def _running(mark: Mark) -> list[int]:
    [(name, value)], found = mark.items(), []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended, or belongs to another user
            if f"{name}={value}".encode() in (process / "environ").read_bytes().split(b"\0"):
                found.append(int(process.name))
    return found
