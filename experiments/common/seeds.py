"""The seeds of one experiment: a folder for each, cleared or gone on with, and one summary of all."""

import shutil
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from eggroll.devices.processes import is_first, wait_for_all
from eggroll.experiments.common.run import SUMMARY, run_folder

_OF_A_RUN = ("journal.bin", "checkpoints", "samples")  # what a run goes on from, and what it adds to


class Seeded(Protocol):
    """What the options of every experiment have."""

    @property
    def folder(self) -> Path | None:
        """The run folder, with a folder per seed in it where there are several."""

    @property
    def seed(self) -> int:
        """The first seed."""

    @property
    def seeds(self) -> int:
        """Runs, with the seeds seed, seed + 1, ..."""


def seed_folder(config: Seeded, seed: int, *, default: str) -> Path:
    """Make the folder of a seed; without a folder in the options it is `runs/<default>-<seed>`."""
    if config.folder is None:
        return run_folder(f"{default}-{seed}")
    return run_folder(config.folder if config.seeds == 1 else config.folder / f"seed-{seed}")


def begin(folder: Path, *, resume: bool) -> None:
    """Make a seed's folder ready: what says that its run is whole goes, and without `resume` what it could go on from."""
    if is_first():
        (folder / SUMMARY).unlink(missing_ok=True)
        for path in () if resume else (folder / name for name in _OF_A_RUN):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
    wait_for_all("run folder")


def summary_of(rows: Sequence[dict[str, Any]], *, first_seed: int) -> dict[str, Any]:
    """Return the summary of the seeds' rows: the only one, or the means of all with every row under "seeds"."""
    if len(rows) == 1:
        return rows[0]
    means = {name: statistics.fmean(row[name] for row in rows) for name in rows[0]}
    return means | {"seeds": [{"seed": first_seed + index} | row for index, row in enumerate(rows)]}
