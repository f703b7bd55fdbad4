"""Zeroth-order runs of a fine-tuning task: with all of the model on the device, or with its blocks in the host's memory."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from eggroll import zo
from eggroll.devices.processes import local
from eggroll.experiments.common.loop import Checks, Tuned, rate
from eggroll.experiments.common.mesh import parse_mesh
from eggroll.experiments.zo.config import Config, arguments
from eggroll.experiments.zo.data.examples import Examples, batch_of
from eggroll.experiments.zo.figure import as_row
from eggroll.experiments.zo.problem import FineTuning, Score, score
from eggroll.noise.rules import Dense
from eggroll.protocol import Strategy
from eggroll.runs.diagnosis import advise
from eggroll.runs.durable import DurableRun
from eggroll.runs.training import Record, train

PER_EXAMPLE = "grzo"  # the recipe with a direction for every example of the batch


def make_tuner(config: Config, task: FineTuning) -> zo.ZerothOrder:
    """Make the recipe that `config` names.

    Raises:
        ValueError: an argument of the recipe is wrong; the message names it.
    """
    has = arguments(config.recipe)
    given = {name: getattr(config, name) for name in ("learning_rate", "sigma", "directions")}
    given = {name: value for name, value in given.items() if value is not None}
    if config.recipe == PER_EXAMPLE:
        given.setdefault("directions", config.batch_size)
    given |= {"weight_decay": config.weight_decay} if config.weight_decay else {}
    given |= {"perturbation": Dense(config.perturbation)} if config.perturbation else {}
    refused = [name for name in given if name not in has]
    if refused:
        raise ValueError(f"recipe {config.recipe} has no {refused[0]}.")
    make, pieces, mesh = zo.RECIPES[config.recipe], task.pieces(config.objective), parse_mesh(config.mesh)
    try:
        return make(pieces, **given, **config.given(), chunk_directions=config.chunk_directions, mesh=mesh)
    except TypeError as error:
        raise ValueError(str(error)) from error


def forwards_of(tuner: zo.ZerothOrder) -> int:
    """Forwards of a step."""
    return zo.ESTIMATORS[tuner.estimator].forwards(tuner.directions)


def steps_of(config: Config, forwards: int) -> int:
    """Steps of a run, from the forwards of a step.

    Raises:
        ValueError: the budget is less than one step.
    """
    if config.steps is None and config.forwards < forwards:
        raise ValueError(f"forwards {config.forwards} are fewer than the {forwards} of one step of {config.recipe}.")
    return config.steps or config.forwards // forwards


class _Progress:
    """Callback of the training loop: scores the unperturbed parameters, counts skipped steps; carried by the run."""

    def __init__(self, score_validation: Callable[[Any], Score], checks: Checks):
        self.skipped = 0
        self._score, self._checks = score_validation, checks

    def __call__(self, state: Any, record: Record) -> None:
        self.skipped += record.skipped
        if self._checks.due(record.generation + 1):
            record.extra.update(as_row(self._score(state)))

    def save(self) -> Any:
        """Return the count as an array."""
        return np.array([self.skipped], np.int64)

    def load(self, saved: Any) -> None:
        """Restore."""
        self.skipped = int(saved[0])


class Evolution:
    """Tunes with a recipe of `zo`, offloaded or not; compiled once, run with any number of keys."""

    def __init__(self, config: Config, task: FineTuning, judge: Any):
        self._config, self._task, self._judge = config, task, judge
        self._recipe = make_tuner(config, task)
        self._tuner = zo.Offload(self._recipe) if config.offload else self._recipe
        # The same parameters under other objectives, block by block.
        judges = ("loss", "accuracy") if config.offload else ()
        self._judges = [zo.Offload(dataclasses.replace(self._recipe, loss=task.pieces(name))) for name in judges]
        self.forwards = forwards_of(self._recipe)
        self.steps = steps_of(config, self.forwards)

    def start(self, params: Any, *, key: Array) -> tuple[Strategy[Any], Any]:
        """Return the tuner, with its plan, and the initial state."""
        batch = batch_of(self._task.train, 0, size=self._config.batch_size)
        self._recipe.check_batch(batch)
        return self._tuner, self._tuner.init(params, key=key, batch=batch)

    def train(self, params: Any, *, key: Array, seed: int, folder: Path, recipe: dict[str, Any]) -> Tuned:
        """Run the remaining steps; metrics, figure, journal and checkpoints go to the folder.

        Raises:
            ValueError: the folder has a run with other settings, or damaged files.
        """
        config, task = self._config, self._task
        _refuse_private_checkpoints(folder)
        tuner, initial = self.start(params, key=key)
        progress = _Progress(self._score_validation, Checks(steps=self.steps, checks=config.checks))
        durable = DurableRun(
            folder,
            tuner,
            initial,
            config=config.settings(),
            carried=progress,
            checkpoint_every=config.checkpoint_every,
            accept_change=config.accept_change,
            recipe=recipe,
        )
        with contextlib.closing(durable):
            state, history = durable.state, list[Record]()
            left = self.steps - int(state.generation)
            if left:
                batches = lambda step: batch_of(task.train, step, size=config.batch_size, seed=seed)  # noqa: E731
                state, history = train(
                    tuner, state, batches, generations=left, callbacks=[progress], run_folder=folder, durable=durable
                )
        steps = int(state.generation)
        speed = rate([record.seconds for record in history], forwards=self.forwards)
        tuned = jax.tree.map(jnp.asarray, local(tuner.parameters(state)))
        return Tuned(tuned, steps, steps * self.forwards, progress.skipped, speed, advise(history, tuner.plan(state)))

    def _score_validation(self, state: Any) -> Score:
        if self._config.offload:
            return score(functools.partial(self._judge_by_block, state), self._task.validation)
        return score(functools.partial(self._judge, local(state.params)), self._task.validation)

    def _judge_by_block(self, state: Any, batch: Examples) -> tuple[Any, Any]:
        loss, wrong = (judge.loss(state, batch, key=state.key) for judge in self._judges)
        return loss, 1 - float(wrong)


def _refuse_private_checkpoints(folder: Path) -> None:
    """Raise ValueError where the folder has an offloaded run of version 0.1, whose checkpoints had a format of their own."""
    if (folder / "checkpoints" / "settings.json").exists():
        raise ValueError(
            f"{folder} has an offloaded run of version 0.1, which kept no journal and cannot be resumed; choose another folder."
        )
