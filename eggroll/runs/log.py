"""`log.txt` in a run folder: what one seed printed and warned of, with timestamps, and its progress as plain lines."""

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
    """Copy standard output and standard error to the log of a folder, which gets plain lines in place of a progress bar.

    Args:
        folder: of the run.
        append: keep what the log has; a run that is continued does.
    """
    if not is_first():
        yield
        return
    with open(folder / NAME, "ab" if append else "wb", buffering=0) as file, contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(Copied(sys.stdout, file)))
        stack.enter_context(contextlib.redirect_stderr(Copied(sys.stderr, file)))
        stack.enter_context(_plain_warnings())
        _write(file, f"{_now()} start: {' '.join(sys.argv)}\n")
        try:
            yield
        except BaseException as error:
            _write(file, f"{_now()} ended by {type(error).__name__} {error}".rstrip() + "\n")
            raise


@contextlib.contextmanager
def _plain_warnings() -> Iterator[None]:
    """Show a warning as one plain line, without its place in the code."""
    usual = warnings.formatwarning

    def plain(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> str:
        return f"warning: {message}\n" if category is UserWarning else usual(message, category, *place, **more)

    setattr(warnings, "formatwarning", plain)  # noqa: B010
    try:
        yield
    finally:
        setattr(warnings, "formatwarning", usual)  # noqa: B010


class Copied(io.TextIOBase):
    """A stream whose lines a log gets too, each with the time.

    Attributes:
        stream: where the text goes.
    """

    def __init__(self, stream: Any, file: IO[bytes]):
        self.stream, self._file, self._is_new = stream, file, True

    @property
    def encoding(self) -> str | None:  # type: ignore[override]
        """Of the stream."""
        return getattr(self.stream, "encoding", None)

    def over(self, stream: Any) -> "Copied":
        """Another stream with the same log."""
        return Copied(stream, self._file)

    def log(self, text: str) -> None:
        """Write to the log alone."""
        for line in text.splitlines(keepends=True):
            _write(self._file, f"{_now()} {line}" if self._is_new else line)
            self._is_new = line.endswith("\n")

    def write(self, text: str) -> int:
        """Write to both."""
        self.log(text)
        return self.stream.write(text)

    def flush(self) -> None:
        """Flush the stream."""
        self.stream.flush()

    def isatty(self) -> bool:
        """Whether the stream is a terminal."""
        return self.stream.isatty()

    def fileno(self) -> int:
        """Of the stream."""
        return self.stream.fileno()


def _write(file: IO[bytes], text: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # a full disk ends the run where it writes what it needs
        file.write(text.encode(errors="backslashreplace"))


def _now() -> str:
    return datetime.datetime.now().isoformat(" ", "seconds")
