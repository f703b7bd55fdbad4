"""Predicted memory of a generation next to what this machine's GPU used.

    predicted   the largest peak of the compiled programs (`programs.Usage`)
    measured    `peak_bytes_in_use` of the device after one run

A device never forgets its peak, so plain inference and the generation run in processes of their own. The process that starts
them leaves the GPU alone.
"""

import json
import os
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp

from eggroll.experiments.bench.memory.options import Memory, chosen_models
from eggroll.experiments.bench.memory.programs import Generation, usage
from eggroll.experiments.bench.memory.rows import GIGA, make_decoder_generation
from eggroll.experiments.bench.timing import machine

PROGRAMS = {"plain": ("plain",), "generation": ("evaluate", "update")}
ALLOCATOR = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95"}


def rows(config: Memory) -> dict[str, Any]:
    """Run plain inference and a generation of every model, each in its own process."""
    print(f"{config.members} members of one token, stochastic + sgd; GB on this machine's GPU")
    print(f"{'model':<8}{'program':<14}{'predicted':>11}   measured, ratio", flush=True)
    found: dict[str, Any] = {}
    for name in chosen_models(config):
        found[name] = {}
        for program in PROGRAMS:
            found[name][program] = row = _run_in_process(config, name, program)
            print(f"{name:<8}{program:<14}" + _line(row), flush=True)
    return found


def _run_in_process(config: Memory, name: str, program: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "eggroll.experiments.bench", "memory", "--target", "gpu", "--models", name]
    command += ["--program", program, "--members", str(config.members), "--implementation", config.implementation]
    command += [] if config.layers is None else ["--layers", str(config.layers)]
    done = subprocess.run(command, capture_output=True, text=True, env=ALLOCATOR | os.environ)
    sys.stderr.write(done.stderr)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "rror" in line] or [f"exit status {done.returncode}"]
        return {"failed": lines[-1].strip()[:300]}
    return json.loads(done.stdout.splitlines()[-1])


def _line(row: dict[str, Any]) -> str:
    if "failed" in row:
        return f"  {row['failed']}"
    predicted, measured = row["predicted_gb"], row["measured_gb"]
    numbers = "-" if measured is None else f"{measured:.2f}{measured / predicted:>8.3f}"
    return f"{predicted:>11.2f}   {numbers}"


def run_program(config: Memory) -> dict[str, Any]:
    """Measure one program of one model in this process.

    Raises:
        SystemExit: there is no GPU, or not exactly one model and program.
    """
    if jax.default_backend() != "gpu":
        raise SystemExit(f"error: target gpu needs a GPU that JAX can use, the default backend is {jax.default_backend()}.")
    if config.target != "gpu" or config.program is None or len(chosen_models(config)) != 1:
        raise SystemExit("error: program needs --target gpu and exactly one of --models.")
    generation = make_decoder_generation(config, chosen_models(config)[0])
    return measure(generation, config.program) | {"about": machine()}


def measure(generation: Generation, program: str) -> dict[str, Any]:
    """Compile and run once; `measured_gb` is None on a device that does not count, such as a CPU."""
    compiled = {name: generation.compile(name) for name in PROGRAMS[program]}
    params, batch = jax.jit(lambda: jax.tree.map(_zeros, (generation.state.params, generation.batch)))()
    jax.block_until_ready(generation.run(compiled, params, batch))
    stats = jax.devices()[0].memory_stats() or {}
    used, limit = (None if (size := stats.get(name)) is None else size / GIGA for name in ("peak_bytes_in_use", "bytes_limit"))
    usages = {name: usage(program) for name, program in compiled.items()}
    row: dict[str, Any] = {"predicted_gb": max(found.peak for found in usages.values()) / GIGA, "measured_gb": used}
    row |= {"limit_gb": limit, "implementation": generation.implementation}
    return row | {"usage": {name: found._asdict() for name, found in usages.items()}}


def _zeros(leaf: Any) -> jax.Array:
    return jnp.zeros(leaf.shape, leaf.dtype)
