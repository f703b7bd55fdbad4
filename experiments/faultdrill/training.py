"""The training run that the drill kills: a small network with a journal and checkpoints, in its own process.

python -m eggroll.experiments.faultdrill.training FOLDER GENERATIONS CHECKPOINT_EVERY [MOMENT GENERATION]
"""

import contextlib
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import eggroll
from eggroll.devices.processes import is_first, join
from eggroll.experiments.common.mesh import parse_mesh
from eggroll.journal.fingerprint import fingerprint
from eggroll.protocol import S
from eggroll.runs.durable import DurableRun
from eggroll.runs.training import Record, train

RECIPE = "eggroll.experiments.faultdrill.training:make"


class Statistics:
    """A running mean of the fitness, carried with the state as front ends do."""

    def __init__(self) -> None:
        self.mean, self.count = np.float32(0), np.int64(0)

    def save(self) -> dict[str, Any]:
        """Return arrays."""
        return {"count": np.asarray(self.count), "mean": np.asarray(self.mean)}

    def load(self, saved: Any) -> None:
        """Restore."""
        self.count, self.mean = np.int64(saved["count"]), np.float32(saved["mean"])

    def __call__(self, state: eggroll.ESState, record: Record) -> None:
        """Callback of the training loop."""
        self.count = np.int64(self.count + 1)
        self.mean = np.float32(self.mean + (np.float32(record.mean_fitness) - self.mean) / np.float32(self.count))


class Net(nn.Module):
    """Two layers."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map [4] to [1]."""
        return nn.Dense(1)(nn.tanh(nn.Dense(32)(x)))


def batch_of(generation: int) -> tuple[jax.Array, jax.Array]:
    """Inputs [64, 4] and targets [64, 1] of a generation."""
    x = jax.random.normal(jax.random.fold_in(jax.random.key(1), generation), (64, 4))
    return x, jnp.sin(x.sum(axis=1, keepdims=True))


def make(options: Any) -> tuple[eggroll.EvolutionStrategy, eggroll.ESState]:
    """Make the strategy, with its plan, and the initial state: the recipe of the journal."""

    def fitness(params: Any, batch: Any, key: jax.Array) -> jax.Array:
        x, y = batch
        return -jnp.mean(jnp.square(jax.vmap(lambda x: Net().apply(params, x))(x) - y))

    mesh = parse_mesh(None)
    es = eggroll.EvolutionStrategy(fitness, population_size=64, sigma=0.05, optimizer=optax.adam(1e-2), mesh=mesh)
    state = es.init(Net().init(jax.random.key(0), jnp.zeros(4)), key=jax.random.key(2))
    es.plan(state, batch_of(0))
    return es, state


def work(folder: Path, *, generations: int, checkpoint_every: int, die: tuple[str, int] | None = None, made: Any = None) -> str:
    """Resume training in `folder` to the end, or to the moment and the generation of `die`; return the fingerprint.

    `made` is the result of `make`, whose programs may be compiled already.
    """
    es, initial = made or make({})
    carried = Statistics()
    config = {"experiment": "faultdrill", "checkpoint_every": checkpoint_every}
    recipe = {"function": RECIPE, "options": {}}
    run = DurableRun(folder, es, initial, config=config, carried=carried, recipe=recipe, checkpoint_every=checkpoint_every)
    state, started_at = run.state, int(run.state.generation)
    if is_first():  # lines of several processes would run into each other
        print(f"started at {started_at}", flush=True)
    if die is not None:
        _arm(run, *die)
    with contextlib.closing(run):
        left, callbacks = max(0, generations - started_at), list[Any]([carried, _report])
        state, _ = train(
            es, state, batch_of, generations=left, callbacks=callbacks, run_folder=folder, durable=run, plot=draw_nothing
        )
    return fingerprint((state.params, state.opt_state, carried.save()))


def draw_nothing(history: Any, folder: Path) -> None:
    """Leave the figure out: it would take most of the time of a resume."""


def _report(state: eggroll.ESState, record: Record) -> None:
    """Callback: print the generation; the parent process counts these lines."""
    if is_first():
        print(record.generation, flush=True)


def _arm(run: DurableRun, moment: str, generation: int) -> None:
    """Make the process kill itself in the middle of a write."""
    journal, checkpoints = run._journal, run.checkpoints
    assert journal is not None
    if moment == "journal":
        file, done = journal._file, lambda: journal.next or 0

        class HalfWritten:
            """Writes half of a record, then kills the process."""

            def write(self, data: bytes) -> int:
                if done() >= generation:
                    file.write(data[: len(data) // 2])
                    os.kill(os.getpid(), signal.SIGKILL)
                return file.write(data)

            def __getattr__(self, name: str) -> Any:
                return getattr(file, name)

        mock.patch.object(journal, "_file", HalfWritten()).start()
    else:
        save = checkpoints.save

        def save_and_die(state: S, carried: Any = None, *, score: float | None = None) -> None:
            save(state, carried, score=score)  # asynchronous
            if int(state.generation) >= generation:
                time.sleep(random.random() * 0.02)
                os.kill(os.getpid(), signal.SIGKILL)

        mock.patch.object(checkpoints, "save", save_and_die).start()


if __name__ == "__main__":
    join()
    place, length, every, *moment = sys.argv[1:]
    kill = (moment[0], int(moment[1])) if moment else None
    work(Path(place), generations=int(length), checkpoint_every=int(every), die=kill)
