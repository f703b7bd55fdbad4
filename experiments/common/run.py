"""A run as the user sees it: one folder of artefacts and one JSON line of results.

Every experiment begins with `start_processes()`, writes its files into `run_folder(name)` and ends with `print_summary(...)`,
the last line of standard output. Compiled programs are kept in the user's cache folder; `JAX_ENABLE_COMPILATION_CACHE=false`
turns that off, `JAX_COMPILATION_CACHE_DIR` names another folder.
"""

import contextlib
import errno
import gc
import hashlib
import json
import logging
import math
import os
import platform
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from eggroll.devices.processes import end_at_once, is_first, join
from eggroll.files import user_cache, write_object

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
INTERRUPTED = 130  # exit status of a program that Ctrl-C ended
SUMMARY = "summary.json"  # of a seed, with its options; written last, so that it marks a finished run


def start_processes() -> bool:
    """Begin a run: use the compilation cache, and join the other processes of the run, of which only the first prints.

    Returns:
        Whether there are several processes (`eggroll.devices.processes`).

    Raises:
        ValueError, RuntimeError: the other processes cannot be found, or do not join in time.
    """
    use_compilation_cache()
    several = join()
    if several and not is_first():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    return several


def use_compilation_cache() -> None:
    """Keep compiled programs in the user's cache folder, unless JAX is configured with a folder of its own.

    Programs for CPUs are machine code, so the folder depends on the features of the processor.
    """
    if jax.config.values["jax_compilation_cache_dir"] is None:
        jax.config.update("jax_compilation_cache_dir", str(user_cache() / f"xla-{jax.__version__}-{_processor()}"))


def _processor() -> str:
    """Digest of the features of the processor."""
    features = platform.machine() + platform.processor()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        features = next((line for line in lines if line.startswith(("flags", "Features"))), features)
    return hashlib.sha256(features.encode()).hexdigest()[:12]


@contextlib.contextmanager
def exit_on_error() -> Iterator[None]:
    """End the process with a one-line message where options, files or packages are wrong, or the disk is full."""
    _drop_late_errors()
    try:
        yield
    except (ValueError, RuntimeError, OSError, ImportError) as error:
        words = str(error)
        if isinstance(error, OSError) and error.errno in FULL:
            words += ". Free some space; the same command with --resume continues."
        if jax.distributed.is_initialized():
            print(f"error: {words}", file=sys.stderr)
            end_at_once(1)
        sys.exit(f"error: {words}")


@contextlib.contextmanager
def exit_on_interrupt(words: str) -> Iterator[None]:
    """Print `words` and exit with `INTERRUPTED` at Ctrl-C."""
    try:
        yield
    except KeyboardInterrupt:
        print(words, file=sys.stderr)
        sys.exit(INTERRUPTED)


def _drop_late_errors() -> None:
    """Keep threads of orbax quiet whose checkpoint could not be written: the error itself is raised by the run."""
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    shown = sys.unraisablehook
    if getattr(shown, "__name__", "") == "show_unless_late":
        return

    def show_unless_late(late: Any) -> None:
        if str(late.exc_value) != "Event loop is closed":
            shown(late)

    sys.unraisablehook = show_unless_late


def leave(main: Callable[[], None]) -> None:
    """Run a command; if it exits with `INTERRUPTED`, skip the shutdown of the interpreter.

    XLA that was interrupted while it compiled crashes in that shutdown.
    """
    gc.freeze()  # collections, frequent while JAX traces, need not look at what was imported
    try:
        main()
    except SystemExit as ended:
        if ended.code != INTERRUPTED:
            raise
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(INTERRUPTED)


def run_folder(name: str | Path) -> Path:
    """Make the folder of a run.

    Args:
        name: folder name, made under `runs/`; a path of several parts is used unchanged.

    Returns:
        Path of the folder, which exists.
    """
    path = named_folder(name)
    path.mkdir(parents=True, exist_ok=True)
    return path


def named_folder(name: str | Path) -> Path:
    """Return the folder that `--folder NAME` means, as `run_folder` does, without making it."""
    path = Path(name)
    return path if len(path.parts) > 1 else Path("runs") / path


def finite_median(values: Iterable[float | None]) -> float:
    """Return the median of the finite ones of some numbers that `jsonable` wrote; NaN without any."""
    return statistics.median([value for value in map(number, values) if math.isfinite(value)] or [math.nan])


def jsonable(value: Any) -> Any:
    """Convert scalars, arrays, mappings and sequences for JSON; numbers that are not finite become None."""
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(item) for item in value]
    if isinstance(value, str | bool | int | None):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return jsonable(np.asarray(value).tolist())


def number(value: float | None) -> float:
    """Return a number that `jsonable` wrote: NaN for null, which stands for one that is not finite."""
    return math.nan if value is None else value


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write the fields of a JSON file atomically, with a checksum that `eggroll.files.read_object` compares."""
    write_object(path, jsonable(value))


def print_text(text: str) -> None:
    """Print what may contain any character, such as the text of a model: what standard output cannot encode is escaped."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)


def print_summary(summary: Mapping[str, Any]) -> None:
    """Print the results of a run as one line of JSON on standard output; NaN and infinities become null."""
    print(json.dumps(jsonable(summary), allow_nan=False), flush=True)
