"""EGGROLL on verifiable rewards: every member answers problems under its own perturbation; its rewards are its fitness.

    fitness [N, prompts] = reward of the completions of member i to the problems of its group        `eggroll.External`

Completions are decoded for all members together (`eggroll.llm.decoding`); texts are scored on the host.
"""

import contextlib
import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

import eggroll
from eggroll.devices.processes import broadcast_from_first, is_first, local
from eggroll.envs import tasks
from eggroll.experiments.common.mesh import parse_mesh
from eggroll.experiments.common.seeds import SeedRun
from eggroll.experiments.reason.config import Config
from eggroll.experiments.reason.figure import draw
from eggroll.experiments.reason.measure.unperturbed import GROUPS, Compared, compare
from eggroll.experiments.reason.problem import Problem, Sampling, key_data
from eggroll.experiments.reason.progress import Improved, Progress, Report, why_ended
from eggroll.journal import JournalError, Reader, replay
from eggroll.journal.stored import describe
from eggroll.llm.decoding import Completions
from eggroll.llm.int8 import INTEGERS, SCALE, optimizer_labels
from eggroll.noise.rules import check_params
from eggroll.population.moves import move_as_integers
from eggroll.runs.diagnosis import advise
from eggroll.runs.durable import DurableRun
from eggroll.runs.record import read_records
from eggroll.runs.training import train
from eggroll.settings import check_precision
from eggroll.update.shaping import Shaping

logger = logging.getLogger(__name__)


class Questions(NamedTuple):
    """The problems of a generation."""

    inputs: Any  # (Prompts, key data), with a leading axis of groups if there are several
    rows: list[list[tasks.Row]]  # [groups][prompts * samples], the problem of every row of the prompts


