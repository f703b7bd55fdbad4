"""Processes that outlive what started them: found by a mark in their environment, which all that they start inherits.

mark = new_mark()                   a variable for the environment of a process
survivors(mark, within=5.0)         processes with it that still run after so many seconds (Linux)
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
    """Return the processes that started with a mark and have not ended after `within` seconds."""
    deadline = time.monotonic() + within
    while (found := _running(mark)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return found


def _running(mark: Mark) -> list[int]:
    [(name, value)], found = mark.items(), []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended, or belongs to somebody else
            if f"{name}={value}".encode() in (process / "environ").read_bytes().split(b"\0"):
                found.append(int(process.name))
    return found
