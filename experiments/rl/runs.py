"""The runs of one task and algorithm, each `experiments.rl` in a process of its own; what is on disk is not run again."""

import dataclasses
from pathlib import Path
from typing import Any

from eggroll.experiments.common.seed_runs import finished_seeds, metrics_of, run_seeds
from eggroll.experiments.rl.config import parse


@dataclasses.dataclass(frozen=True)
class Runs:
    """The seeds of one task and algorithm.

    Args:
        env: name of the environment.
        algorithm: of `experiments.rl`.
        options: more of its options, as on the command line.
        folder: where `seed-<seed>` folders are.
        seeds: which.
    """

    env: str
    algorithm: str
    options: tuple[str, ...]
    folder: Path
    seeds: range

    @property
    def arguments(self) -> list[str]:
        """Options of `experiments.rl`, without seeds and folder."""
        return ["--env", self.env, "--algorithm", self.algorithm, *self.options]

    def finished(self) -> dict[int, dict[str, Any]]:
        """Return seed -> summary of every seed whose run is whole.

        Raises:
            ValueError: a run in the folder had other options; the message names them.
        """
        return finished_seeds(self.folder, self.seeds, options=parse(self.arguments).options())

    def finish(self) -> None:
        """Run the seeds that are missing, those in a row in one process, which compiles once.

        Raises:
            RuntimeError: a run failed; the message is the last line of its errors, all of which are in `errors.txt`.
        """
        done = self.finished()
        resume = ["--resume"] if self.algorithm != "ppo" else []
        missing = [seed for seed in self.seeds if seed not in done]
        run_seeds(["eggroll.experiments.rl", *self.arguments, *resume], self.folder, missing)

    def curves(self) -> list[tuple[list[float], list[float]]]:
        """Return the held-out checks of every finished seed: environment steps and mean returns."""
        curves = []
        for seed in self.finished():
            checks = [row for row in metrics_of(self.folder, seed) if row.get("held_out_return") is not None]
            curves.append(([row["env_steps"] for row in checks], [row["held_out_return"] for row in checks]))
        return curves
