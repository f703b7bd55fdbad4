"""A generation of integer pretraining against unperturbed inference of the same inputs.

Interleaved in one process: unperturbed inference of every member's text and state, batched as in the engine; the perturbed
forward; the update; the whole generation.
"""

import dataclasses
import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from eggroll.experiments.bench.timing import advancing, machine, rounds_ms
from eggroll.experiments.common.memory import peak_mib
from eggroll.experiments.common.options import ignored_options, refuse, unless
from eggroll.experiments.common.run import print_summary
from eggroll.experiments.egg import evolution
from eggroll.experiments.egg.config import Config
from eggroll.experiments.egg.data import corpus
from eggroll.experiments.egg.models import egg


@dataclasses.dataclass(frozen=True)
class EGG:
    """Time a generation of `experiments.egg`; the defaults are its tiny preset."""

    train: Config = dataclasses.field(default_factory=Config)
    """Options of `experiments.egg` that change a generation."""
    repeats: int = 15
    """Rounds; medians and the fastest round are reported."""


_OF_RUNS = (
    "preset",
    "generations",
    "accept_change",
    "seeds",
    "validation_every",
    "validation_bytes",
    "sample_length",
    "temperature",
    "checkpoint_every",
    "resume",
    "folder",
)
RULES = (unless(lambda config: True, "in the benchmark, which runs one generation", *(f"train.{name}" for name in _OF_RUNS)),)


def run(config: EGG) -> None:
    """Run the benchmark; the last line of standard output is JSON."""
    try:
        refuse(ignored_options(config, RULES, EGG()))
        config.train.check()
        times = rounds_ms(_forms(config.train), repeats=config.repeats)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
    row = {"median": _row(config.train, times, statistics.median), "least": _row(config.train, times, min)}
    about = machine() | {"rounds": config.repeats}
    print("  ".join(f"{key} {value}" for key, value in about.items()))
    print(f"{'':<8}" + "".join(f"{column:>18}" for column in row["median"]))
    for name, numbers in row.items():
        print(f"{name:<8}" + "".join(f"{value:>18,.3f}" for value in numbers.values()), flush=True)
    print_summary(row["median"] | {"peak_bytes": round(peak_mib() * 2**20), "least": row["least"], "about": about})


def _row(config: Config, times: dict[str, list[float]], reduce: Callable[[list[float]], float]) -> dict[str, float]:
    ms = {f"{name}_ms": reduce(rounds) for name, rounds in times.items()}
    read = config.population_size * config.bytes_per_update
    return {
        "bytes_per_second": 1e3 * read / ms["generation_ms"],
        **ms,
        "generation_ratio": ms["inference_ms"] / ms["generation_ms"],
    }


def _forms(config: Config) -> dict[str, Callable[[], Any]]:
    """Forms to time, starting from a state whose members have read some text."""
    texts = corpus.load(config.data, cache=config.cache)
    init_key, run_key = jax.random.split(jax.random.key(config.seed))
    es, state = evolution.start(config, init_key=init_key, run_key=run_key)
    read = [corpus.streams(texts, at, groups=config.streams, length=config.bytes_per_update) for at in (0, 1)]
    state, metrics = es.step(state, read[0])
    text, fitness = jnp.asarray(read[1]), metrics.fitness

    @jax.jit
    def inference(params: Any, states: Any, text: Any) -> Any:
        def pair(inputs: Any) -> Any:
            index, pair_states = inputs
            own = text[index // (config.group // 2)]
            return jax.vmap(lambda state: egg.sequence(params, state, own, config.model))(pair_states)

        inputs = (jnp.arange(config.population_size // 2), states)
        if es.layout.is_chunked:
            return jax.lax.map(pair, inputs, batch_size=es.layout.chunk_pairs)
        return jax.vmap(pair)(inputs)

    @jax.jit
    def forward(state: Any, text: Any) -> Any:
        return es.evaluate(state, text)

    return {
        "inference": lambda: inference(state.params, state.member_state, text),
        "forward": lambda: forward(state, text),
        "update": advancing(lambda state: es.tell(state, fitness), state),
        "generation": advancing(lambda state: es.step(state, text), state),
    }
