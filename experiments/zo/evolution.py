"""Zeroth-order runs of a fine-tuning task: with all of the model on the device, or with its blocks in the host's memory."""

import contextlib
import dataclasses
import functools
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import eggroll
from eggroll import zo
from eggroll.devices.processes import local
from eggroll.experiments.common.checkpoint import load_checkpoint, save_checkpoint
from eggroll.experiments.common.loop import Checks, Row, Tuned, rate, run_steps, timed
from eggroll.experiments.common.mesh import parse_mesh
from eggroll.experiments.common.run import write_json
from eggroll.experiments.zo.config import Config, arguments
from eggroll.experiments.zo.data.examples import Examples, batch_of
from eggroll.experiments.zo.figure import as_row
from eggroll.experiments.zo.problem import FineTuning, Score, score
from eggroll.runs.durable import DurableRun
from eggroll.runs.training import Record, train
from eggroll.zo.offload.streams import OffloadState

PER_EXAMPLE = "grzo"  # the recipe with a direction for every example of the batch
KEPT = 2  # checkpoints of an offloaded run


def make_tuner(config: Config, task: FineTuning) -> Any:
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
    refused = [name for name in given if name not in has]
    if refused:
        raise ValueError(f"recipe {config.recipe} has no {refused[0]}.")
    more: dict[str, Any] = {"chunk_directions": config.chunk_directions, "mesh": parse_mesh(config.mesh)}
    try:
        return zo.RECIPES[config.recipe](task.pieces(config.objective), **given, **config.given(), **more)
    except TypeError as error:
        raise ValueError(str(error)) from error


def forwards_of(tuner: Any) -> int:
    """Forwards of a step."""
    return zo.ESTIMATORS[tuner.estimator].forwards(tuner.directions)


def steps_of(config: Config, forwards: int) -> int:
    """Steps of a run whose steps take so many forwards.

    Raises:
        ValueError: the budget is less than one step.
    """
    if config.steps is None and config.forwards < forwards:
        raise ValueError(f"forwards {config.forwards} are fewer than the {forwards} of one step of {config.recipe}.")
    return config.steps or config.forwards // forwards


class _Progress:
    """Callback of the training loop: scores the unperturbed parameters, counts; what a run carries beside its state."""

    def __init__(self, task: FineTuning, judge: Any, checks: Checks):
        self.skipped = 0
        self._task, self._judge, self._checks = task, judge, checks

    def __call__(self, state: eggroll.ESState, record: Record) -> None:
        self.skipped += record.skipped
        if self._checks.due(record.generation + 1):
            params = local(state.params)
            record.extra.update(as_row(score(functools.partial(self._judge, params), self._task.validation)))

    def save(self) -> Any:
        """As an array."""
        return np.array([self.skipped], np.int64)

    def load(self, saved: Any) -> None:
        """From an array."""
        self.skipped = int(saved[0])


class Resident:
    """Tunes with all of the model on the device; compiled once, run with any number of keys."""

    def __init__(self, config: Config, task: FineTuning, judge: Any):
        self._config, self._task, self._judge = config, task, judge
        self._tuner = make_tuner(config, task)
        self.forwards = forwards_of(self._tuner)
        self.steps = steps_of(config, self.forwards)

    def start(self, params: Any, *, key: Array) -> tuple[Any, eggroll.ESState]:
        """Return the tuner, with its plan, and the initial state."""
        batch = batch_of(self._task.train, 0, size=self._config.batch_size)
        self._tuner.check_batch(batch)
        state = self._tuner.init(params, key=key, batch=batch)
        self._tuner.plan(state, batch)
        return self._tuner, state

    def train(self, params: Any, *, key: Array, seed: int, folder: Path, recipe: dict[str, Any]) -> Tuned:
        """Run the steps, from where the folder is; metrics, figure, journal and checkpoints go there.

        Raises:
            ValueError: the folder has a run with other settings, or files that are damaged.
        """
        config, task = self._config, self._task
        tuner, initial = self.start(params, key=key)
        progress = _Progress(task, self._judge, Checks(steps=self.steps, checks=config.checks))
        known: dict[str, Any] = dict(config=config.settings(), recipe=recipe, checkpoint_every=config.checkpoint_every)
        with contextlib.closing(DurableRun(folder, tuner, initial, carried=progress, **known)) as run:
            state, history = run.state, list[Record]()
            left = self.steps - int(state.generation)
            if left:
                batches = lambda step: batch_of(task.train, step, size=config.batch_size, seed=seed)  # noqa: E731
                how: dict[str, Any] = dict(generations=left, callbacks=[progress], run_folder=folder, durable=run)
                state, history = train(tuner, state, batches, **how)
        steps = int(state.generation)
        speed = rate([record.seconds for record in history], forwards=self.forwards)
        return Tuned(local(state.params), steps, steps * self.forwards, progress.skipped, speed)


