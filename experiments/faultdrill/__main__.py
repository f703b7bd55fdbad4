"""Do to runs all that can happen to them, and count what it cost: `python -m eggroll.experiments.faultdrill --help`.

    kills      a small network, and two processes that train one together, are killed at random moments and restarted
    storage    files of runs of rl, egg, zo, zo offloaded and reason, and of their results, get faults; the runs are resumed
    workers    processes that score rewards are killed, hang, and send garbage
    rivals     two processes want one run folder
    launches   eggroll.launch is killed, terminated and interrupted twice

Every run has to end as an undisturbed one, bit for bit. The last line of standard output is a JSON object: counts of each kind,
and what must be 0: `silent` (another result without an error), `lost_generations`, `unresumable`, `hung`, `leaked` (processes).
"""

import dataclasses
import shutil
import sys
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import tyro

from eggroll.experiments.common.run import print_summary, run_folder, use_compilation_cache
from eggroll.experiments.faultdrill.apart import run_apart
from eggroll.experiments.faultdrill.kills import Drill, drill
from eggroll.experiments.faultdrill.launches import launch_drill
from eggroll.experiments.faultdrill.rivals import rival_drill
from eggroll.experiments.faultdrill.storage import RESULTS, SUBJECTS
from eggroll.experiments.faultdrill.training import work

FAILURES = ("silent", "lost_generations", "unresumable", "hung", "leaked")


@dataclasses.dataclass(frozen=True)
class Config:
    """Do to runs all that can happen to them, and compare what becomes of them with undisturbed runs."""

    kills: int = 24
    """Kills of a run: in turn at start-up, during training, while writing the journal, while writing a checkpoint."""
    job_kills: int = 4
    """Kills of the launcher of a run of two processes: in turn at start-up and during training."""
    generations: int = 600
    """Generations of these runs; the run of two processes has a tenth."""
    checkpoint_every: int = 10
    """Generations between their checkpoints."""
    storage: int = 1
    """Faults of every kind (a flipped bit, a truncation, a deletion, garbage) in every file of a run."""
    pairs: int = 40
    """Pairs of faults for every run: in the arrays of the newest checkpoint and in the journal."""
    workers: int = 51
    """Completions whose reward fails in its worker process, each kind in turn."""
    rivals: int = 40
    """Rounds of two processes that want one run folder."""
    launches: int = 24
    """Launchers to end."""
    seed: int = 0
    """Seed of moments and damages."""
    folder: Path = Path("runs/faultdrill")
    """Run folder; earlier drills in it are replaced."""

    def check(self) -> None:
        """Raise ValueError for counts out of range."""
        for name in ("job_kills", "storage", "pairs", "workers", "rivals", "launches"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be an integer >= 0, got {getattr(self, name)}.")
        if self.kills < 1 or self.generations <= self.kills or self.generations // 10 <= self.job_kills:
            counts = f"{self.generations}, {self.kills} and {self.job_kills}"
            raise ValueError(f"generations must be more than kills, those >= 1, and than ten times job_kills, got {counts}.")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line; exit with 1 if anything was lost, differs, hangs or is left."""
    config = tyro.cli(Config, args=arguments, prog="python -m eggroll.experiments.faultdrill")
    try:
        config.check()
    except ValueError as error:
        sys.exit(f"error: {error}")
    use_compilation_cache()
    root, start = run_folder(config.folder).absolute(), time.perf_counter()
    for name in ("kills", "jobs", "storage", "rivals", "launches"):
        shutil.rmtree(root / name, ignore_errors=True)
    with ThreadPoolExecutor(2) as pool:  # on two cores
        parts = list(pool.map(lambda part: part(config, root), (_kills, _storage, _workers, _rivals, _launches, _job_kills)))
    failures = {name: sum(part.get(name, 0) for part in parts) for name in FAILURES}
    faults = sum(part["faults"] for part in parts)
    sound = {"bit_equal": all(part.get("bit_equal", True) for part in parts), "ended": all(p.get("ended", True) for p in parts)}
    counts: dict[str, Any] = {}
    for part in parts:
        counts |= {name: value for name, value in part.items() if name not in (*FAILURES, *sound, "faults")}
    print_summary({"faults": faults} | counts | failures | sound | {"seconds": round(time.perf_counter() - start, 1)})
    if any(failures.values()) or not all(sound.values()):
        sys.exit(1)


def _kills(config: Config, root: Path) -> dict[str, Any]:
    found = _kill(config, root / "kills", config.generations, kills=config.kills, processes=1)
    return found | {"faults": config.kills}


def _job_kills(config: Config, root: Path) -> dict[str, Any]:
    if not config.job_kills:
        return {"faults": 0}
    found = _kill(config, root / "jobs", config.generations // 10, kills=config.job_kills, processes=2)
    return {"faults": config.job_kills, "job_kills_in": found["kills_in"]} | {
        name: found[name] for name in ("lost_generations", "bit_equal", "ended")
    }


def _kill(config: Config, folder: Path, generations: int, *, kills: int, processes: int) -> dict[str, Any]:
    """Kill a run, and compare it with an undisturbed one; here, in one process, both only read what they have."""
    every, whole, killed = config.checkpoint_every, folder / "undisturbed", folder / "killed"
    Drill({}, processes).start(whole, generations, every)
    found = drill(killed, generations=generations, checkpoint_every=every, kills=kills, seed=config.seed, processes=processes)
    one, other = (work(place, generations=generations, checkpoint_every=every) for place in (whole, killed))
    return found | {"bit_equal": one == other, "ended": found["ended"] and found["kills"] == kills}


def _storage(config: Config, root: Path) -> dict[str, Any]:
    if not config.storage + config.pairs:
        return {"faults": 0}
    kinds: dict[str, Counter[str]] = {}
    subjects, lost = {}, 0
    for subject in SUBJECTS:
        pairs = 0 if subject == RESULTS else config.pairs
        place = root / "storage" / subject.replace(" ", "-")
        found = run_apart("storage", place, subject, config.storage, pairs, config.seed)
        for kind, outcomes in found["storage"].items():
            kinds.setdefault(kind, Counter()).update(outcomes)
        subjects[subject] = sum(sum(outcomes.values()) for outcomes in found["storage"].values())
        lost += found["lost_generations"]
        print(f"storage of {subject}: {subjects[subject]} faults", flush=True)
    totals = {outcome: sum(counts[outcome] for counts in kinds.values()) for outcome in ("silent", "unresumable")}
    return {
        "faults": sum(subjects.values()),
        "storage_faults": subjects,
        "storage": {kind: dict(counts) for kind, counts in kinds.items()},
        "lost_generations": lost,
        **totals,
    }


def _workers(config: Config, root: Path) -> dict[str, Any]:
    return run_apart("workers", config.workers, config.seed) | {"faults": config.workers}


def _rivals(config: Config, root: Path) -> dict[str, Any]:
    return rival_drill(root / "rivals", rounds=config.rivals, seed=config.seed) | {"faults": config.rivals}


def _launches(config: Config, root: Path) -> dict[str, Any]:
    return launch_drill(root / "launches", ends=config.launches, seed=config.seed) | {"faults": config.launches}


if __name__ == "__main__":
    main()