class Evolution:
    """Evolution strategies on a problem; compiled once, run with any number of seeds."""

    def __init__(self, config: Config, problem: Problem, sampling: Sampling):
        self._config, self._problem, self._sampling = config, problem, sampling
        rows = problem.task.split("train")
        seeds, count = range(config.seed, config.seed + config.seeds), config.prompts * config.groups
        self._batches = {seed: tasks.Batches(rows, batch_size=count, seed=seed) for seed in seeds}
        complete, every = jax.jit(move_as_integers(self._answer_unperturbed)), config.check_every
        self.strategy = Compared(make_strategy(config), self._answer, self._score, complete=complete, every=every)
        self._await_checkpoint: Callable[[], None] = lambda: None
        self._has_warned = False

    def _answer(self, params: Any, inputs: Any) -> Completions:
        prompts, key = inputs
        return self._problem.complete(params, prompts, key, sampling=self._sampling)

    def _answer_unperturbed(self, params: Any, inputs: Any) -> Completions:
        """Answer the problems of the first groups without noise: leading axis of groups."""
        if self._config.groups == 1:
            return jax.tree.map(lambda array: array[None], self._answer(params, inputs))
        return jax.vmap(self._answer, in_axes=(None, 0))(params, jax.tree.map(lambda array: array[:GROUPS], inputs))

    def questions(self, generation: int, *, seed: int) -> Questions:
        """Return the problems of a generation, a pure function of generation and seed."""
        config, rows = self._config, self._batches[seed](generation)
        size, samples = config.prompts, config.samples
        groups = [rows[first : first + size] for first in range(0, len(rows), size)]
        prompts = self._problem.prompts(rows, samples=samples)
        keys = np.stack([key_data(seed, generation, index) for index in range(len(groups))])
        asked = [[row for row in group for _ in range(samples)] for group in groups]
        if config.groups == 1:
            return Questions((prompts, keys[0]), asked)
        return Questions((jax.tree.map(lambda array: array.reshape(len(groups), size * samples, -1), prompts), keys), asked)

    def _score(
        self, outputs: Completions, rows: list[list[tasks.Row]], unperturbed: Completions | None = None
    ) -> tuple[np.ndarray, Report]:
        self._await_checkpoint()  # it holds the state that it writes, which the update replaces
        config, members = self._config, len(outputs.length)
        group_size = members // len(rows)
        asked = [row for member in range(members) for row in rows[member // group_size]]
        count = 0 if unperturbed is None else len(unperturbed.tokens)
        own = [row for group in rows[:count] for row in group]
        given = outputs if unperturbed is None else Completions(*map(np.concatenate, zip(outputs, unperturbed, strict=True)))
        texts, scores, rest = self._problem.score_beside([*asked, *own], given, count=len(asked))
        self._warn(scores.values)
        fitness, comparison = self._fitness(scores, groups=len(rows)), None
        if count:
            own_fitness = self._fitness(rest, groups=count)
            comparison = compare(texts[: len(asked)], texts[len(asked) :], fitness=fitness, own=own_fitness, groups=len(rows))
        chosen = np.linspace(0, len(asked) - 1, config.examples).astype(int).tolist() if config.examples else []
        examples = [(asked[i].prompt, texts[i], float(scores.values[i])) for i in chosen]
        return fitness, Report(int(outputs.length.sum()), float(outputs.ended.mean()), scores, examples, {}, comparison)

    def _warn(self, scores: np.ndarray) -> None:
        """Warn once if pass@k ignores all differences between scores."""
        low, high = scores.min(), scores.max()
        if self._config.pass_k is not None and low < high < 1 and not self._has_warned:
            self._has_warned = True
            words = f"scores are between {low:g} and {high:g}, but pass_k counts only those of at least 1 as right"
            warnings.warn(f"{words}, so every fitness is 0; change the reward, or leave out pass_k.", stacklevel=3)

    def _fitness(self, scores: tasks.Scores, *, groups: int) -> np.ndarray:
        """Return the fitness of members for every problem of their group [N, prompts]."""
        values = scores.values.reshape(-1, self._config.prompts, self._config.samples)
        return values.mean(axis=2) if self._config.pass_k is None else self._pass_at_k(values, scores, groups=groups)

    def _pass_at_k(self, values: np.ndarray, scores: tasks.Scores, *, groups: int) -> np.ndarray:
        """Return pass@k [N, prompts]; with too few scores for it, a member takes the mean of its group for the problem."""
        k: Any = self._config.pass_k
        estimates = tasks.pass_at_k(values >= 1, k=k, has_score=scores.has_score.reshape(values.shape))
        members, prompts = estimates.shape
        problems = np.repeat(np.arange(groups * prompts).reshape(groups, prompts), members // groups, axis=0)
        return tasks.fill_with_mean(estimates.reshape(-1), problems.reshape(-1).tolist()).reshape(members, prompts)

    def check(self, params: Any) -> None:
        """Raise ValueError where rules or precision do not fit the parameters, or not even one pair the budget of memory."""
        es: Any = self.strategy.es
        check_params(params, es.perturbation)
        check_precision(es.precision, params, es.perturbation)
        state, inputs = jax.eval_shape(es.init, params, key=jax.random.key(0)), self.questions(0, seed=self._config.seed).inputs
        es.plan(state, inputs, function=self.strategy.function)
        es.chunked_layout(state, inputs, function=self.strategy.function)  # kept for the generations

    def start(self, *, seed: int) -> eggroll.ESState:
        """Return the initial state, and make the plan of the strategy."""
        state = self.strategy.init(self._problem.params, key=jax.random.key(seed), donate=True)
        self.strategy.plan(state, self.questions(0, seed=seed))
        return state

    def train(self, seed_run: SeedRun, *, progress: Progress) -> Improved:
        """Run the generations, or continue the run in the folder; metrics, figure, journal and checkpoints are written there.

        Returns:
            The parameters with the best validation accuracy, those at the start among them.

        Raises:
            ValueError: the folder has a run with other settings, or damaged files.
        """
        config, seed, folder = self._config, seed_run.seed, seed_run.folder
        es: Any = self.strategy  # implements what the loop and the journal need of a strategy
        durable = DurableRun(
            folder,
            es,
            self.start(seed=seed),
            config=config.options() | {"seed": seed, "contents": None},  # these are in the recipe, and checked before
            carried=progress,
            checkpoint_every=config.check_every,
            accept_change=config.accept_change,
            recipe=seed_run.recipe,
            lock=seed_run.lock,
        )
        with contextlib.closing(durable) as run:
            if jax.process_count() == 1:  # otherwise only the first process scores
                self._await_checkpoint = run.checkpoints.wait
            state = run.state
            progress.resume(state)
            left = None if config.generations is None else max(0, config.generations - int(state.generation))
            state, _ = train(
                es,
                state,
                lambda generation: self.questions(generation, seed=seed),
                generations=left if progress.seconds < config.time_limit else 0,
                budget=config.budget,
                callbacks=[progress],
                run_folder=folder,
                durable=run,
                words=progress.words,
                plot=lambda history, path: draw(path),
            )
            run.checkpoints.wait()
            ended = why_ended(config, int(state.generation), seconds=progress.seconds)
            run.check()
            progress.finish(state, folder)
            best = int(broadcast_from_first(lambda: np.asarray(progress.best_generation)))
            generations, last, like = int(state.generation), state.params, describe(state)
            del state  # before the best one is rebuilt
            found = None if best == generations else self._best(best, like, run, folder, seed=seed, progress=progress)
        return Improved(
            local(last if found is None else found), generations, ended, advise(read_records(folder), es.plan(like))
        )

    def _best(self, best: int, like: eggroll.ESState, run: DurableRun, folder: Path, *, seed: int, progress: Progress) -> Any:
        """Return the parameters of the best generation, which is not the last one; None if they are lost."""
        if is_first():
            print(f"generation {best}{'' if best else ', the start,'} had the best validation accuracy: it is kept", flush=True)
        if not best:
            return self._problem.params
        rebuilt = self._rebuild(best, like, run, folder, seed=seed, progress=progress)
        return None if rebuilt is None else rebuilt.params

    def _rebuild(
        self, generation: int, like: eggroll.ESState, run: DurableRun, folder: Path, *, seed: int, progress: Progress
    ) -> eggroll.ESState | None:
        """Return the state of a generation from a sound checkpoint and the journal, because its own may be lost or damaged.

        None, with a warning: the journal has lost what lies between.
        """
        state: eggroll.ESState | None = None
        for saved in reversed([saved for saved in run.checkpoints.generations if saved <= generation]):
            try:
                restored = run.checkpoints.restore(like, progress.save(), generation=saved)
            except ValueError as error:
                logger.warning("%s; an earlier one is used.", error)
                continue
            assert restored is not None
            state = restored[0]
            break
        state = self.start(seed=seed) if state is None else state
        es: Any = self.strategy
        try:
            return replay(es, state, iter(Reader(folder / "journal.bin", tolerant=True)), until=generation)
        except JournalError as error:
            logger.warning("the best parameters, of generation %d, are lost, and the last ones kept: %s", generation, error)
            return None


def make_strategy(config: Config) -> eggroll.EvolutionStrategy:
    """Make the strategy that `config` describes."""
    shaping: str | Shaping = config.shaping
    if shaping == "group_relative" and config.group is not None:
        shaping = _shape_within_groups(config.group)
    return eggroll.EvolutionStrategy(
        None,
        population_size=config.population_size,
        sigma=config.sigma,
        optimizer=make_optimizer(config),
        perturbation=_perturbation(config),
        shaping=shaping,
        precision=eggroll.Feedback(config.int8.window) if config.precision == "feedback" else config.precision,
        noise_reuse=config.noise_reuse,
        members_per_batch=config.group if config.groups > 1 else None,
        chunk_size=config.chunk_size,
        memory_budget=config.memory_budget,
        mesh=parse_mesh(config.mesh),
    )


def _perturbation(config: Config) -> list[tuple[str, Any]]:
    """Return the rules of the noise; sigma of int8 matrices is in integers, and their scales stay fixed."""
    rules: list[tuple[str, Any]] = [(pattern, eggroll.Frozen()) for pattern in config.freeze]
    if config.weights == "int8":
        noise = eggroll.LowRank(config.rank, sigma_multiplier=config.int8.sigma / config.sigma)
        rules += [(f".*/{SCALE}", eggroll.Frozen()), (f".*/{INTEGERS}", noise)]
    return [*rules, (".*", eggroll.LowRank(config.rank))]


def _shape_within_groups(group: int) -> Shaping:
    def group_relative(fitness: jax.Array) -> jax.Array:
        return eggroll.group_relative(fitness, group_size=group)

    return group_relative


def make_optimizer(config: Config) -> optax.GradientTransformation:
    """Make the optimizer; sgd has the step size of the paper, which depends on sigma, and int8 matrices have their own."""
    rate, first = config.learning_rate, [optax.scale_by_adam()] if config.optimizer == "adam" else []
    if config.optimizer == "sgd":
        rate = eggroll.paper_learning_rate(rate, sigma=config.sigma, population_size=config.population_size)
    anchored = [eggroll.anchored_decay(config.anchor)] if config.anchor else []
    floats = optax.chain(*first, *anchored, optax.scale_by_learning_rate(rate))
    if config.weights != "int8":
        return floats
    rate, moments = config.int8.learning_rate, [optax.scale_by_adam()]
    if config.int8.optimizer == "sgd":
        sigma, moments = config.int8.sigma, []
        rate = eggroll.paper_learning_rate(rate / sigma, sigma=sigma, population_size=config.population_size)
    last = [*anchored, optax.scale_by_learning_rate(rate)]
    if config.int8.threshold is not None:
        last = [eggroll.standardised_sign(config.int8.threshold), optax.scale(-1.0)]
    integers = optax.chain(*moments, *last)
    return optax.multi_transform({INTEGERS: integers, "float": floats}, optimizer_labels)
