"""Reinforcement learning against evosax: seconds and generations to a mean return, members per second, peak memory.

Each seed of each library runs in two processes of its own, the first with an empty compilation cache and the second with what
the first left there, ours and theirs alternating: `experiments.bench.rl_sides`. Then milliseconds a generation of a tiny
problem, as one compiled program of many generations.
"""

import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
from typing import Any

from eggroll.experiments.bench.timing import machine
from eggroll.experiments.common.run import print_summary

LIBRARIES = ("ours", "evosax")
COLUMNS = ("seconds", "warm_seconds", "generations", "members_per_second", "peak_mib", "growth_mib")


@dataclasses.dataclass(frozen=True)
class RL:
    """Compare with evosax's Open_ES on an environment of gymnax."""

    env: str = "CartPole-v1"
    """Name of a gymnax environment."""
    target: float = 475.0
    """Mean return of the mean parameters over 100 held-out episodes that ends a run."""
    seeds: int = 5
    """Runs of each library."""
    generations: int = 100
    """Maximum number of generations; a run that misses the target counts as infinitely long."""
    population_size: int = 256
    """Members evaluated per generation, even."""
    episodes: int = 4
    """Episodes per member."""
    sigma: float = 0.05
    """Standard deviation of the perturbation, for both libraries."""
    learning_rate: float = 0.01
    """Learning rate of Adam, for both libraries."""
    hidden_sizes: tuple[int, ...] = (32, 32)
    """Widths of the policy's hidden layers."""

    def check(self) -> None:
        """Raise ValueError for settings that cannot run."""
        for name in ("seeds", "generations", "episodes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be an integer >= 1, got {getattr(self, name)}.")
        if self.population_size < 2 or self.population_size % 2:
            raise ValueError(f"population_size must be an even integer >= 2, got {self.population_size}.")
        if "/" in self.env:
            raise ValueError(f"env must be a gymnax environment, which both libraries support, got {self.env!r}.")


def run(config: RL) -> None:
    """Run the benchmark; the last line of standard output is JSON."""
    try:
        config.check()
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    if importlib.util.find_spec("evosax") is None:
        raise SystemExit("error: the comparison needs evosax, which is not installed; pip install 'evosax>=0.3' installs it.")
    about = machine() | {"evosax": importlib.metadata.version("evosax")}
    print("  ".join(f"{key} {value}" for key, value in about.items()))
    print(f"{'seed':<6}{'library':<10}" + "".join(f"{column:>20}" for column in COLUMNS), flush=True)
    runs: dict[str, list[dict[str, Any]]] = {library: [] for library in LIBRARIES}
    for seed in range(config.seeds):
        for library in LIBRARIES:
            row = run_side(config, library=library, seed=seed)
            runs[library].append(row)
            print(f"{seed:<6}{library:<10}" + "".join(f"{_cell(row[column]):>20}" for column in COLUMNS), flush=True)
    tiny = run_tiny()
    print("  ".join(f"{name} {value:.3g}" for name, value in tiny.items()), flush=True)
    print_summary(summarise(runs) | tiny | {"config": dataclasses.asdict(config), "about": about})


def run_side(config: RL, *, library: str, seed: int) -> dict[str, Any]:
    """Run one seed of one library in a new process, then the same with the compiled programs that it left.

    Returns:
        What `rl_sides.run` returns of the first, and `warm_seconds`: the seconds of the second.

    Raises:
        SystemExit: a process failed; the error quotes its last line.
    """
    settings = {name: value for name, value in dataclasses.asdict(config).items() if name != "seeds"}
    argument, name = json.dumps(settings | {"library": library, "seed": seed}), f"seed {seed} of {library}"
    with tempfile.TemporaryDirectory() as cache:
        cold, warm = (_run_process(argument, name=name, cache=cache) for _ in range(2))
    return cold | {"warm_seconds": warm["seconds"]}


def run_tiny() -> dict[str, Any]:
    """Time generations of a tiny problem in a new process: `rl_sides.tiny`."""
    return _run_process("tiny", name="the tiny problem")


def _run_process(argument: str, *, name: str, cache: str = "") -> dict[str, Any]:
    command = [sys.executable, "-m", "eggroll.experiments.bench.rl_sides", argument]
    # Compilation is part of what is timed: no cache of earlier work; every program, however small, goes into the one given.
    chosen = {"JAX_ENABLE_COMPILATION_CACHE": str(bool(cache)).lower(), "JAX_COMPILATION_CACHE_DIR": cache}
    chosen |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1"}
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | chosen)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise SystemExit(f"error: {name} failed: {lines[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def summarise(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Return medians over seeds, a run without the target counting as infinite, and their ratios, ours over theirs."""
    medians = {library: {column: _median(rows, column) for column in COLUMNS} for library, rows in runs.items()}
    named = {"seconds": "seconds", "warm_seconds": "warm_seconds", "generations": "generations", "memory": "peak_mib"}
    ratios = {f"{name}_ratio": medians["ours"][column] / medians["evosax"][column] for name, column in named.items()}
    return ratios | medians | {"runs": runs}


def _median(rows: list[dict[str, Any]], column: str) -> float:
    if column == "members_per_second":  # None where a run was too short to tell
        return statistics.median([row[column] for row in rows if row[column] is not None] or [float("nan")])
    return statistics.median(float("inf") if row[column] is None else row[column] for row in rows)


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}" if value >= 100 else f"{value:.2f}"
