"""The engine against pure batched inference of the same inputs, and against dense noise.

For every case, interleaved in one process: unperturbed inference, perturbed forward, update, generation, dense generation.
Inference is one batched call over all members. When members are evaluated in chunks that fit the cache, inference gains from
the same chunks too, so the stricter ratio to chunked inference is reported as well.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import eggroll
from eggroll.experiments.bench.cases import CASES, Case, check_cases
from eggroll.experiments.bench.timing import advancing, interleaved_ms, machine
from eggroll.experiments.common.run import print_summary
from eggroll.noise.addresses import Distribution


@dataclasses.dataclass(frozen=True)
class Engine:
    """Time a generation of the engine as a ratio to pure batched inference of the same inputs."""

    cases: tuple[str, ...] = tuple(CASES)
    """Cases to run: mlp8, mlp128, transformer, policy."""
    repeats: int = 15
    """Rounds; the medians are reported."""
    dense_repeats: int = 3
    """Rounds of the dense form, which is slow; 0 skips it."""
    distribution: Distribution = "rademacher"
    """Distribution of the factors: rademacher or normal."""
    rank: int = 1
    """Rank of the perturbation."""
    tune: bool = False
    """Also time the generation at several chunk sizes and print them."""


def run(config: Engine) -> None:
    """Run the benchmark; the last line of standard output is JSON."""
    check_cases(config.cases)
    about = machine()
    print("  ".join(f"{key} {value}" for key, value in about.items()))
    columns = ("inference_ms", "forward_ms", "update_ms", "generation_ms", "generation_ratio", "chunked_ratio", "dense_ratio")
    print(f"{'case':<12}" + "".join(f"{column:>18}" for column in columns), flush=True)
    results = {}
    for name in config.cases:
        results[name] = row = measure(CASES[name](), config)
        print(f"{name:<12}" + "".join(f"{_cell(row[column]):>18}" for column in columns), flush=True)
    print_summary(results | {"about": about | {"distribution": config.distribution, "rank": config.rank}})


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}" if abs(value) < 1 else f"{value:.2f}"


def measure(case: Case, config: Engine) -> dict[str, float | None]:
    """Time one case; milliseconds, and ratios inference / generation (chunked: of inference in the same chunks)."""
    spec = eggroll.LowRank(config.rank, config.distribution)
    forms = engine_forms(case, spec, chunk_size=case.chunk_size)
    forms |= {"inference": inference_form(case, None), "chunked_inference": inference_form(case, case.chunk_size)}
    if config.tune:
        for chunk in (2**power for power in range(3, 12) if 2**power <= len(case.batch)):
            forms[f"generation at {chunk}"] = engine_forms(case, spec, chunk_size=chunk)["generation"]
    times = interleaved_ms(forms, repeats=config.repeats)
    if config.tune:
        print({name: round(ms, 2) for name, ms in times.items()})
    inference = times["inference"]
    dense_ratio = None
    if config.dense_repeats:
        dense_forms = {
            "inference": inference_form(case, None),
            "dense": engine_forms(case, eggroll.Dense(), chunk_size=case.dense_chunk_size)["generation"],
        }
        dense = interleaved_ms(dense_forms, repeats=config.dense_repeats)
        dense_ratio = inference / dense["dense"]
    return {
        "inference_ms": inference,
        "forward_ms": times["forward"],
        "update_ms": times["update"],
        "generation_ms": times["generation"],
        "generation_ratio": inference / times["generation"],
        "chunked_ratio": times["chunked_inference"] / times["generation"],
        "dense_ratio": dense_ratio,
    }


def inference_form(case: Case, chunk_size: int | None) -> Callable[[], Any]:
    """Unperturbed inference of every member's inputs."""

    def all_members(params, batch):
        if chunk_size is None:
            return jax.vmap(lambda x: case.function(params, x))(batch)
        return jax.lax.map(lambda x: case.function(params, x), batch, batch_size=chunk_size)

    jitted = jax.jit(all_members)
    return lambda: jitted(case.params, case.batch)


def start(case: Case, spec: Any, *, chunk_size: int) -> tuple[eggroll.EvolutionStrategy, eggroll.ESState]:
    """The strategy of a case and its first state, with the plan made."""
    es = eggroll.EvolutionStrategy(
        lambda params, batch, key: case.function(params, batch),
        population_size=len(case.batch),
        sigma=0.05,
        optimizer=optax.adam(1e-3),
        perturbation=spec,
        members_per_batch=1,
        chunk_size=min(chunk_size, len(case.batch)),
    )
    state = es.init(case.params, key=jax.random.key(2))
    es.plan(state, case.batch)
    return es, state


def engine_forms(case: Case, spec: Any, *, chunk_size: int) -> dict[str, Callable[[], Any]]:
    """The perturbed forward, the update and the whole generation of one strategy."""
    es, state = start(case, spec, chunk_size=chunk_size)
    fitness = jnp.sin(jnp.arange(len(case.batch), dtype=jnp.float32))

    @jax.jit
    def forward(state, batch):
        return es.evaluate(state, batch, function=lambda params, batch, key, _: case.function(params, batch))

    return {
        "forward": lambda: forward(state, case.batch),
        "update": advancing(lambda state: es.tell(state, fitness), state),
        "generation": advancing(lambda state: es.step(state, case.batch), state),
    }
