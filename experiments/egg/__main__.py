"""Pretrain an integer language model by evolution: `python -m eggroll.experiments.egg --help`.

EGG (`experiments.egg.models.egg`) reads bytes. Each member of the population reads the stream of its group and carries its own
state. Training uses no floating-point numbers and no backpropagation; metrics and schedules are computed on the host. The last
line of standard output is a JSON object with the bits per byte of the trained parameters on held-out text, and those of
reference compressors on the same text. Each seed writes its artefacts to its own run folder.
"""

import time
from collections.abc import Sequence
from typing import Any

import jax

import eggroll
from eggroll.experiments.common.checkpoint import save_checkpoint
from eggroll.experiments.common.loop import seconds_spent
from eggroll.experiments.common.run import exit_on_error, leave, print_summary, start_processes
from eggroll.experiments.common.seeds import Row, SeedRun, run_seeds
from eggroll.experiments.egg import evolution
from eggroll.experiments.egg.config import Config, parse
from eggroll.experiments.egg.inputs import Inputs, load


def remake(options: dict[str, Any]) -> tuple[eggroll.EvolutionStrategy, eggroll.ESState]:
    """Remake the strategy and the initial state of a run, from the recipe in its journal."""
    config = Config(**options)
    init_key, run_key = jax.random.split(jax.random.key(config.seed))
    return evolution.start(config, init_key=init_key, run_key=run_key)


def train(config: Config, inputs: Inputs, run: SeedRun) -> Row:
    """Train with one seed and write the artefacts; return the fields of its summary."""
    start = time.perf_counter() - seconds_spent(run.folder)
    trained = evolution.pretrain(config, inputs, run)
    seconds = time.perf_counter() - start
    save_checkpoint(run.folder / "checkpoint", trained.params)
    bits = f"{trained.validation_bits:.4f} bits per byte of held-out text"
    print(f"seed {run.seed}: {bits}; metrics and checkpoint are in {run.folder}", flush=True)
    read = config.population_size * config.bytes_per_update
    return {
        "validation_bits": trained.validation_bits,
        "generations": trained.generations,
        "bytes_read": trained.generations * read,
        "bytes_per_second": round(read / trained.generation_seconds) if trained.generation_seconds else 0,
        "generation_seconds": round(trained.generation_seconds, 5),
        "seconds": round(seconds, 2),
    }


def run(config: Config) -> Row:
    """Run every seed; return the summary that `main` prints."""
    inputs = load(config)
    key = jax.random.key(config.seed)
    evolution.start(config, init_key=key, run_key=key)  # errors come before a run in the folder is replaced
    summary = run_seeds(
        config,
        lambda run: train(config, inputs, run),
        experiment="egg",
        default=f"egg-{config.layers}x{config.width}-{config.population_size}",
        options=config.options(),
        recorded={"corpus": inputs.corpus.fingerprint},
    )
    return summary | {f"{row.name}_bits": row.bits_per_byte for row in inputs.references}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line; wrong options end it with a one-line error."""
    with exit_on_error():
        config = parse(arguments)
        config.check()
        start_processes()
        summary = run(config)
    print_summary(summary)


if __name__ == "__main__":
    leave(main)
