"""The run in a folder, for a command that evaluates it."""

from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

from eggroll.experiments.common.run import SUMMARY, named_folder
from eggroll.files import read_object
from eggroll.journal.recovery import find_header


class StoredRun(NamedTuple):
    """What a folder says of the run of one seed."""

    folder: Path
    options: dict[str, Any]  # that determine its result
    seed: int
    summary: dict[str, Any] | None  # None: it is not finished


def read_run(folder: Path, *, experiment: str, names: Collection[str]) -> StoredRun:
    """Read a finished run; of one that was stopped, the options in its journal.

    Args:
        folder: of one seed; a single name that is no folder here is one under `runs/`, as for training.
        experiment: that it must be of, such as "rl".
        names: options that the runs of no other experiment have.

    Raises:
        FileNotFoundError: there is no such folder, no run in it, or runs of several seeds.
        ValueError: it is of another experiment, or a file is damaged.
    """
    folder = folder if folder.is_dir() else named_folder(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}.")
    if (folder / SUMMARY).is_file():
        summary = read_object(folder / SUMMARY)
        found = StoredRun(folder, summary.get("options", {}), summary.get("seed", 0), summary)
    else:
        if seeds := sorted(path.name for path in folder.glob("seed-*")):
            raise FileNotFoundError(f"{folder} has the runs of several seeds; name one of {', '.join(seeds)} in it.")
        header = find_header(folder / "journal.bin") if (folder / "journal.bin").is_file() else None
        if header is None or header.recipe is None:
            raise FileNotFoundError(f"{folder} has no finished run: there is no {SUMMARY} in it.")
        options = dict(header.recipe["options"])
        found = StoredRun(folder, options, options.pop("seed", 0), None)
    if not found.options.keys() >= set(names):
        raise ValueError(f"{folder} is a run of another experiment than experiments.{experiment}.")
    return found
