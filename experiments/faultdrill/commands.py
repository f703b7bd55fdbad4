"""The runs whose files are damaged: the drill's own net, and those of the commands, each in its smallest form.

    train = RUNS["rl"](scratch)          a folder for data and models
    train(folder, 13)                    begin the run in a folder, or resume it, and stop after generation 12
    train(folder, 15)                    -> the fingerprint of all that the run gives

What a command makes once is made once, so that a resume takes a fraction of a second.
"""

import contextlib
import dataclasses
import functools
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from eggroll.envs import tasks
from eggroll.experiments.common.seeds import SeedRun
from eggroll.experiments.egg import config as egg_config
from eggroll.experiments.egg import evolution as egg_evolution
from eggroll.experiments.egg import inputs as egg_inputs
from eggroll.experiments.faultdrill import training
from eggroll.experiments.reason import config as reason_config
from eggroll.experiments.reason import evolution as reason_evolution
from eggroll.experiments.reason import inputs as reason_inputs
from eggroll.experiments.reason.problem import Validation
from eggroll.experiments.reason.progress import Progress
from eggroll.experiments.rl import config as rl_config
from eggroll.experiments.rl import evolution as rl_evolution
from eggroll.experiments.rl import inputs as rl_inputs
from eggroll.experiments.rl.problem import Evaluation
from eggroll.experiments.zo import config as zo_config
from eggroll.experiments.zo import evolution as zo_evolution
from eggroll.experiments.zo import inputs as zo_inputs
from eggroll.journal.fingerprint import fingerprint
from eggroll.runs import training as loop
from eggroll.runs.record import Record
from eggroll.state import copy_state

EVERY, LAST = 4, 15  # generations between checkpoints, and in all
Train = Callable[[Path, int], str]


def net(scratch: Path) -> Train:
    """The drill's own network."""
    es, initial = training.make({})

    def train(folder: Path, generations: int) -> str:
        made = es, copy_state(initial)
        return training.work(folder, generations=generations, checkpoint_every=EVERY, made=made)

    return _quiet(train)


def rl(scratch: Path) -> Train:
    """`experiments.rl`: a policy, with statistics of its observations."""
    sizes = ("--population-size", "8", "--hidden-sizes", "4", "--max-steps", "60", "--generations", str(LAST))
    config = rl_config.parse([*sizes, "--env-steps", "1000000000", "--checkpoint-every", str(EVERY)])
    task = rl_inputs.load(config)
    evolution = rl_evolution.Evolution(config, task, Evaluation(task, episodes=1))

    def train(folder: Path, generations: int) -> str:
        with _stop_after(rl_evolution, generations):
            trained = evolution.train(_seed_run("rl", config, folder))
        return fingerprint((trained.params, tuple(trained.statistics), _numbers(trained.env_steps, trained.invalid)))

    return _quiet(train)


def egg(scratch: Path) -> Train:
    """`experiments.egg`: integers, and a state of every member, which only checkpoints have."""
    texts = scratch / "texts"
    texts.mkdir(parents=True)
    for number in range(3):
        (texts / f"{number}.txt").write_text(f"To err is human, to resume bit for bit, {number} times. " * 2000)
    sizes = ["--layers", "1", "--width", "8", "--population-size", "16", "--group", "8", "--bytes-per-update", "8"]
    sizes += ["--generations", str(LAST), "--validation-every", "100", "--sample-length", "0", "--checkpoint-every", str(EVERY)]
    config = egg_config.parse([*sizes, "--data", str(texts), "--cache", str(scratch / "corpus")])
    inputs = egg_inputs.load(config)
    make, validation = functools.cache(egg_evolution.make_strategy), egg_evolution.Validation(inputs.corpus, config)

    def train(folder: Path, generations: int) -> str:
        with (
            mock.patch.object(egg_evolution, "make_strategy", make),
            mock.patch.object(egg_evolution, "Validation", lambda *given: validation),
            _stop_after(egg_evolution, generations),
        ):
            trained = egg_evolution.pretrain(config, inputs, _seed_run("egg", config, folder))
        return fingerprint((trained.params, _numbers(trained.validation_bits, trained.generations)))

    return _quiet(train)


