"""EGGROLL on verifiable rewards: every member answers problems under its own perturbation, and its rewards are its fitness.

    fitness [N, prompts] = reward of the completions of member i to the problems of its group        `eggroll.External`

Completions are decoded for all members together (`experiments.decoding`); texts are scored on the host.
"""

import contextlib
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

import eggroll
from eggroll.devices.processes import broadcast_from_first, is_first, local
from eggroll.envs import tasks
from eggroll.experiments.common.mesh import parse_mesh
from eggroll.experiments.reason.config import Config
from eggroll.experiments.reason.figure import draw
from eggroll.experiments.reason.problem import Problem, Sampling, key_data
from eggroll.experiments.reason.progress import Improved, Progress
from eggroll.journal import Reader, replay
from eggroll.llm.decoding import Completions
from eggroll.runs.durable import DurableRun
from eggroll.runs.training import Record, train
from eggroll.update.shaping import Shaping


class Questions(NamedTuple):
    """What the members of a generation are asked."""

    inputs: Any  # (Prompts, key data), with a leading axis of groups where there are several
    rows: list[list[tasks.Row]]  # of every group, the problem of every row of its prompts


class Told(NamedTuple):
    """What a generation's completions told beside the fitness: aux of the metrics."""

    tokens: int
    ended: float
    scores: tasks.Scores
    examples: list[tuple[str, str, float]]


class Evolution:
    """Evolution of a problem's model; compiled once, run with any number of seeds."""

    def __init__(self, config: Config, problem: Problem, sampling: Sampling):
        self._config, self._problem, self._sampling = config, problem, sampling
        rows = problem.task.split("train")
        seeds, count = range(config.seed, config.seed + config.seeds), config.prompts * config.groups
        self._batches = {seed: tasks.Batches(rows, batch_size=count, seed=seed) for seed in seeds}
        self.strategy = eggroll.External(make_strategy(config), self._answer, self._score)

    def _answer(self, params: Any, inputs: Any) -> Completions:
        prompts, key = inputs
        return self._problem.complete(params, prompts, key, sampling=self._sampling)

    def questions(self, generation: int, *, seed: int) -> Questions:
        """The problems of a generation: a pure function of it and the seed."""
        config, rows = self._config, self._batches[seed](generation)
        size, samples = config.prompts, config.samples
        groups = [rows[first : first + size] for first in range(0, len(rows), size)]
        prompts = [self._problem.prompts(group, samples=samples) for group in groups]
        keys = [key_data(seed, generation, index) for index in range(len(groups))]
        asked = [[row for row in group for _ in range(samples)] for group in groups]
        if config.groups == 1:
            return Questions((prompts[0], keys[0]), asked)
        return Questions(jax.tree.map(lambda *parts: np.stack(parts), *zip(prompts, keys, strict=True)), asked)

    def _score(self, outputs: Completions, rows: list[list[tasks.Row]]) -> tuple[np.ndarray, Told]:
        config, members = self._config, len(outputs.length)
        each = members // len(rows)
        asked = [row for member in range(members) for row in rows[member // each]]
        judged = self._problem.judge(asked, outputs)
        values = judged.scores.values.reshape(members, config.prompts, config.samples)
        fitness = values.mean(axis=2) if config.pass_k is None else tasks.pass_at_k(values >= 1, k=config.pass_k)
        some: Any = np.linspace(0, len(asked) - 1, config.examples).astype(int) if config.examples else []
        shown = [(asked[i].prompt, judged.texts[i], float(judged.scores.values[i])) for i in some]
        return fitness, Told(int(outputs.length.sum()), float(outputs.ended.mean()), judged.scores, shown)

    def start(self, *, seed: int) -> eggroll.ESState:
        """Return the initial state; the strategy has its plan then."""
        state = self.strategy.init(self._problem.params, key=jax.random.key(seed))
        self.strategy.plan(state, self.questions(0, seed=seed))
        return state

    def train(self, *, seed: int, folder: Path, progress: Progress, recipe: dict[str, Any]) -> Improved:
        """Run the generations, from where the folder is if so configured; metrics, figure, journal, checkpoints go there.

        Returns:
            The parameters of the check with the best validation accuracy; without a check, the last ones.

        Raises:
            ValueError: the folder has a run with other settings, or files that are damaged.
        """
        config = self._config
        es: Any = self.strategy  # it has what the loop and the journal ask of a strategy
        initial = self.start(seed=seed)
        known: dict[str, Any] = dict(config=config.options() | {"seed": seed}, checkpoint_every=config.check_every)
        with contextlib.closing(DurableRun(folder, es, initial, carried=progress, recipe=recipe, **known)) as run:
            state, history = run.state, list[Record]()
            left = None if config.generations is None else max(0, config.generations - int(state.generation))
            if progress.seconds < config.seconds and left != 0:
                state, history = train(
                    es,
                    state,
                    lambda generation: self.questions(generation, seed=seed),
                    generations=left,
                    budget=("seconds_spent", config.seconds),
                    callbacks=[progress],
                    run_folder=folder,
                    durable=run,
                    words=progress.words,
                    plot=lambda history, path: draw(path),
                )
            run.checkpoints.wait()
            best = int(broadcast_from_first(lambda: np.asarray(progress.best_generation)))
            kept = self._rebuilt(best, run, folder, initial=initial, progress=progress) if best else state
        if is_first() and best:
            print(f"the parameters of generation {best} were the best on the validation problems", flush=True)
        return Improved(local(kept.params), int(state.generation))

    def _rebuilt(
        self, generation: int, run: DurableRun, folder: Path, *, initial: eggroll.ESState, progress: Progress
    ) -> eggroll.ESState:
        """The state of a generation; a kill may have lost its checkpoint, but the journal has it."""
        earlier = [known for known in run.checkpoints.generations if known <= generation]
        found = run.checkpoints.restore(initial, progress.save(), generation=earlier[-1]) if earlier else None
        es: Any = self.strategy
        return replay(es, found[0] if found else initial, iter(Reader(folder / "journal.bin")), until=generation)


def make_strategy(config: Config) -> eggroll.EvolutionStrategy:
    """Make the strategy that `config` describes."""
    options: dict[str, Any] = {"shaping": config.shaping, "precision": config.precision, "noise_reuse": config.noise_reuse}
    if config.shaping == "group_relative" and config.group is not None:
        options["shaping"] = _within(config.group)
    return eggroll.EvolutionStrategy(
        None,
        population_size=config.population_size,
        sigma=config.sigma,
        optimizer=make_optimizer(config),
        perturbation=config.perturbation,
        members_per_batch=config.group if config.groups > 1 else None,
        chunk_size=config.chunk_size,
        memory_budget=config.memory_budget,
        mesh=parse_mesh(config.mesh),
        **options,
    )


def _within(group: int) -> Shaping:
    def group_relative(fitness: jax.Array) -> jax.Array:
        return eggroll.group_relative(fitness, group_size=group)

    return group_relative


def make_optimizer(config: Config) -> optax.GradientTransformation:
    """Make the optimizer; the step size of sgd is in the paper's scale, which follows sigma. Int8 matrices have their own."""
    rate, first = config.learning_rate, [optax.scale_by_adam()] if config.optimizer == "adam" else []
    if config.optimizer == "sgd":
        rate = eggroll.paper_learning_rate(rate, sigma=config.sigma, population_size=config.population_size)
    anchored = [eggroll.anchored_decay(config.anchor)] if config.anchor else []
    floats = optax.chain(*first, *anchored, optax.scale_by_learning_rate(rate))
    return config.int8.optimizer(floats) if config.weights == "int8" else floats
