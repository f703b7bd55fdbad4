"""Loss of EGG against the population, at equal data and equal steps: `python -m eggroll.experiments.egg_scaling --help`.

Each population runs `experiments.egg` (`experiments.common.suite`). All read the same text in a generation, in the same number
of streams, and differ in how many members read each. A seed that was killed resumes from its checkpoint. The figure is
`scaling.png`. The last line of standard output is a JSON object.
"""

import dataclasses
import statistics
from collections.abc import Sequence
from itertools import pairwise
from math import log2
from pathlib import Path
from typing import Any, NamedTuple

import tyro

from eggroll.experiments.common.options import check_integers, check_passed
from eggroll.experiments.common.run import run_folder
from eggroll.experiments.common.seed_runs import Setting, Summaries
from eggroll.experiments.common.suite import Report, Result, Suite, markdown_table, one_job_each, run_suite
from eggroll.experiments.egg import config as egg
from eggroll.experiments.egg.figure import plot_scaling
from eggroll.files import read_object

OWN = ("population_size", "group", "seed", "resume")


@dataclasses.dataclass(frozen=True)
class Config:
    """Compare populations at equal data and steps. Options not listed here are passed to experiments.egg."""

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
    """A results.json of experiments.egg_baselines of the same sizes, data and steps: lines in the figure."""
    folder: Path = Path("runs/egg-scaling")
    """Folder of all results; an interrupted study resumes from it."""

    def check(self) -> None:
        """Raise ValueError for options that experiments.egg does not see, or would name differently."""
        check_integers(self, "streams", "seeds")
        wrong = [size for size in self.populations if size < 1 or size % (2 * self.streams)]
        if wrong or len(set(self.populations)) < max(1, len(self.populations)):
            raise ValueError(
                f"populations must be different multiples of twice the streams, got {self.populations} and {self.streams}."
            )

    def arguments(self, population: int) -> list[str]:
        """Options of experiments.egg for a population, without seeds and folder."""
        options = {
            "--layers": self.layers,
            "--width": self.width,
            "--bytes-per-update": self.bytes_per_update,
            "--generations": self.generations,
            "--group": population // self.streams,
            "--population-size": population,
            "--sample-length": 0,
            "--validation-every": self.generations,
        }
        return [text for name, value in options.items() for text in (name, str(value))]


def make_suite(config: Config, options: Sequence[str]) -> Suite:
    """Make the suite.

    Raises:
        ValueError, OSError: an option is wrong, the folder has other runs, or the baselines read other data.
    """
    config.check()
    check_passed(options, own=OWN, ignored=())
    folder = run_folder(config.folder)
    settings = [make_setting(folder, size, (*config.arguments(size), *options)) for size in config.populations]
    baselines = None
    if config.baselines is not None:
        held_out = egg.parse(settings[0].arguments).validation_bytes
        baselines = read_baselines(config, config.baselines, validation_bytes=held_out)
    corpora = set[str]()  # the fingerprint of the text that all runs read

    def check(setting: Setting, found: Summaries) -> Summaries:
        """Return the runs with all generations; runs with fewer are continued."""
        generations = config.generations
        if any(summary["generations"] > generations for summary in found.values()):
            raise ValueError(f"{setting.folder} has runs of more than {generations} generations; choose another folder.")
        finished = {seed: summary for seed, summary in found.items() if summary["generations"] == generations}
        texts = {summary["corpus"] for summary in finished.values()}
        if len(corpora | texts) > 1:
            raise ValueError(f"{setting.folder} has runs on another text; choose another folder.")
        corpora.update(texts)
        if baselines is not None and corpora - {baselines.corpus}:
            raise ValueError(f"baselines must have read the text of the runs in {folder}, got another in {config.baselines}.")
        return finished

    jobs = one_job_each(settings, range(config.seeds))
    lines = {} if baselines is None else baselines.bits
    suite = Suite("eggroll.experiments.egg", folder, jobs, report=lambda found: report(config, found, lines=lines), check=check)
    for setting in settings:
        suite.finished(setting)
    return suite


def make_setting(folder: Path, population: int, arguments: Sequence[str]) -> Setting:
    """Make the setting of a population; ValueError if an option is wrong."""
    arguments = (*arguments, "--resume")
    parsed = egg.parse(arguments)
    parsed.check()
    return Setting((str(population),), arguments, parsed.options(), folder / str(population))


class Baselines(NamedTuple):
    """Results of experiments.egg_baselines."""

    bits: dict[str, float]  # baseline -> bits per byte of held-out text
    corpus: str  # fingerprint of the text that they read


def read_baselines(config: Config, path: Path, *, validation_bytes: int) -> Baselines:
    """Read a results.json; ValueError if it is another file, or of another model or other pieces of text than the study."""
    results = read_object(path)
    same = {name: getattr(config, name) for name in ("streams", "bytes_per_update", "layers", "width")}
    expected = same | {"updates": config.generations, "validation_bytes": validation_bytes}
    try:
        found = {name: results["options"][name] for name in expected}
        baselines = Baselines({name: row["validation_bits"] for name, row in results["baselines"].items()}, results["corpus"])
    except (KeyError, TypeError, AttributeError):
        raise ValueError(f"baselines must be a results.json of experiments.egg_baselines, got {path}.") from None
    for name, value in expected.items():
        if found[name] != value:
            raise ValueError(f"baselines must have {name} {value} as the study has, got {found[name]} in {path}.")
    return baselines


def report(config: Config, results: Sequence[Result], *, lines: dict[str, float]) -> Report:
    """Draw bits against populations, with a horizontal line per baseline; return table and numbers."""
    rows = [make_row(config, int(setting.name), list(found.values())) for setting, found in results]
    rows.sort(key=lambda row: row["population"])
    if rows:
        bits = {row["population"]: row["by_seed"] for row in rows}
        plot_scaling(bits, run_folder(config.folder) / "scaling.png", lines=lines)
    numbers = {
        "octaves": octaves(rows),
        "octaves_of_every_seed": octaves(rows, every_seed=True),
        "bytes_per_update": config.streams * config.bytes_per_update,
        "rows": rows,
    }
    return Report(make_table(rows), numbers)


def make_row(config: Config, population: int, summaries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Make a row from the summaries of its seeds."""
    bits = [summary["validation_bits"] for summary in summaries]
    return {
        "population": population,
        "group": population // config.streams,
        "bits": statistics.fmean(bits),
        "deviation": statistics.stdev(bits) if len(bits) > 1 else 0.0,
        "by_seed": bits,
        "bytes_read": statistics.fmean(summary["bytes_read"] for summary in summaries),
        "seconds": statistics.fmean(summary["seconds"] for summary in summaries),
    }


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


def make_table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the rows as a Markdown table."""
    head = ["population", "members a stream", "validation bits per byte, mean", "standard deviation", "seeds", "seconds a run"]
    cells = []
    for row in rows:
        bits, deviation, seconds = f"{row['bits']:.3f}", f"{row['deviation']:.3f}", f"{row['seconds']:.1f}"
        by_seed = ", ".join(f"{value:.3f}" for value in row["by_seed"])
        cells.append([f"{row['population']:,}", f"{row['group']:,}", bits, deviation, by_seed, seconds])
    return markdown_table(head, cells)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line; wrong options end it with a one-line error."""
    config, options = tyro.cli(
        Config, args=arguments, prog="python -m eggroll.experiments.egg_scaling", return_unknown_args=True
    )
    run_suite(lambda: make_suite(config, options))


if __name__ == "__main__":
    main()
