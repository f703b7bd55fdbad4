"""`log.txt` in the run folder: a copy of what one seed printed and warned of, with timestamps; a warning is one plain line."""

import contextlib
import datetime
import io
import sys
import warnings
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
        has_bar = sys.stderr.isatty()
        if not has_bar:
            stack.enter_context(contextlib.redirect_stderr(_Copied(sys.stderr, file)))
        stack.enter_context(_plain_warnings(file if has_bar else None))
        _write(file, f"{_now()} start: {' '.join(sys.argv)}\n")
        try:
            yield
        except BaseException as error:
            _write(file, f"{_now()} ended by {type(error).__name__} {error}".rstrip() + "\n")
            raise


@contextlib.contextmanager
def _plain_warnings(file: IO[str] | None) -> Iterator[None]:
    """Show a warning without its place in the code; a file gets it, too."""
    usual = warnings.formatwarning

    def plain(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> str:
        if category is not UserWarning:
            return usual(message, category, *place, **more)
        if file is not None:
            _write(file, f"{_now()} warning: {message}\n")
        return f"warning: {message}\n"

    setattr(warnings, "formatwarning", plain)  # noqa: B010
    try:
        yield
    finally:
        setattr(warnings, "formatwarning", usual)  # noqa: B010


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
