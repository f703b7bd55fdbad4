"""A run as the user sees it: one folder of artefacts and one JSON line of results.

Every experiment writes its files into `run_folder(name)` and ends with `print_summary(...)`, the last line of standard output.
"""

import json
import math
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from eggroll.devices.processes import is_first, join

INTERRUPTED = 130  # what a shell expects of a program that Ctrl-C ended
SUMMARY = "summary.json"  # of a seed, with the options that gave it; it is written last


def join_processes() -> bool:
    """Meet the other processes of this run, if there are any (`eggroll.processes`); only the first one prints.

    Returns:
        Whether there are several.

    Raises:
        ValueError, RuntimeError: they cannot be found, or do not come.
    """
    several = join()
    if several and not is_first():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    return several


def leave(main: Callable[[], None]) -> None:
    """Run a command; where it ends with `INTERRUPTED` the process ends at once, without the interpreter's own ending.

    XLA that was interrupted while it compiled crashes there.
    """
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
        name: folder name, made under `runs/`; a path with a folder in it is taken as it is.

    Returns:
        Path of the folder, which exists.
    """
    path = Path(name)
    path = path if len(path.parts) > 1 else Path("runs") / path
    path.mkdir(parents=True, exist_ok=True)
    return path


def jsonable(value: Any) -> Any:
    """Turn scalars, arrays, mappings and sequences into what JSON holds; numbers that are not finite become None."""
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(item) for item in value]
    if isinstance(value, str | bool | int | None):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return jsonable(np.asarray(value).tolist())


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file whole or not at all."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(jsonable(value), indent=1, allow_nan=False) + "\n")
    partial.replace(path)


def print_summary(summary: Mapping[str, Any]) -> None:
    """Print the results of a run as one line of JSON on standard output; NaN and infinities become null."""
    print(json.dumps(jsonable(summary), allow_nan=False), flush=True)
