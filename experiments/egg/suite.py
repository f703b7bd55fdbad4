"""Loss of EGG against the population, at equal data and equal steps: `python -m experiments.egg_scaling --help`.

Every population reads the same text in a generation, the same number of streams: only how many members read each differs.
A population is `experiments.egg` in a process of its own, with all seeds that are missing; what is in the folder already is not
run again, and a seed that a kill cut off goes on from its checkpoint. After each population the folder gets the table
(`table.md`), the figure (`scaling.png`) and all numbers (`results.json`). The last line of standard output is a JSON object.
"""

import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Sequence
from itertools import pairwise
from math import log2
from pathlib import Path
from typing import Any

import tyro

from eggroll.experiments.common.run import print_summary, run_folder, write_json
from eggroll.experiments.common.seed_runs import finished_seeds, run_seeds
from eggroll.experiments.egg import config
from eggroll.experiments.egg.figure import plot_scaling


@dataclasses.dataclass(frozen=True)
class Config:
    """Compare populations at equal data and steps. Options not listed here are handed to experiments.egg."""

    populations: tuple[int, ...] = (64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
    """Members; each a multiple of twice the streams. Small machines: these; a GPU: up to 262144, with --chunk-size."""
    streams: int = 16
    """Streams of text, each read by population / streams members."""
    bytes_per_update: int = 100
    """Bytes of every stream in a generation."""
    generations: int = 60
    """Generations of every run."""
    layers: int = 1
    """Layers of the model."""
    width: int = 32
    """Width of the model."""
    seeds: int = 3
    """Seeds 0, 1, ... of every population."""
    baselines: Path | None = None
    """A results.json of experiments.egg_baselines at the same data and steps: lines in the figure."""
    folder: Path = Path("runs/egg-scaling")
    """Where everything is, also what an interrupted study has finished."""

    def check(self) -> None:
        """Raise ValueError for what experiments.egg would refuse in words of its own, or not see."""
        for name in ("streams", "seeds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be an integer >= 1, got {getattr(self, name)}.")
        wrong = [size for size in self.populations if size < 1 or size % (2 * self.streams)]
        if wrong or len(set(self.populations)) < max(1, len(self.populations)):
            raise ValueError(
                f"populations must be different multiples of twice the streams, got {self.populations} and {self.streams}."
            )

    def arguments(self, population: int) -> list[str]:
        """Options of experiments.egg for a population, without seeds and folder."""
        names = ("layers", "width", "bytes_per_update", "generations")
        sizes = {name: getattr(self, name) for name in names} | {"group": population // self.streams}
        sizes |= {"population_size": population, "sample_length": 0, "validation_every": self.generations}
        return [text for name, value in sizes.items() for text in ("--" + name.replace("_", "-"), str(value))]


def check_same_data(config: Config, path: Path) -> dict[str, float]:
    """Return baseline -> bits per byte of a file of experiments.egg_baselines; ValueError if it read other data."""
    known = json.loads(path.read_text())
    expected = {"streams": config.streams, "bytes_per_update": config.bytes_per_update, "updates": config.generations}
    for name, value in expected.items():
        if known["options"][name] != value:
            raise ValueError(f"baselines must have {name} {value} as the study has, got {known['options'][name]} in {path}.")
    return {name: row["validation_bits"] for name, row in known["baselines"].items()}


class Study:
    """All runs of a study, and what failed."""

    def __init__(self, config: Config, options: Sequence[str]):
        config.check()
        self.config, self.options, self.folder = config, tuple(options), run_folder(config.folder)
        self.lines = check_same_data(config, config.baselines) if config.baselines else {}
        self.failed: dict[str, str] = {}
        self._corpus: str | None = None  # fingerprint of the text of all runs
        for population in config.populations:
            self._parsed(population).check()
            self._finished(population)

    def _arguments(self, population: int) -> list[str]:
        return [*self.config.arguments(population), *self.options]

    def _parsed(self, population: int) -> config.Config:
        return config.parse(self._arguments(population))

    def _finished(self, population: int) -> dict[int, dict[str, Any]]:
        """Summaries of the seeds that are whole; one with fewer generations is not."""
        folder, generations = self.folder / str(population), self.config.generations
        found = finished_seeds(folder, range(self.config.seeds), options=self._parsed(population).options())
        if any(summary["generations"] > generations for summary in found.values()):
            raise ValueError(f"{folder} has runs of more than {generations} generations; choose another folder.")
        found = {seed: summary for seed, summary in found.items() if summary["generations"] == generations}
        self._corpus = self._corpus or next((summary["corpus"] for summary in found.values()), None)
        if any(summary["corpus"] != self._corpus for summary in found.values()):
            raise ValueError(f"{folder} has runs on another text; choose another folder.")
        return found

    def finish(self, population: int) -> None:
        """Run what is missing of a population, write the results so far; a failure is noted and does not end the study."""
        start = time.perf_counter()
        try:
            missing = sorted({*range(self.config.seeds)} - self._finished(population).keys())
            run_seeds(
                ["eggroll.experiments.egg", *self._arguments(population), "--resume"], self.folder / str(population), missing
            )
            self._finished(population)
        except (RuntimeError, ValueError) as error:
            self.failed[str(population)] = str(error)
        outcome = self.failed.get(str(population), "done")
        print(f"population {population}: {outcome}  ({(time.perf_counter() - start) / 60:.1f} min)", flush=True)
        self.write()

    def rows(self) -> list[dict[str, Any]]:
        """A row for every population whose seeds are all there, the smallest first."""
        rows = []
        for population in sorted(self.config.populations):
            if str(population) in self.failed or len(found := self._finished(population)) < self.config.seeds:
                continue
            bits = [summary["validation_bits"] for _, summary in sorted(found.items())]
            row: dict[str, Any] = {
                "population": population,
                "group": population // self.config.streams,
                "bits": statistics.fmean(bits),
            }
            row |= {"deviation": statistics.stdev(bits) if len(bits) > 1 else 0.0, "by_seed": bits}
            rows.append(row | {name: statistics.fmean(s[name] for s in found.values()) for name in ("bytes_read", "seconds")})
        return rows

    def write(self) -> dict[str, Any]:
        """Write table, figure and numbers; return the summary."""
        rows = self.rows()
        (self.folder / "table.md").write_text(table(rows))
        if rows:
            plot_scaling({row["population"]: row["by_seed"] for row in rows}, self.folder / "scaling.png", lines=self.lines)
        summary = {"octaves": octaves(rows), "octaves_of_every_seed": octaves(rows, every_seed=True), "failed": self.failed}
        summary |= {"bytes_per_update": self.config.streams * self.config.bytes_per_update, "rows": rows}
        write_json(self.folder / "results.json", summary)
        return summary


def octaves(rows: Sequence[dict[str, Any]], *, every_seed: bool = False) -> float:
    """Doublings of the longest range of populations in which every step up lowers the mean, or the bits of every seed."""
    longest = start = 0.0
    for low, high in pairwise(rows):
        pairs = zip(low["by_seed"], high["by_seed"], strict=True) if every_seed else [(low["bits"], high["bits"])]
        start = start or low["population"]
        if not all(before > after for before, after in pairs):
            start = 0.0
        else:
            longest = max(longest, log2(high["population"] / start))
    return longest


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the rows as a Markdown table."""
    lines = ["| population | members a stream | validation bits per byte, mean | standard deviation | seeds | seconds a run |"]
    lines.append("|---|---|---|---|---|---|")
    for row in rows:
        seeds = ", ".join(f"{bits:.3f}" for bits in row["by_seed"])
        numbers = f"{row['bits']:.3f} | {row['deviation']:.3f} | {seeds} | {row['seconds']:.1f}"
        lines.append(f"| {row['population']:,} | {row['group']:,} | {numbers} |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line; wrong options end it with one sentence."""
    config, options = tyro.cli(Config, args=arguments, prog="python -m experiments.egg_scaling", return_unknown_args=True)
    try:
        study = Study(config, options)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    for population in config.populations:
        study.finish(population)
    summary = study.write()
    print(f"\n{(study.folder / 'table.md').read_text()}\ntable, figure and numbers are in {study.folder}", flush=True)
    print_summary(summary)
    if study.failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
