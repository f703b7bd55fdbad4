"""Memory of one step as the compiler plans it; other memory of the process is not counted."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from eggroll.experiments.zo.__main__ import make_runs
from eggroll.experiments.zo.baseline import Backprop
from eggroll.experiments.zo.config import parse
from eggroll.experiments.zo.data.examples import batch_of
from eggroll.experiments.zo.inputs import load


def step_mib(arguments: Sequence[str], folder: Path) -> float:
    """Return MiB of arguments, results and temporaries of a resident step.

    Args:
        arguments: options of `experiments.zo`.
        folder: for the shipped task.
    """
    config = parse(arguments)
    loaded = load(config, folder)
    runs: Any = make_runs(config, loaded.task, loaded.task.judge())
    batch = batch_of(loaded.task.train, 0, size=config.batch_size)
    key = jax.random.key(0)
    if isinstance(runs, Backprop):
        lowered = runs.advance.lower(runs.init(loaded.params, key=key), batch)
    else:
        tuner, state = runs.start(loaded.params, key=key)
        lowered = jax.jit(lambda state, batch: tuner.step(state, batch)[0], donate_argnums=0).lower(state, batch)
    used: Any = lowered.compile().memory_analysis()
    sizes = used.argument_size_in_bytes + used.output_size_in_bytes + used.temp_size_in_bytes - used.alias_size_in_bytes
    return sizes / 2**20
