"""The progress line of a training run: generation, best and mean fitness, members per second, time left.

Drawn by rich on standard error; without rich, or when standard error is not a terminal, nothing is drawn.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def progress_line(generations: int, *, enabled: bool | None = None) -> Iterator[Callable[[Any], None]]:
    """Show a progress line while the context is open.

    Args:
        generations: how many there will be at most.
        enabled: draw it; None: when standard error is a terminal and rich is installed.

    Yields:
        `show(record)`, to be called after every generation.

    Raises:
        ModuleNotFoundError: `enabled` is True and rich is not installed.
    """
    if enabled is None:
        enabled = sys.stderr.isatty() and _has_rich()
    if not enabled:
        yield lambda record: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("generation"),
        MofNCompleteColumn(),
        BarColumn(),
        TextColumn("best {task.fields[best]:.4g}  mean {task.fields[mean]:.4g}  {task.fields[rate]:,.0f} members/s  ETA"),
        TimeRemainingColumn(),
    )
    nothing: dict[str, Any] = dict(best=float("nan"), mean=float("nan"), rate=0.0)
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("training", total=generations, **nothing)

        def show(record: Any) -> None:
            values = dict(best=record.best_fitness, mean=record.mean_fitness, rate=record.members_per_second)
            bar.update(task, advance=1, **values)

        yield show


def _has_rich() -> bool:
    try:
        import rich  # noqa: F401
    except ModuleNotFoundError:
        return False
    return True
