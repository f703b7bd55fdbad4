"""Train the baselines of EGG, at equal data per update: `python -m eggroll.experiments.egg_baselines --help`.

egg-adam           EGG in real numbers (`experiments.egg.models.float_egg`), backprop with Adam
egg-eggroll        EGG in real numbers, EGGROLL in float32 with Adam
transformer-sgd    a transformer of the same width and number of layers, backprop with plain SGD
transformer-adam   the same with Adam

Every update reads the text that `experiments.egg` reads in a generation with as many streams; held-out text is the same too.
Step sizes are constant; each of a few is tried, and the one with the lowest mean over the seeds on the held-out text is
reported, which favours the baselines a little. The last line of standard output is a JSON object.
"""

import dataclasses
import itertools
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, Literal

import jax
import optax
import tyro

from eggroll.experiments.common.options import check_integers, check_seeds, ignored_options, refuse, unless
from eggroll.experiments.common.run import exit_on_error, jsonable, print_summary, run_folder, use_compilation_cache, write_json
from eggroll.experiments.egg import baseline as learners
from eggroll.experiments.egg.data import corpus
from eggroll.experiments.egg.data.references import references
from eggroll.experiments.egg.figure import plot_curves
from eggroll.experiments.egg.models import byte_models, egg
from eggroll.experiments.egg.models.integer_loss import MAX_TOKENS
from eggroll.experiments.egg.problem import held_out
from eggroll.runs.metrics import seal

Baseline = Literal["egg-adam", "egg-eggroll", "transformer-sgd", "transformer-adam"]
RATES: dict[str, tuple[float, ...]] = {
    "egg-adam": (0.01, 0.03, 0.1),
    "egg-eggroll": (0.01, 0.03, 0.1),
    "transformer-sgd": (0.1, 0.3, 1.0),
    "transformer-adam": (0.001, 0.003, 0.01),
}
RESULTS = "results.json"
RULES = (
    unless(
        lambda config: "egg-eggroll" not in config.baselines,
        "without egg-eggroll among --baselines",
        "population_size",
        "sigma",
        "chunk_size",
    ),
)
_POSITIVE = ("layers", "width", "streams", "updates", "validation_every", "validation_bytes")


@dataclasses.dataclass(frozen=True)
class Config:
    """Train baselines of EGG, at equal data per update."""

    baselines: tuple[Baseline, ...] = ("egg-adam", "egg-eggroll", "transformer-sgd", "transformer-adam")
    """Which."""
    data: tuple[Path, ...] = ()
    """Text files and folders. None: the sources of Python's standard library."""
    cache: Path = Path("runs/corpus")
    """Folder for the corpus file."""
    layers: int = 2
    """Layers of every model."""
    width: int = 64
    """Width of every model, a multiple of 16 where there is a transformer."""
    streams: int = 16
    """Streams of text, population_size / group of experiments.egg."""
    bytes_per_update: int = 100
    """Bytes of every stream in an update; the context of a transformer, on held-out text too."""
    updates: int = 150
    """Updates in all."""
    learning_rates: tuple[float, ...] = ()
    """Step sizes to try. None: three of each baseline's own."""
    population_size: int = 1024
    """Members of egg-eggroll, an even number of them for every stream."""
    sigma: float = 1 / 16
    """Standard deviation of a weight's noise in egg-eggroll; the default is that of experiments.egg."""
    chunk_size: int | None = 1024
    """Members of egg-eggroll evaluated at a time, even. None: all."""
    seed: int = 0
    """First seed; EGG in real numbers begins with what experiments.egg begins with."""
    seeds: int = 1
    """Runs of every baseline and step size."""
    validation_every: int = 50
    """Updates between checks on held-out text; there is one at the end."""
    validation_bytes: int = 2_000_000
    """Held-out bytes of a check at most."""
    folder: Path = Path("runs/egg-baselines")
    """Gets metrics.jsonl, bits_per_byte.png and results.json, which are replaced."""

    def check(self) -> None:
        """Raise ValueError for options that have no effect, or that would not get a clear error later."""
        check_seeds(self)
        check_integers(self, *_POSITIVE)
        if not 1 <= self.bytes_per_update <= MAX_TOKENS:
            raise ValueError(f"bytes_per_update must be from 1 to {MAX_TOKENS}, got {self.bytes_per_update}.")
        if "egg-eggroll" in self.baselines and (self.population_size < 2 or self.population_size % (2 * self.streams)):
            raise ValueError(
                f"population_size must be a multiple of twice the streams, got {self.population_size} and {self.streams}."
            )
        if not all(0 < rate < float("inf") for rate in self.learning_rates):
            raise ValueError(f"learning_rates must be finite numbers > 0, got {self.learning_rates}.")
        if not self.baselines:
            raise ValueError("baselines must name at least one baseline.")
        refuse(ignored_options(self, RULES, Config()))
        for baseline in self.baselines:
            make_model(self, baseline)


