"""`log.txt` in the run folder: a copy of what one seed printed, with timestamps."""

import contextlib
import datetime
import io
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from eggroll.devices.processes import is_first

NAME = "log.txt"


@contextlib.contextmanager
def logged(folder: Path, *, append: bool) -> Iterator[None]:
    """Copy standard output, and standard error unless it is a terminal with a progress bar, to the log of a folder.

    Args:
        folder: of the run.
        append: keep what the log has; a run that is continued does.
    """
    if not is_first():
        yield
        return
    with open(folder / NAME, "a" if append else "w") as file, contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(_Copied(sys.stdout, file)))
        if not sys.stderr.isatty():
            stack.enter_context(contextlib.redirect_stderr(_Copied(sys.stderr, file)))
        _write(file, f"{_now()} start: {' '.join(sys.argv)}\n")
        try:
            yield
        except BaseException as error:
            _write(file, f"{_now()} ended by {type(error).__name__} {error}".rstrip() + "\n")
            raise


class _Copied(io.TextIOBase):
    """A stream whose lines a file gets too, each with the time."""

    def __init__(self, stream: Any, file: IO[str]):
        self._stream, self._file, self._is_new = stream, file, True

    def write(self, text: str) -> int:
        for line in text.splitlines(keepends=True):
            _write(self._file, f"{_now()} {line}" if self._is_new else line)
            self._is_new = line.endswith("\n")
        return self._stream.write(text)

    def flush(self) -> None:
        self._stream.flush()

    def isatty(self) -> bool:
        return self._stream.isatty()

    def fileno(self) -> int:
        return self._stream.fileno()


def _write(file: IO[str], text: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # a full disk ends the run where it writes what it needs
        file.write(text)
        file.flush()


def _now() -> str:
    return datetime.datetime.now().isoformat(" ", "seconds")
