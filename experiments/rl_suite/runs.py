"""The runs of one task and algorithm, each `experiments.rl` in a process of its own; what is on disk is not run again."""

import contextlib
import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from experiments.rl import SUMMARY
from experiments.rl_config import parse


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
        wanted, found = parse(self.arguments).options(), {}
        for seed in self.seeds:
            path = self.folder / f"seed-{seed}" / SUMMARY
            with contextlib.suppress(FileNotFoundError):
                summary = json.loads(path.read_text())
                options = summary.pop("options")
                differing = [name for name, value in wanted.items() if options.get(name) != value]
                if differing:
                    raise ValueError(f"{path.parent} has a run with another {', '.join(differing)}; choose another folder.")
                found[seed] = summary
        return found

    def finish(self) -> None:
        """Run the seeds that are missing, those in a row in one process, which compiles once.

        Raises:
            RuntimeError: a run failed; the message is the last line of its errors, all of which are in `errors.txt`.
        """
        missing = [seed for seed in self.seeds if seed not in self.finished()]
        while missing:
            first, row = missing[0], 1
            while row < len(missing) and missing[row] == first + row:
                row += 1
            self._run(first, row)
            missing = missing[row:]

    def _run(self, first: int, seeds: int) -> None:
        folder = self.folder if seeds > 1 else self.folder / f"seed-{first}"
        command = [sys.executable, "-m", "experiments.rl", *self.arguments, "--folder", str(folder)]
        command += ["--seed", str(first), "--seeds", str(seeds)]
        command += ["--resume"] if self.algorithm != "ppo" else []
        self.folder.mkdir(parents=True, exist_ok=True)
        errors = self.folder / "errors.txt"
        with open(errors, "w") as file:
            failed = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=file, check=False).returncode
        if failed:
            lines = errors.read_text().strip().splitlines() or [f"it ended with {failed}"]
            raise RuntimeError(lines[-1].removeprefix("error: "))

    def curves(self) -> list[tuple[list[float], list[float]]]:
        """Return the held-out checks of every finished seed: environment steps and mean returns."""
        curves = []
        for seed in self.finished():
            metrics = self.folder / f"seed-{seed}" / "metrics.jsonl"
            lines = metrics.read_text().splitlines() if metrics.exists() else []  # random actions have none
            checks = [row for row in map(json.loads, lines) if row.get("held_out_return") is not None]
            curves.append(([row["env_steps"] for row in checks], [row["held_out_return"] for row in checks]))
        return curves
