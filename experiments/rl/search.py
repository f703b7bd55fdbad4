"""Random search over the ranges of the EGGROLL paper (arXiv 2511.16652, table 15), for evolution strategies.

Options are drawn by task and index, so low-rank and dense noise try the same ones. Each is one run with a seed that the
comparison does not use; the best final mean return wins. The paper does not search these ranges for PPO, nor does the suite.
"""

import zlib

import numpy as np

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


def random_options(env: str, index: int) -> list[str]:
    """Return the `index`-th random setting of a task, as options of `experiments.rl`."""
    rng = np.random.default_rng([zlib.crc32(env.encode()), index])
    chosen = [part for name, values in RANGES.items() for part in (f"--{name}", str(rng.choice(values)))]
    return [*chosen, str(rng.choice(ACTIONS))]
