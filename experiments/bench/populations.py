"""One generation of a very large population, in chunks that the engine chooses from a byte budget: members, seconds, memory.

Every case runs in its own process, so that its peak of resident memory is separate.
"""

import dataclasses
import json
import logging
import subprocess
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import optax

import eggroll
from eggroll.experiments.bench.cases import mlp
from eggroll.experiments.bench.timing import machine
from eggroll.experiments.common.memory import peak_mib
from eggroll.experiments.common.run import print_summary

CASES = {"mlp": 1 << 18, "toy": 1 << 20}  # members


@dataclasses.dataclass(frozen=True)
class Populations:
    """Run one generation of 2^18 members of an MLP 256-256-256-256-8 (8 inputs) and of 2^20 members of a toy (100 weights)."""

    memory_budget: int = 1 << 30
    """Bytes of temporary memory of an evaluation, from which the engine chooses the chunks."""
    case: str | None = None
    """Run only this case, mlp or toy, in this process; None: each in its own process."""


def run(config: Populations) -> None:
    """Run the benchmark; the last line of standard output is JSON."""
    if config.case is not None:
        if config.case not in CASES:
            raise SystemExit(f"error: case must be one of {', '.join(CASES)}, got {config.case!r}.")
        print_summary(_measure(config.case, config.memory_budget))
        return
    rows = {}
    print(f"{'case':<6}{'members':>10}{'chunk':>8}{'seconds':>9}{'members/s':>12}{'peak MiB':>10}{'start MiB':>11}")
    for name in CASES:
        command = [sys.executable, "-m", "eggroll.experiments.bench", "populations", "--case", name]
        command += ["--memory-budget", str(config.memory_budget)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        rows[name] = row = json.loads(done.stdout.splitlines()[-1])
        numbers = f"{row['members']:>10,}{row['chunk']:>8,}{row['seconds']:>9.2f}{row['members_per_second']:>12,.0f}"
        print(f"{name:<6}{numbers}{row['peak_mib']:>10.0f}{row['start_mib']:>11.0f}", flush=True)
    print_summary({**rows, "about": machine()})


def _measure(name: str, budget: int) -> dict[str, Any]:
    """Time one generation after the one that compiles."""
    logging.basicConfig(format="%(message)s")
    fitness, params, batch = _make_problem(name)
    es = eggroll.EvolutionStrategy(
        fitness, population_size=CASES[name], sigma=0.02, optimizer=optax.sgd(0.1), memory_budget=budget
    )
    state = es.init(params, key=jax.random.key(1))
    start_mib = peak_mib()
    state, _ = jax.block_until_ready(es.step(state, batch))
    start = time.perf_counter()
    state, metrics = jax.block_until_ready(es.step(state, batch))
    seconds = time.perf_counter() - start
    layout = es.chunked_layout(state, batch)
    row: dict[str, Any] = {"members": es.population_size, "chunk": 2 * (layout.chunk_pairs or layout.num_pairs)}
    row |= {"seconds": seconds, "members_per_second": es.population_size / seconds}
    return row | {"mean_fitness": float(metrics.mean_fitness), "start_mib": start_mib, "peak_mib": peak_mib()}


def _make_problem(name: str) -> tuple[Any, Any, Any]:
    """Fitness, parameters and batch."""
    if name == "toy":
        return (lambda params, batch, key: -jnp.sum((params["w"] - 1) ** 2)), {"w": jnp.zeros(100)}, None
    case = mlp(8, chunk_size=1024)
    return (lambda params, batch, key: case.function(params, batch)), case.params, case.batch[0]
