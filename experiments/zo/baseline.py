"""Backprop with Adam on the loss of a fine-tuning task: the ceiling of zeroth-order methods, and the memory that it takes.

Of bfloat16 parameters Adam updates float32 copies, with float32 moments; forward and backward pass see them rounded.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from eggroll.experiments.common.backprop import gradient_metrics
from eggroll.experiments.common.loop import Checks, Tuned, rate
from eggroll.experiments.common.seeds import SeedRun
from eggroll.experiments.zo.capacity import dtype_of
from eggroll.experiments.zo.config import Config
from eggroll.experiments.zo.data.examples import Examples, batch_of
from eggroll.experiments.zo.inputs import keep_task
from eggroll.experiments.zo.problem import FineTuning, Score, score
from eggroll.experiments.zo.progress import Progress, why_ended
from eggroll.population.metrics import Metrics
from eggroll.runs.training import train
from eggroll.zo.blocks import whole_loss


class TrainState(NamedTuple):
    """A run of Adam between two steps."""

    params: Any  # float32
    opt_state: Any
    generation: Array  # int32 [], steps done
    key: Array


class Backprop:
    """Tunes with Adam; compiled once, run with any number of keys. A step takes one forward and one backward pass.

    `eggroll.train` runs the steps like the generations of a strategy.
    """

    forwards = 1
    population_size = 1

    def __init__(self, config: Config, task: FineTuning, judge: Any):
        self._config, self._task, self._judge = config, task, judge
        self.steps = config.steps or config.forwards
        self._optimizer = optax.adam(config.learning_rate)
        self._dtype = dtype_of(config)
        self.advance = jax.jit(self._descend, donate_argnums=0)

    def init(self, params: Any, *, key: Array) -> TrainState:
        """Return the state before the first step; the key is consumed."""
        params = _cast(params, jnp.float32)
        return TrainState(params, self._optimizer.init(params), jnp.int32(0), key)

    def step(self, state: TrainState, batch: Examples) -> tuple[TrainState, Metrics]:
        """Take one step; the fitness that it reports is minus the loss before it."""
        number = int(state.generation)
        state, loss = self.advance(state, batch)
        return state, gradient_metrics(number, fitness=-float(loss))

    def _descend(self, state: TrainState, batch: Examples) -> tuple[TrainState, Array]:
        def mean_loss(params: Any) -> Array:
            total, weight = whole_loss(self._task.pieces("loss"))(_cast(params, self._dtype), batch, state.key)
            return total / weight

        loss, gradient = jax.value_and_grad(mean_loss)(state.params)
        updates, opt_state = self._optimizer.update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return TrainState(params, opt_state, state.generation + 1, state.key), loss

    def judge(self, params: Any) -> Callable[[Examples], tuple[Any, Any]]:
        """Return the function from a batch to mean loss and accuracy of parameters."""
        return functools.partial(self._judge, params)

    def train(self, seed_run: SeedRun, read: Callable[[], Any]) -> Tuned:
        """Run the steps; metrics go to the folder. `read` returns the initial parameters, which the run consumes."""
        config, task = self._config, self._task

        def score_validation(state: Any) -> Score:
            return score(self.judge(_cast(state.params, self._dtype)), task.validation)

        progress = Progress(
            score_validation, Checks(steps=self.steps, checks=config.checks), learning_rate=config.learning_rate
        )
        keep_task(config, seed_run.folder)
        strategy: Any = self  # implements what the loop needs of a strategy and its state
        initial: Any = self.init(read(), key=jax.random.key(seed_run.seed))
        progress.begin()
        state, history = train(
            strategy,
            initial,
            lambda step: batch_of(task.train, step, size=config.batch_size, seed=seed_run.seed),
            generations=self.steps,
            budget=("steps", self.steps),
            callbacks=[progress],
            run_folder=seed_run.folder,
            words=progress.words,
            plot=lambda history, folder: None,  # the run's own figure shows the losses
        )
        seconds = progress.seconds
        speed = rate([record.seconds for record in history], forwards=self.forwards)
        ended = why_ended(config, self.steps, forwards=self.forwards, seconds=seconds)
        return Tuned(_cast(state.params, self._dtype), self.steps, self.steps, 0, speed, seconds, ended)


def _cast(params: Any, dtype: Any) -> Any:
    """Parameters of a dtype; those that have it are the same arrays."""
    return jax.tree.map(lambda leaf: leaf if leaf.dtype == dtype else leaf.astype(dtype), params)