def zo(_: Path, *more: str) -> Train:
    """`experiments.zo`."""
    sizes = ["--start.steps", "0", "--start.width", "16", "--start.layers", "1", "--steps", str(LAST), "--batch-size", "4"]
    config = zo_config.parse([*sizes, "--checks", "1", "--max-length", "16", "--checkpoint-every", str(EVERY), *more])
    loaded = zo_inputs.load(config)
    evolution = zo_evolution.Evolution(config, loaded.task, loaded.task.judge())

    def train(folder: Path, generations: int) -> str:
        with _stop_after(zo_evolution, generations):
            tuned = evolution.train(_seed_run("zo", config, folder), loaded.read)
        return fingerprint((tuned.params, _numbers(tuned.steps, tuned.skipped)))

    return _quiet(train)


class _Timeless(Progress):
    """Progress of which no number depends on the clock."""

    def _count(self, record: Record, *, tokens: int, failures: int) -> None:
        super()._count(record, tokens=tokens, failures=failures)
        self.seconds = 0.0


def _variety(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """A reward that tells completions of a model that has learned nothing apart."""
    return [float(sum(text.encode()) % 97) for text in completions]


def reason(scratch: Path) -> Train:
    """`experiments.reason`: completions, whose rewards are built in."""
    sizes = ["--start.steps", "2", "--start.width", "16", "--start.layers", "1", "--start.batch-size", "4"]
    sizes += [
        "--population-size",
        "4",
        "--prompts",
        "2",
        "--max-new-tokens",
        "4",
        "--examples",
        "0",
        "--sigma",
        "0.3",
        "--validation-size",
        "4",
    ]
    sizes += ["--task-options", "train=40", "validation=8", "test=8", "--check-every", str(EVERY), "--generations", str(LAST)]
    config = reason_config.parse(sizes)
    inputs = reason_inputs.prepare(config)
    sampling = reason_inputs.make_sampling(config, inputs.tokenizer)
    problem = dataclasses.replace(reason_inputs.load(config, inputs), scorer=tasks.Scorer(_variety, workers=0))
    evolution = reason_evolution.Evolution(config, problem, sampling)
    validation = Validation(problem, "validation", size=config.validation_size, sampling=sampling)

    def train(folder: Path, generations: int) -> str:
        progress = _Timeless(validation, check_every=EVERY, examples=0)
        with _stop_after(reason_evolution, generations):
            improved = evolution.train(_seed_run("reason", config, folder), progress=progress)
        return fingerprint((improved.params, progress.save(), _numbers(improved.generations)))

    return _quiet(train)


RUNS: dict[str, Callable[[Path], Train]] = {
    "net": net,
    "rl": rl,
    "egg": egg,
    "zo": zo,
    "zo offloaded": lambda scratch: zo(scratch, "--offload"),
    "reason": reason,
}


def _seed_run(experiment: str, config: Any, folder: Path) -> SeedRun:
    options = config.settings() if experiment == "zo" else config.options()
    recipe = {"function": f"eggroll.experiments.{experiment}.__main__:remake", "options": options | {"seed": 0}}
    return SeedRun(0, folder, recipe)


def _stop_after(module: Any, generations: int) -> contextlib.AbstractContextManager[Any]:
    """Let the loop of a command stop early, as a kill would; options that say when it ends identify the run."""

    def train(es: Any, state: Any, batches: Any, **options: Any) -> Any:
        left = generations - int(state.generation)
        if left <= 0:
            return state, []
        return loop.train(es, state, batches, **(options | {"generations": left, "plot": training.draw_nothing}))

    return mock.patch.object(module, "train", train)


def _numbers(*values: float) -> Any:
    return np.array(values, np.float64)


def _quiet(train: Train) -> Train:
    def quiet(folder: Path, generations: int) -> str:
        with contextlib.redirect_stdout(io.StringIO()):
            return train(folder, generations)

    return quiet