def make_model(config: Config, baseline: Baseline) -> byte_models.ByteModel:
    """Return the model of a baseline; ValueError for a width that it cannot have."""
    if baseline.startswith("egg"):
        return byte_models.recurrent(egg.Config(config.layers, config.width))
    sizes = byte_models.transformer_config(layers=config.layers, width=config.width)
    return byte_models.transformer(sizes, window=config.bytes_per_update)


def make_learner(config: Config, baseline: Baseline, rate: float) -> learners.Learner:
    """Return the way a baseline is trained."""
    model, optimizer = make_model(config, baseline), (optax.sgd if baseline == "transformer-sgd" else optax.adam)(rate)
    if baseline != "egg-eggroll":
        return learners.backprop(model, optimizer, streams=config.streams)
    return learners.evolution(
        model,
        optimizer,
        population_size=config.population_size,
        streams=config.streams,
        sigma=config.sigma,
        chunk_size=config.chunk_size,
    )


class Study:
    """The runs of a configuration, and the file of their metrics."""

    def __init__(self, config: Config, texts: corpus.Corpus, metrics: IO[str]):
        self._config, self._texts, self._metrics = config, texts, metrics
        self._text = held_out(texts, config.validation_bytes)

    def baseline(self, baseline: Baseline) -> dict[str, Any]:
        """Try the step sizes; return the result of the best, with its curve."""
        config, model = self._config, make_model(self._config, baseline)
        validate, start = learners.bits_per_byte(model, self._text), time.perf_counter()
        tried: dict[float, list[dict[int, float]]] = {}
        for rate in config.learning_rates or RATES[baseline]:
            learner = make_learner(config, baseline, rate)
            about = {"baseline": baseline, "learning_rate": rate}
            seeds = range(config.seed, config.seed + config.seeds)
            tried[rate] = [self._run(learner, validate, about | {"seed": seed}) for seed in seeds]
            print(f"{baseline}, step size {rate:g}: {self._mean(tried[rate]):.4f} bits per byte of held-out text", flush=True)
        best = min(tried, key=lambda rate: self._mean(tried[rate]))
        return {
            "validation_bits": self._mean(tried[best]),
            "learning_rate": best,
            "by_seed": [curve[config.updates] for curve in tried[best]],
            "tried": {f"{rate:g}": self._mean(curves) for rate, curves in tried.items()},
            "parameters": byte_models.parameter_count(model),
            "seconds": round(time.perf_counter() - start, 2),
            "curve": [[update, statistics.fmean(curve[update] for curve in tried[best])] for update in tried[best][0]],
        }

    def _mean(self, curves: Sequence[dict[int, float]]) -> float:
        """Mean over the seeds at the end; infinite where one diverged."""
        mean = statistics.fmean(curve[self._config.updates] for curve in curves)
        return mean if mean == mean else float("inf")

    def _run(self, learner: learners.Learner, validate: Any, about: dict[str, Any]) -> dict[int, float]:
        """Run the updates of one seed; return held-out bits by the number of updates."""
        config, run, checks = self._config, learner.start(jax.random.key(about["seed"])), {}
        for done in range(1, config.updates + 1):
            pieces = corpus.streams(self._texts, done - 1, groups=config.streams, length=config.bytes_per_update)
            run, bits = learner.update(run, pieces)
            row = about | {"update": done, "training_bits": bits}
            if done % config.validation_every == 0 or done == config.updates:
                checks[done] = row["validation_bits"] = validate(learner.params(run))
            self._metrics.write(seal(json.dumps(jsonable(row), allow_nan=False)))
            self._metrics.flush()
        return checks


def run(config: Config) -> dict[str, Any]:
    """Run every baseline; return the summary that `main` prints."""
    texts = corpus.load(config.data, cache=config.cache)
    known = {row.name: row.bits_per_byte for row in references(texts.train, texts.validation)}
    folder = run_folder(config.folder)
    with (folder / "metrics.jsonl").open("w") as metrics:
        study = Study(config, texts, metrics)
        results = {baseline: study.baseline(baseline) for baseline in config.baselines}
    curves = {f"{name}, step size {row['learning_rate']:g}": row.pop("curve") for name, row in results.items()}
    plot_curves(curves, folder / "bits_per_byte.png", lines=dict(itertools.islice(known.items(), 2)))
    summary: dict[str, Any] = {"baselines": results, "updates": config.updates}
    summary |= {"bytes_per_update": config.streams * config.bytes_per_update} | {f"{name}_bits": known[name] for name in known}
    options = {name: value for name, value in dataclasses.asdict(config).items() if name not in ("data", "cache", "folder")}
    write_json(folder / RESULTS, {"options": options, "corpus": texts.fingerprint} | summary)
    return summary


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line; wrong options end it with a one-line error."""
    config = tyro.cli(Config, args=arguments, prog="python -m eggroll.experiments.egg_baselines")
    with exit_on_error():
        config.check()
        use_compilation_cache()
        summary = run(config)
    print_summary(summary)


if __name__ == "__main__":
    main()
