"""Zeroth-order runs of a fine-tuning task: with all of the model on the device, or with its blocks in the host's memory."""

import contextlib
import dataclasses
import functools
import inspect
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import Array

from eggroll import zo
from eggroll.devices.processes import local
from eggroll.experiments.common.loop import Checks, Tuned, rate, seconds_spent
from eggroll.experiments.common.mesh import parse_mesh
from eggroll.experiments.common.seeds import SeedRun
from eggroll.experiments.zo.config import Config, arguments
from eggroll.experiments.zo.data.examples import Examples, batch_of
from eggroll.experiments.zo.guidance import guide, warn_of_spacing
from eggroll.experiments.zo.inputs import keep_task
from eggroll.experiments.zo.problem import FineTuning, Score, score
from eggroll.experiments.zo.progress import Progress, why_ended
from eggroll.files import Damaged, read_object
from eggroll.journal import Reader, replay
from eggroll.journal.checkpoint import Checkpoints
from eggroll.noise.rules import Dense, Flipout, LowRank
from eggroll.protocol import Strategy
from eggroll.runs.diagnosis import advise
from eggroll.runs.durable import DurableRun
from eggroll.runs.plot import plot_history
from eggroll.runs.record import Record, read_records
from eggroll.runs.training import train

PER_EXAMPLE = "grzo"  # the recipe with a direction for every example of the batch
NOISE = {"normal": Dense("normal"), "rademacher": Dense("rademacher"), "lowrank": LowRank(2, "normal")}


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
    if config.perturbation:
        given |= _noise(config.recipe, config.perturbation)
    if has["learning_rate"] is inspect.Parameter.empty and (config.probe or config.evaluate):
        given.setdefault("learning_rate", 1.0)  # of no consequence
    refused = [name for name in given if name not in has]
    if refused:
        raise ValueError(f"recipe {config.recipe} has no {refused[0]}.")
    given |= {"precision": config.precision} if config.precision else {}
    make, pieces, mesh = zo.RECIPES[config.recipe], task.pieces(config.objective), parse_mesh(config.mesh)
    try:
        return make(pieces, **given, **config.given(), chunk_directions=config.chunk_directions, mesh=mesh)
    except TypeError as error:
        raise ValueError(str(error)) from error


def _noise(recipe: str, name: str) -> dict[str, Any]:
    """The argument of a recipe that sets its noise."""
    if recipe in ("lozo", "lozo_m"):
        return {"distribution": name}
    distribution: Any = name
    return {"perturbation": Flipout(distribution) if recipe == PER_EXAMPLE else NOISE[name]}


def constant_rate(tuner: zo.ZerothOrder) -> float | None:
    """The learning rate of a tuner; None: a schedule."""
    rate = tuner.optimizer.learning_rate
    return float(rate) if isinstance(rate, int | float) else None


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


