"""Seeds of one setting of an experiment, run in processes of their own; a seed that has finished is not run again."""

import contextlib
import dataclasses
import math
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from eggroll.experiments.common.run import SUMMARY
from eggroll.files import Damaged, read_object

Summaries = dict[int, dict[str, Any]]  # seed -> summary of its run


@dataclasses.dataclass(frozen=True)
class Setting:
    """One row of a suite.

    Args:
        labels: name of the row, such as ("CartPole-v1", "ppo").
        arguments: command line of the experiment, without seeds and folder.
        options: the parsed options, as the summary of a run stores them.
        folder: has a folder `seed-<seed>` per seed.
    """

    labels: tuple[str, ...]
    arguments: tuple[str, ...]
    options: Mapping[str, Any]
    folder: Path

    @property
    def name(self) -> str:
        """The labels as text."""
        return " ".join(self.labels)


def finished_seeds(setting: Setting, seeds: Iterable[int]) -> Summaries:
    """Return the summaries of the seeds that have finished.

    Raises:
        ValueError: a run in the folder had other options; the message names them.
    """
    found = {}
    for seed in seeds:
        path = setting.folder / f"seed-{seed}" / SUMMARY
        with contextlib.suppress(FileNotFoundError):
            try:
                summary = read_object(path)
                options = summary.pop("options")
            except (Damaged, KeyError) as error:
                print(f"{path} is damaged, its run is resumed or repeated: {error}", flush=True)
                continue
            differing = [name for name, value in setting.options.items() if options.get(name) != value]
            if differing:
                raise ValueError(f"{path.parent} has a run with another {', '.join(differing)}; choose another folder.")
            found[seed] = summary
    return found


def launch_seeds(module: str, setting: Setting, seeds: Sequence[int]) -> None:
    """Run seeds, consecutive ones in one process, which compiles once.

    The errors of a process go to `errors.txt`, in the folder of its seed or, for several, in the folder of the setting.

    Raises:
        RuntimeError: a run failed; the message is its error, or the signal that killed it.
    """
    left = list(seeds)
    while left:
        first, count = left[0], 1
        while count < len(left) and left[count] == first + count:
            count += 1
        folder = setting.folder if count > 1 else setting.folder / f"seed-{first}"
        _launch([module, *setting.arguments, "--seed", str(first), "--seeds", str(count)], folder)
        left = left[count:]


def _launch(command: Sequence[str], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    errors = folder / "errors.txt"
    with open(errors, "w") as file:
        process = [sys.executable, "-m", *command, "--folder", str(folder)]
        failed = subprocess.run(process, stdout=subprocess.DEVNULL, stderr=file, check=False).returncode
    if failed < 0:
        raise RuntimeError(f"it was killed by {signal.Signals(-failed).name}")
    if failed:
        lines = errors.read_text().strip().splitlines() or [f"it ended with {failed}"]
        named = [line for line in lines if line.startswith("error: ")]  # not a line of progress
        raise RuntimeError((named or lines)[-1].removeprefix("error: "))


def search(
    module: str, settings: Sequence[Setting], *, seed: int, score: Callable[[Mapping[str, Any]], float | None]
) -> Setting:
    """Run settings with one seed, unless they have finished; return the one with the highest score.

    Args:
        module: the experiment.
        settings: to try.
        seed: one that the comparison does not use.
        score: summary -> score; a setting whose score is None or not finite is never chosen.

    Raises:
        RuntimeError: a run failed, or none has a finite score.
    """
    scores: dict[int, float] = {}
    for index, setting in enumerate(settings):
        if not finished_seeds(setting, [seed]):
            launch_seeds(module, setting, [seed])
        value = score(finished_seeds(setting, [seed])[seed])
        print(f"  {' '.join(setting.arguments)}: {'not finite' if value is None else f'{value:.4g}'}", flush=True)
        if value is not None and math.isfinite(value):
            scores[index] = value
    if not scores:
        raise RuntimeError("no run of the search has a finite score")
    return settings[max(scores, key=lambda index: scores[index])]
