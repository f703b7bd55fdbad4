"""Kill a training run at random moments and resume it: `python -m eggroll.experiments.faultdrill --help`.

A small network is trained in its own process, with a journal and checkpoints. The process is killed (SIGKILL) while it starts
or resumes, during training, in the middle of writing a journal record, or in the middle of writing a checkpoint, each at a
random place, and restarted until the run is complete. Its parameters must equal those of an uninterrupted run, bit for bit.
Then copies of its files are truncated or get a flipped bit, and every damage must be detected or harmless. At last every file
of another run, and of an exported model, gets faults: a flipped bit, a truncation, a deletion, garbage. The run must resume,
bit for bit, and no wrong number may be read. The last line of standard output is a JSON object.
"""

import dataclasses
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import tyro

from eggroll.experiments.common.run import print_summary, run_folder
from eggroll.experiments.faultdrill.damages import damage_apart
from eggroll.experiments.faultdrill.kills import drill
from eggroll.experiments.faultdrill.storage import damage_storage
from eggroll.experiments.faultdrill.training import work


@dataclasses.dataclass(frozen=True)
class Config:
    """Kill a training run at random moments, resume it every time, and compare it with an uninterrupted run."""

    kills: int = 24
    """Number of kills: in turn at start-up, during training, while writing the journal, while writing a checkpoint."""
    generations: int = 600
    """Generations of the run."""
    checkpoint_every: int = 10
    """Generations between checkpoints."""
    damages: int = 40
    """Copies of the files to damage: half are truncated, half get a flipped bit."""
    storage: int = 1
    """Faults of every kind (a flipped bit, a truncation, a deletion, garbage) in every file of a run and of an export."""
    seed: int = 0
    """Seed of moments and damages."""
    folder: Path = Path("runs/faultdrill")
    """Run folder; earlier drills in it are replaced."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line; exit with 1 if anything was lost, differs or was not detected."""
    config = tyro.cli(Config, args=arguments, prog="python -m eggroll.experiments.faultdrill")
    if config.storage < 0:
        sys.exit(f"error: storage must be an integer >= 0, got {config.storage}.")
    if config.kills < 1 or config.generations <= config.kills:
        sys.exit(f"error: generations must be more than kills, and those >= 1, got {config.generations} and {config.kills}.")
    root = run_folder(config.folder)
    for name in ("undisturbed", "killed"):
        shutil.rmtree(root / name, ignore_errors=True)
    start = time.perf_counter()
    generations, every = config.generations, config.checkpoint_every
    expected = work(root / "undisturbed", generations=generations, checkpoint_every=every)
    summary = drill(root / "killed", generations=generations, checkpoint_every=every, kills=config.kills, seed=config.seed)
    summary["bit_equal"] = work(root / "killed", generations=generations, checkpoint_every=every) == expected
    found = damage_apart(root / "killed", damages=config.damages, seed=config.seed)
    summary |= {"damages": config.damages} | {f"damages_{name}": count for name, count in found.items()}
    lost = summary["lost_generations"]
    summary |= damage_storage(root / "storage", faults=config.storage, seed=config.seed)
    summary["lost_generations"] += lost
    print_summary(summary | {"seconds": round(time.perf_counter() - start, 1)})
    sound = summary["bit_equal"] and summary["lost_generations"] == 0 and summary["damages_silent"] == 0
    sound = sound and summary["silent"] == 0 and summary["unresumable"] == 0
    if not (sound and summary["ended"] and summary["kills"] == config.kills):
        sys.exit(1)


if __name__ == "__main__":
    main()
