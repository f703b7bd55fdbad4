"""The progress of a long run on standard error: how much is done, a few changing words, time left.

A bar drawn by rich where standard error is a terminal, with the words below it, where 80 columns have room for both;
otherwise, and in the log of a run (`eggroll.runs.log`), a plain line every few seconds:

    generations, of 50: compiling, or in the first of this run, 0:00:10
    generations 12 of 50: best 0.41  mean 0.33  4 members/s, 0:05:20, ETA 0:15:08
"""

import contextlib
import datetime
import math
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from eggroll.runs.log import Copied

FIRST_SECONDS = 5.0  # before the first plain line, and between lines
STARTING = "compiling, or in the first of this run"
SHARE = 0.02  # later, the share of the elapsed time that passes between lines


@contextlib.contextmanager
def progress_line(name: str, total: float, *, enabled: bool | None = None) -> Iterator[Callable[..., None]]:
    """Show the progress while the context is open.

    Args:
        name: what is counted, such as "generations".
        total: the most there can be.
        enabled: True: draw the bar; False: show nothing; None: draw the bar where standard error is a terminal and rich is
            installed, and otherwise write plain lines, the first after `FIRST_SECONDS`.

    Yields:
        `show(completed, words, total)`: how many are done, the words next to the bar and, where it is not that from above, how
        many are likely in the end.

    Raises:
        ModuleNotFoundError: `enabled` is True and rich is not installed.
    """
    if enabled is False:
        yield lambda completed, words, total=None: None
        return
    if not (enabled or (sys.stderr.isatty() and _has_rich())):
        with _PlainLines(name, total, _write_error) as plain:
            yield plain.show
        return
    printed = sys.stdout, sys.stderr
    with contextlib.ExitStack() as stack:
        bar = stack.enter_context(_make_bar())
        task = bar.add_task(name, total=total, words=STARTING)
        lines = stack.enter_context(_PlainLines(name, total, printed[1].log)) if isinstance(printed[1], Copied) else None
        redirects = contextlib.redirect_stdout, contextlib.redirect_stderr
        for stream, above, redirect in zip(printed, (sys.stdout, sys.stderr), redirects, strict=True):
            if isinstance(stream, Copied) and above is not stream:  # rich shows above the bar what is printed
                stack.enter_context(redirect(stream.over(above)))

        def show(completed: float, words: str, likely: float = total) -> None:
            next(row for row in bar.tasks if row.id == task).total = likely  # `update` would forget the speed
            bar.update(task, completed=min(completed, likely), words=words)
            if lines is not None:
                lines.show(completed, words, likely)

        yield show


def _make_bar() -> Any:
    """A bar whose words have a line of their own, which is wrapped where it is too long for the terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.text import Text

    class Bar(Progress):
        def get_renderables(self) -> Iterator[Any]:
            yield self.make_tasks_table(self.tasks)
            yield from (Text(f"  {task.fields['words']}") for task in self.tasks)

    columns = (
        TextColumn("{task.description} {task.completed:,.0f}/{task.total:,.0f}"),
        BarColumn(bar_width=12),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
    )
    file = sys.stderr.stream if isinstance(sys.stderr, Copied) else None  # a log has no bars
    # What is printed meanwhile appears above the bar, unless it goes to a file.
    return Bar(*columns, console=Console(stderr=True, file=file), redirect_stdout=sys.stdout.isatty())


class _PlainLines:
    """Writes lines in a thread of its own, so that a long compilation or generation shows too."""

    def __init__(self, name: str, total: float, write: Callable[[str], object]):
        self._name, self._total, self._write_text = name, total, write
        self._start = time.monotonic()
        self._first: tuple[float, float] | None = None  # time and count of the first `show`: what came before compiled
        self._last: tuple[float, float, str] | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._write, daemon=True)

    def __enter__(self) -> "_PlainLines":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()

    def show(self, completed: float, words: str, total: float | None = None) -> None:
        now, self._total = time.monotonic(), self._total if total is None else total
        self._first = self._first or (now, completed)
        self._last = now, completed, words

    def _write(self) -> None:
        while not self._ended.wait(max(FIRST_SECONDS, SHARE * (time.monotonic() - self._start))):
            with contextlib.suppress(OSError, ValueError):  # a closed pipe does not end the run
                self._write_text(f"{self._line()}\n")

    def _line(self) -> str:
        elapsed, of = _duration(time.monotonic() - self._start), f"of {self._total:,.0f}"
        if self._first is None or self._last is None:
            return f"{self._name}, {of}: {STARTING}, {elapsed}"
        (began, before), (now, completed, words) = self._first, self._last
        speed = (completed - before) / (now - began) if now > began else 0.0
        left = max(0.0, self._total - completed) / speed if speed > 0 else math.inf
        eta = f", ETA {_duration(left)}" if math.isfinite(left) else ""
        return f"{self._name} {completed:,.0f} {of}: {words}, {elapsed}{eta}"


def _write_error(text: str) -> None:
    sys.stderr.write(text)
    sys.stderr.flush()


def _duration(seconds: float) -> str:
    return str(datetime.timedelta(seconds=round(seconds)))


def _has_rich() -> bool:
    try:
        import rich  # noqa: F401
    except ModuleNotFoundError:
        return False
    return True
