"""Seeds of one experiment as processes of their own; what is on disk is not run again. Suites compare such runs."""

import contextlib
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eggroll.experiments.common.run import SUMMARY


def finished_seeds(folder: Path, seeds: Sequence[int], *, options: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    """Return seed -> summary of every seed whose run is whole.

    Args:
        folder: where `seed-<seed>` folders are.
        seeds: which.
        options: what the runs must have been made with.

    Raises:
        ValueError: a run in the folder had other options; the message names them.
    """
    found = {}
    for seed in seeds:
        path = folder / f"seed-{seed}" / SUMMARY
        with contextlib.suppress(FileNotFoundError):
            summary = json.loads(path.read_text())
            known = summary.pop("options")
            differing = [name for name, value in options.items() if known.get(name) != value]
            if differing:
                raise ValueError(f"{path.parent} has a run with another {', '.join(differing)}; choose another folder.")
            found[seed] = summary
    return found


def run_seeds(command: Sequence[str], folder: Path, seeds: Sequence[int]) -> None:
    """Run seeds, those in a row in one process, which compiles once.

    Args:
        command: module and options, such as ["eggroll.experiments.rl", "--env", "CartPole-v1"], without seeds and folder.
        folder: gets a folder `seed-<seed>` for each; the errors of a process are in `errors.txt`, in the folder of its seed or,
            of several, in `folder`.
        seeds: which, in order.

    Raises:
        RuntimeError: a run failed; the message is the last line of its errors.
    """
    left = list(seeds)
    while left:
        first, row = left[0], 1
        while row < len(left) and left[row] == first + row:
            row += 1
        _run(command, folder, first, row)
        left = left[row:]


def _run(command: Sequence[str], folder: Path, first: int, seeds: int) -> None:
    own = folder if seeds > 1 else folder / f"seed-{first}"
    whole = [sys.executable, "-m", *command, "--folder", str(own), "--seed", str(first), "--seeds", str(seeds)]
    own.mkdir(parents=True, exist_ok=True)
    errors = own / "errors.txt"
    with open(errors, "w") as file:
        failed = subprocess.run(whole, stdout=subprocess.DEVNULL, stderr=file, check=False).returncode
    if failed:
        lines = errors.read_text().strip().splitlines() or [f"it ended with {failed}"]
        raise RuntimeError(lines[-1].removeprefix("error: "))


def metrics_of(folder: Path, seed: int) -> list[dict[str, Any]]:
    """The lines of metrics of a seed; none where it has no such file."""
    path = folder / f"seed-{seed}" / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
