"""The plan of a run of `experiments.reason` next to what the run took: resident memory, each in a process of its own.

    increase    peak of a process above that of one that has only imported the command and started JAX

The plan compiles the programs of the run and reads no weights; the run has two generations with a check and a checkpoint after
each, so that a checkpoint is written while the second one is evaluated.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from eggroll.experiments.bench.memory.options import Memory

REASON = "eggroll.experiments.reason"
BARE = (
    f"import {REASON}.__main__, eggroll.experiments.common.memory as memory, jax; jax.numpy.zeros(1); print(memory.peak_mib())"
)
WEIGHTS = {"float32": [], "bfloat16": ["--dtype", "bfloat16"], "int8": ["--weights", "int8"]}
SIZES = ["--prompts", "2", "--max-new-tokens", "16", "--validation-size", "16", "--test-size", "16"]
SMALL = ["--start.steps", "2", "--start.width", "32", "--task-options", "train=40", "validation=16", "test=16"]
TWO = ["--generations", "2", "--check-every", "1", "--examples", "0"]


def rows(config: Memory) -> dict[str, Any]:
    """Plan and run every kind of weights with every optimizer."""
    model = SMALL if config.model is None else ["--model", str(config.model)]
    print(f"{config.members} members, 2 texts of 16 new tokens each, two generations; MiB above Python and JAX")
    print(f"{'weights, optimizer':<22}{'planned':>10}{'measured':>10}{'ratio':>8}", flush=True)
    bare = float(_last_line(["-c", BARE]))
    found: dict[str, Any] = {}
    for weights, chosen in WEIGHTS.items():
        for optimizer in (name for name in config.optimizers if name in ("sgd", "adam")):
            if weights == "bfloat16" and config.model is None:  # the small model is float32
                continue
            options = [*model, *SIZES, *chosen, "--population-size", str(config.members), "--optimizer", optimizer]
            found[f"{weights}, {optimizer}"] = row = _row(options, bare)
            numbers = "".join(f"{row[name]:>10,.0f}" for name in ("planned_mib", "measured_mib"))
            print(f"{f'{weights}, {optimizer}':<22}{numbers}{row['ratio']:>8.2f}", flush=True)
    return found


def _row(options: list[str], bare: float) -> dict[str, Any]:
    plan = json.loads(_last_line(["-m", REASON, *options, "--plan"]))
    with tempfile.TemporaryDirectory() as folder:
        run = json.loads(_last_line(["-m", REASON, *options, *TWO, "--folder", str(Path(folder) / "run")]))
    planned, measured = (plan["peak"] + plan["runtime"]) / 2**20 - bare, run["peak_mib"] - bare
    return {"bare_mib": bare, "planned_mib": planned, "measured_mib": measured, "ratio": planned / measured, "plan": plan}


def _last_line(arguments: list[str]) -> str:
    """Run Python; return the last line of its output.

    Raises:
        SystemExit: it failed; its last line says why.
    """
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env={**os.environ, "JAX_PLATFORMS": "cpu"}
    )
    if done.returncode:
        raise SystemExit(f"error: {' '.join(arguments)[:200]}: {(done.stderr.splitlines() or ['it was killed'])[-1]}")
    return done.stdout.splitlines()[-1]