class Offloaded:
    """Tunes with the blocks in the host's memory (`zo.Offload`).

    What is pending is applied before every check and every checkpoint, so a run that stopped goes on bit for bit. It has
    checkpoints, of the last two dates, and no journal.
    """

    def __init__(self, config: Config, task: FineTuning, judge: Any):
        self._config, self._task = config, task
        tuner = make_tuner(config, task)
        self._away = zo.Offload(tuner)
        # The same parameters, judged by another objective.
        loss, wrong = (dataclasses.replace(tuner, loss=task.pieces(objective)) for objective in ("loss", "accuracy"))
        self._judges = zo.Offload(loss), zo.Offload(wrong)
        self.forwards = forwards_of(tuner)
        self.steps = steps_of(config, self.forwards)

    def train(self, params: Any, *, key: Array, seed: int, folder: Path, recipe: dict[str, Any]) -> Tuned:
        """As `Resident.train`."""
        config, task, away = self._config, self._task, self._away
        checks = Checks(steps=self.steps, checks=config.checks)
        batches = lambda step: batch_of(task.train, step, size=config.batch_size, seed=seed)  # noqa: E731
        state, skipped = self._restored(folder, away.init(params, key=key))
        away.plan(state, batches(0))

        def step(number: int) -> Row:
            nonlocal state, skipped
            (state, metrics), seconds = timed(lambda: away.step(state, batches(number)))
            row: Row = {"loss": float(metrics.loss), "skipped": bool(metrics.skipped), "seconds": seconds}
            skipped += row["skipped"]
            due, kept = checks.due(number + 1), (number + 1) % config.checkpoint_every == 0
            if due or kept:
                state = away.flush(state)
            if due:
                row |= as_row(self._score(state, task.validation))
            if kept:
                self._save(folder, state, skipped)
            return row

        rows = run_steps(step, first=int(state.generation), steps=self.steps, folder=folder)
        state = away.flush(state)
        tuned = jax.tree.map(jnp.asarray, away.parameters(state))
        speed = rate([row["seconds"] for row in rows], forwards=self.forwards)
        return Tuned(tuned, self.steps, self.steps * self.forwards, skipped, speed)

    def _score(self, state: OffloadState, examples: Examples) -> Score:
        def judged(batch: Examples) -> tuple[Any, Any]:
            loss, wrong = (away.loss(state, batch, key=state.key) for away in self._judges)
            return loss, 1 - float(wrong)

        return score(judged, examples)

    def _save(self, folder: Path, state: OffloadState, skipped: int) -> None:
        dates = folder / "checkpoints"
        save_checkpoint(dates / str(int(state.generation)), self._kept(state, skipped))
        for old in _dates(dates)[:-KEPT]:
            shutil.rmtree(dates / str(old))

    def _restored(self, folder: Path, initial: OffloadState) -> tuple[OffloadState, int]:
        """The last checkpoint and the steps skipped until then, or the initial state.

        Raises:
            ValueError: the folder has a run with other settings.
        """
        dates, settings = folder / "checkpoints", self._config.settings()
        dates.mkdir(parents=True, exist_ok=True)
        known = dates / "settings.json"
        if known.exists():
            before = json.loads(known.read_text())
            names = [name for name in settings if settings[name] != before.get(name)]
            if names:
                raise ValueError(f"{folder} has a run with other settings: {', '.join(names)}.")
        write_json(known, settings)
        if not _dates(dates):
            return initial, 0
        kept = load_checkpoint(dates / str(_dates(dates)[-1]), self._kept(initial, 0))
        state = self._away.init(kept["params"], key=initial.key)
        moment, pending = type(state.moment)(**kept["moment"]), type(state.pending)(**kept["pending"])
        small = {"moment": moment, "pending": pending, "generation": kept["generation"]}
        return state._replace(**self._away.devices.everywhere(small)), int(kept["skipped"])

    def _kept(self, state: OffloadState, skipped: int) -> dict[str, Any]:
        small = {"moment": state.moment._asdict(), "pending": state.pending._asdict(), "generation": state.generation}
        return {"params": self._away.parameters(state), "skipped": np.array(skipped)} | small


def _dates(folder: Path) -> list[int]:
    """Steps that have a whole checkpoint, in order."""
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())
