"""Random search over the ranges of the EGGROLL paper (arXiv 2511.16652, table 15), for evolution strategies.

Settings are drawn by task and index, so low-rank and dense noise try the same ones. Each is one run with a seed that the
comparison does not use; the best final mean return wins. The paper does not vary PPO over these ranges; it is left as it is.
"""

import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from eggroll.experiments.rl.runs import Runs

SEED = 1000
RANGES: dict[str, tuple[str, ...]] = {
    "population-size": ("512", "1024", "2048", "4096"),
    "episodes": ("1", "4", "8"),
    "rank": ("1", "2", "4"),
    "optimizer": ("adam", "adamw", "sgd"),
    "learning-rate": ("0.001", "0.01", "0.1"),
    "learning-rate-decay": ("0.995", "0.999", "0.9995", "1.0"),
    "sigma": ("0.05", "0.2", "0.5"),
    "sigma-decay": ("0.995", "0.999", "0.9995", "1.0"),
    "shaping": ("centered_ranks", "z_score"),
}
ACTIONS = ("--sampled-actions", "--no-sampled-actions")


def settings(env: str, index: int) -> list[str]:
    """Return the `index`-th setting of a task, as options of `experiments.rl`."""
    rng = np.random.default_rng([zlib.crc32(env.encode()), index])
    chosen = [part for name, values in RANGES.items() for part in (f"--{name}", str(rng.choice(values)))]
    return [*chosen, str(rng.choice(ACTIONS))]


def tries(env: str, algorithm: str, options: Sequence[str], folder: Path, *, number: int) -> list[Runs]:
    """Return the runs of a search: one seed of each setting; options given by the user win."""
    ours = [(*settings(env, index), *options) for index in range(number)]
    seeds = range(SEED, SEED + 1)
    return [Runs(env, algorithm, options, folder / f"search-{index}", seeds) for index, options in enumerate(ours)]


def best(runs: Sequence[Runs]) -> tuple[str, ...]:
    """Return the options of the run with the highest mean return; one that is not finite loses.

    Raises:
        RuntimeError: none of them finished.
    """
    scores = {run.options: run.finished()[SEED]["mean_return"] for run in runs if SEED in run.finished()}
    finite = {options: score for options, score in scores.items() if score is not None}
    if not finite:
        raise RuntimeError("no run of the search finished")
    return max(finite, key=lambda options: finite[options])