class Evolution:
    """Tunes with a recipe of `zo`, offloaded or not; compiled once, run with any number of keys."""

    def __init__(self, config: Config, task: FineTuning, judge: Any):
        self._config, self._task, self._judge = config, task, judge
        self._recipe = make_tuner(config, task)
        self._tuner = zo.Offload(self._recipe, config.transfer_dtype) if config.offload else self._recipe
        # The same parameters under other objectives, block by block.
        judges = ("loss", "accuracy") if config.offload else ()
        self._judges = [zo.Offload(dataclasses.replace(self._recipe, loss=task.pieces(name, judged=True))) for name in judges]
        self.forwards = forwards_of(self._recipe)
        self.steps = 0 if config.probe or config.evaluate else steps_of(config, self.forwards)
        if not config.evaluate:  # now, before a run in the folder makes way for this one
            self._check_batch()

    def start(self, params: Any, *, key: Array) -> tuple[Strategy[Any], Any]:
        """Return the tuner, with its plan, and the initial state, which takes over resident parameters."""
        batch = self._batch_shapes
        if isinstance(self._tuner, zo.Offload):
            return self._tuner, self._tuner.init(params, key=key, batch=batch)
        return self._tuner, self._tuner.init(params, key=key, batch=batch, donate=True)

    def plan(self, shapes: Any) -> None:
        """Read the plan of parameters; what is wrong with it is an error before a run in the folder makes way for this one."""
        self._recipe.plan_of(shapes, self._batch_shapes)

    @property
    def _batch_shapes(self) -> Examples:
        size = self._config.batch_size
        return Examples(*(jax.ShapeDtypeStruct((size, *array.shape[1:]), array.dtype) for array in self._task.train))

    def _check_batch(self) -> None:
        size, parts = self._config.batch_size, self._data_parts
        self._recipe.check_batch(self._batch(0, seed=self._config.seed))
        if size % parts:
            raise ValueError(f"batch_size must be a multiple of the {parts} devices of mesh axis 'data', got {size}.")

    @property
    def _data_parts(self) -> int:
        """Devices that share the examples of a batch."""
        mesh = self._recipe.mesh
        return 1 if mesh is None else mesh.shape.get("data", 1)

    def guide(self, state: Any, *, seed: int) -> zo.Guidance:
        """Measure gradient and curvature on the first two batches of a run, from its initial state; print what they suggest."""
        learning_rate = None if self._config.probe else constant_rate(self._recipe)
        return guide(self._tuner, state, [self._batch(step, seed=seed) for step in range(2)], learning_rate=learning_rate)

    def _batch(self, step: int, *, seed: int) -> Examples:
        return batch_of(self._task.train, step, size=self._config.batch_size, seed=seed)

    def train(self, seed_run: SeedRun, read: Callable[[], Any]) -> Tuned:
        """Run the remaining steps; metrics, figure, journal and checkpoints go to the folder.

        Args:
            seed_run: its seed gives the key and the batches.
            read: returns the initial parameters, which the run consumes.

        Raises:
            ValueError: the folder has a run with other settings, or damaged files.
        """
        config, seed, folder = self._config, seed_run.seed, seed_run.folder
        _refuse_private_checkpoints(folder)
        params = read()
        if config.model and config.dtype == "bfloat16":
            warn_of_spacing(params, self._recipe.plan_of(params, self._batch_shapes), self._recipe.sigma)
        tuner, initial = self.start(params, key=jax.random.key(seed))
        del params
        checks = Checks(steps=self.steps, checks=config.checks)
        signs = len(zo.ESTIMATORS[self._recipe.estimator].signs)
        progress = Progress(
            self._score_validation,
            checks,
            learning_rate=constant_rate(self._recipe),
            signs=signs,
            forwards=self.forwards,
        )
        durable = DurableRun(
            folder,
            tuner,
            initial,
            config=config.identity(stored_settings(folder)),
            carried=progress,
            checkpoint_every=config.checkpoint_every,
            accept_change=config.accept_change,
            recipe=seed_run.recipe,
            lock=seed_run.lock,
        )
        del initial
        with contextlib.closing(durable):
            keep_task(config, folder)
            state = durable.state
            done = int(state.generation)
            if config.guidance and not done:
                progress.suggested = self.guide(state, seed=seed).learning_rate
            progress.begin(seconds_spent(folder))
            state, _ = train(
                tuner,
                state,
                lambda step: self._batch(step, seed=seed),
                generations=max(0, self.steps - done),
                budget=("steps", self.steps),
                callbacks=[progress],
                run_folder=folder,
                durable=durable,
                words=progress.words,
                plot=_draw_fitness,
            )
            seconds, steps = progress.seconds, int(state.generation)
            ended = why_ended(config, steps, forwards=self.forwards, seconds=seconds)
        history = read_records(folder)  # before it was continued, too
        speed = rate([record.seconds for record in history], forwards=self.forwards)
        advice, skipped = advise(history, tuner.plan(state)), progress.skipped
        tuned = local(tuner.parameters(state))
        return Tuned(tuned, steps, steps * self.forwards, skipped, speed, seconds, ended, advice)

    def rebuild(self, read: Callable[[], Any], step: int, *, key: Array, folder: Path) -> Any:
        """Return the parameters of a run after a step, from the last checkpoint before it and the journal.

        Raises:
            ValueError: the folder has another run, or lost what lies between.
        """
        tuner, state = self.start(read(), key=key)
        checkpoints = Checkpoints(folder / "checkpoints", config=None)
        with contextlib.closing(checkpoints):
            earlier = max((saved for saved in checkpoints.generations if saved <= step), default=0)
            if earlier:
                restored = checkpoints.restore(state, np.zeros(1, np.int64), generation=earlier)
                state = state if restored is None else restored[0]
        state = replay(tuner, state, iter(Reader(folder / "journal.bin", tolerant=True)), until=step)
        return local(tuner.parameters(state))

    def judge(self, params: Any) -> Callable[[Examples], tuple[Any, Any]]:
        """Return the function from a batch to mean loss and accuracy of whole parameters, on the device as in training."""
        if not self._config.offload:
            return functools.partial(self._judge, params)
        return functools.partial(self._judge_by_block, self._tuner.init(params, key=jax.random.key(0)))

    def _score_validation(self, state: Any) -> Score:
        if self._config.offload:
            return score(functools.partial(self._judge_by_block, state), self._task.validation)
        return score(self.judge(local(state.params)), self._task.validation)

    def _judge_by_block(self, state: Any, batch: Examples) -> tuple[Any, Any]:
        parts = self._data_parts  # means stay what they are where every example is there as often as any other
        batch = Examples(*(np.repeat(array, parts // math.gcd(len(array), parts), axis=0) for array in batch))
        loss, wrong = (judge.loss(state, batch, key=state.key) for judge in self._judges)
        return loss, 1 - float(wrong)


def _draw_fitness(history: Sequence[Record], folder: Path) -> None:
    """Draw minus the loss and the validation scores; the other numbers of a step have other scales."""
    shown = [{name: value for name, value in record.extra.items() if name.startswith("validation")} for record in history]
    plot_history(
        [dataclasses.replace(record, extra=extra) for record, extra in zip(history, shown, strict=True)], folder / "fitness.png"
    )


def stored_settings(folder: Path) -> dict[str, Any]:
    """Return the settings that identify the run in a folder; none where there is no run, or its file is damaged."""
    try:
        return read_object(folder / "checkpoints" / "config.json")
    except (FileNotFoundError, Damaged):
        return {}


def _refuse_private_checkpoints(folder: Path) -> None:
    """Raise ValueError where the folder has an offloaded run of version 0.1, whose checkpoints had a format of their own."""
    if (folder / "checkpoints" / "settings.json").exists():
        raise ValueError(
            f"{folder} has an offloaded run of version 0.1, which kept no journal and cannot be resumed; choose another folder."
        )
