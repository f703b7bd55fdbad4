"""Kills a training run at random moments and lets it go on: `python -m experiments.faultdrill --help`.

A small network is trained in a process of its own, with a journal and checkpoints. The process is killed (SIGKILL) while it
starts or resumes, in training, in the middle of writing a record of the journal, or in the middle of writing a checkpoint, each
at a random place, and started again, until it is done. Its parameters must be those of a run that nobody disturbed, bit for
bit. Then copies of its files are cut off or get a flipped bit, and every damage must be found, or do no harm. The last line of
standard output is a JSON object.
"""

import dataclasses
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tyro

from eggroll.experiments.common.run import print_summary, run_folder
from eggroll.experiments.faultdrill.damages import damage_apart
from eggroll.experiments.faultdrill.kills import drill
from eggroll.experiments.faultdrill.training import work


@dataclasses.dataclass(frozen=True)
class Config:
    """Kill a training run at random moments, resume it every time, compare it with an undisturbed run."""

    kills: int = 24
    """How often the run is killed: in turn while it starts, in training, in writing the journal, in writing a checkpoint."""
    generations: int = 600
    """Generations of the run."""
    checkpoint_every: int = 10
    """Generations between checkpoints."""
    damages: int = 40
    """Copies of the files that are damaged, half of them cut off, half with a flipped byte."""
    seed: int = 0
    """Seed of the moments and the damages."""
    folder: Path = Path("runs/faultdrill")
    """Run folder; the runs of an earlier drill in it are replaced."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line; it ends with 1 where something was lost, differs or was not found."""
    config = tyro.cli(Config, args=arguments, prog="python -m experiments.faultdrill")
    if config.kills < 1 or config.generations <= config.kills:
        sys.exit(f"error: generations must be more than kills, and those >= 1, got {config.generations} and {config.kills}.")
    root = run_folder(config.folder)
    for name in ("undisturbed", "killed"):
        shutil.rmtree(root / name, ignore_errors=True)
    start = time.perf_counter()
    plan: Any = {"generations": config.generations, "checkpoint_every": config.checkpoint_every}
    expected = work(root / "undisturbed", **plan)
    summary = drill(root / "killed", **plan, kills=config.kills, seed=config.seed)
    summary["bit_equal"] = work(root / "killed", **plan) == expected
    found = damage_apart(root / "killed", damages=config.damages, seed=config.seed)
    summary |= {"damages": config.damages} | {f"damages_{name}": count for name, count in found.items()}
    print_summary(summary | {"seconds": round(time.perf_counter() - start, 1)})
    sound = summary["bit_equal"] and summary["lost_generations"] == 0 and summary["damages_silent"] == 0
    if not (sound and summary["ended"] and summary["kills"] == config.kills):
        sys.exit(1)


if __name__ == "__main__":
    main()
