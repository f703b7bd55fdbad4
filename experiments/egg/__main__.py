"""Pretrain an integer language model by evolution: `python -m experiments.egg --help`.

EGG (`experiments.egg.models.egg`) reads bytes. Each member of the population reads the stream of its group and carries its own
state. Training uses no floating-point numbers and no backpropagation; metrics and schedules are computed on the host. The last
line of standard output is a JSON object with the bits per byte of the trained parameters on held-out text, and those of
reference compressors on the same text. Each seed writes its artefacts to its own run folder.
"""

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

import eggroll
from eggroll.devices.processes import is_first
from eggroll.experiments.common.checkpoint import save_checkpoint
from eggroll.experiments.common.memory import peak_mib
from eggroll.experiments.common.run import SUMMARY, join_processes, print_summary, write_json
from eggroll.experiments.common.seeds import begin, seed_folder, summary_of
from eggroll.experiments.egg import evolution
from eggroll.experiments.egg.config import Config, parse
from eggroll.experiments.egg.data import corpus
from eggroll.experiments.egg.data.references import Reference, references


def run_seed(config: Config, texts: corpus.Corpus, known: list[Reference], *, seed: int) -> dict[str, Any]:
    """Train with one seed, write the artefacts; `summary.json` comes last and says that the run is whole."""
    init_key, run_key = jax.random.split(jax.random.key(seed))
    folder = _folder(config, seed)
    begin(folder, resume=config.resume)
    start = time.perf_counter()
    recipe = {"function": "eggroll.experiments.egg.__main__:remake", "options": config.options() | {"seed": seed}}
    trained = evolution.pretrain(config, texts, known, init_key=init_key, run_key=run_key, folder=folder, recipe=recipe)
    seconds = time.perf_counter() - start
    save_checkpoint(folder / "checkpoint", trained.params)
    bits = f"{trained.validation_bits:.4f} bits per byte of held-out text"
    print(f"seed {seed}: {bits}; metrics and checkpoint are in {folder}", flush=True)
    read = config.population_size * config.bytes_per_update
    row = {
        "validation_bits": trained.validation_bits,
        "generations": trained.generations,
        "bytes_read": trained.generations * read,
        "bytes_per_second": round(read / trained.generation_seconds) if trained.generation_seconds else 0,
        "generation_seconds": round(trained.generation_seconds, 5),
        "seconds": round(seconds, 2),
        "peak_mib": round(peak_mib()),
    }
    if is_first():
        write_json(folder / SUMMARY, {"options": config.options(), "seed": seed, "corpus": texts.fingerprint} | row)
    return row


def remake(options: dict[str, Any]) -> tuple[eggroll.EvolutionStrategy, eggroll.ESState]:
    """Make the strategy and the initial state of a run again: the recipe of its journal."""
    config = Config(**options)
    init_key, run_key = jax.random.split(jax.random.key(config.seed))
    return evolution.start(config, init_key=init_key, run_key=run_key)


def _folder(config: Config, seed: int) -> Path:
    return seed_folder(config, seed, default=f"egg-{config.layers}x{config.width}-{config.population_size}")


def run(config: Config) -> dict[str, Any]:
    """Run every seed; return the summary that `main` prints."""
    texts = corpus.load(config.data, cache=config.cache)
    sizes = f"{len(texts.train):,} bytes of text to train on, {len(texts.validation):,} held out"
    known = references(texts.train, texts.validation)
    print(f"{sizes}, bits per byte: " + ", ".join(f"{row.name} {row.bits_per_byte:.3f}" for row in known), flush=True)
    rows = [run_seed(config, texts, known, seed=seed) for seed in range(config.seed, config.seed + config.seeds)]
    about = {f"{row.name}_bits": row.bits_per_byte for row in known}
    return summary_of(rows, first_seed=config.seed) | about


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line; wrong options end it with one sentence."""
    try:
        config = parse(arguments)
        config.check()
        join_processes()
        summary = run(config)
    except (ValueError, RuntimeError, OSError, ModuleNotFoundError) as error:
        sys.exit(f"error: {error}")
    print_summary(summary)


if __name__ == "__main__":
    main()
