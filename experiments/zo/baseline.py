"""Backprop with Adam on the loss of a fine-tuning task: the ceiling of zeroth-order methods, and what its memory costs."""

import functools
from pathlib import Path
from typing import Any

import jax
import optax
from jax import Array

from eggroll.experiments.common.loop import Checks, Row, Tuned, rate, run_steps
from eggroll.experiments.zo.config import Config
from eggroll.experiments.zo.data.examples import Examples, batch_of
from eggroll.experiments.zo.figure import as_row
from eggroll.experiments.zo.problem import FineTuning, score
from eggroll.zo.blocks import whole_loss


class Backprop:
    """Tunes with Adam; compiled once, run with any number of keys. A step takes one forward, and one backward pass."""

    forwards = 1

    def __init__(self, config: Config, task: FineTuning, judge: Any):
        self._config, self._task, self._judge = config, task, judge
        self.steps = config.steps or config.forwards
        self._optimizer = optax.adam(config.learning_rate)
        self.advance = jax.jit(self._advance)

    def start(self, params: Any) -> Any:
        """The initial run: parameters and the state of Adam."""
        return params, self._optimizer.init(params)

    def _advance(self, run: Any, batch: Examples, key: Array) -> Any:
        """One step: the next run, and the loss before it."""
        params, state = run

        def loss(params: Any) -> Array:
            total, weight = whole_loss(self._task.pieces("loss"))(params, batch, key)
            return total / weight

        value, gradient = jax.value_and_grad(loss)(params)
        updates, state = self._optimizer.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), value

    def train(self, params: Any, *, key: Array, seed: int, folder: Path, recipe: dict[str, Any]) -> Tuned:
        """Run the steps; metrics go to the folder."""
        config, task = self._config, self._task
        checks = Checks(steps=self.steps, checks=config.checks)

        def advance(run: Any, number: int) -> tuple[Any, Row]:
            batch = batch_of(task.train, number, size=config.batch_size, seed=seed)
            run, loss = self.advance(run, batch, key)
            return run, {"loss": loss}

        def check(run: Any, row: Row) -> None:
            if checks.due(row["generation"] + 1):
                row.update(as_row(score(functools.partial(self._judge, run[0]), task.validation)))

        run, rows = run_steps(advance, self.start(params), steps=self.steps, folder=folder, callbacks=[check])
        speed = rate([row["seconds"] for row in rows], forwards=self.forwards)
        return Tuned(run[0], self.steps, self.steps, 0, speed)
