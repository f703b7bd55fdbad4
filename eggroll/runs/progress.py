"""The progress line of a long run: how much is done, a bar, a few changing words, time left.

Drawn by rich on standard error; without rich, or when standard error is not a terminal, nothing is drawn.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def progress_line(name: str, total: float, *, enabled: bool | None = None) -> Iterator[Callable[[float, str], None]]:
    """Show a progress line while the context is open.

    Args:
        name: what is counted, such as "generations".
        total: the most there can be.
        enabled: draw the line; None: when standard error is a terminal and rich is installed.

    Yields:
        `show(completed, words)`: how many are done, and the words next to the bar.

    Raises:
        ModuleNotFoundError: `enabled` is True and rich is not installed.
    """
    if enabled is None:
        enabled = sys.stderr.isatty() and _has_rich()
    if not enabled:
        yield lambda completed, words: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description} {task.completed:,.0f}/{task.total:,.0f}"),
        BarColumn(),
        TextColumn("{task.fields[words]}  ETA"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(name, total=total, words="")
        yield lambda completed, words: bar.update(task, completed=min(completed, total), words=words)


def _has_rich() -> bool:
    try:
        import rich  # noqa: F401
    except ModuleNotFoundError:
        return False
    return True
