"""Training a `Task` with evolution strategies: low-rank (eggroll) or dense (openes) noise through the same engine."""

import contextlib
import math
import statistics
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

import eggroll
from eggroll import envs
from eggroll.devices.processes import local
from eggroll.experiments.common.mesh import parse_mesh
from eggroll.experiments.common.seeds import SeedRun
from eggroll.experiments.rl.config import Config
from eggroll.experiments.rl.problem import Evaluation, HeldOutChecks, Keys, Task, Trained, seed_keys
from eggroll.experiments.rl.report import draw
from eggroll.runs.diagnosis import advise
from eggroll.runs.durable import DurableRun
from eggroll.runs.training import Record, train

MANY_EPISODES = 4096  # fewer are not worth the two compilations that measure their memory


def make_strategy(config: Config, task: Task) -> eggroll.EvolutionStrategy:
    """Make the strategy; its batch is the observation statistics, its aux the sums that update them."""

    def fitness(params: Any, known: envs.ObservationStatistics, key: Array) -> tuple[Array, envs.ObservationSums]:
        played = task.play(params, known, key, episodes=config.episodes)
        return played.total_reward.mean(), jax.tree.map(lambda x: x.sum(axis=0), played.sums)

    many = config.population_size * config.episodes >= MANY_EPISODES
    return eggroll.EvolutionStrategy(
        fitness,
        population_size=config.population_size,
        sigma=config.sigma if config.sigma_decay == 1 else optax.exponential_decay(config.sigma, 1, config.sigma_decay),
        optimizer=make_optimizer(config),
        perturbation=eggroll.Dense() if config.algorithm == "openes" else eggroll.LowRank(rank=config.rank),
        shaping=config.shaping,
        chunk_size=config.chunk_size,
        memory_budget="device" if many and config.chunk_size is None else None,
        aux="sum",
        mesh=parse_mesh(config.mesh),
    )


def make_optimizer(config: Config) -> optax.GradientTransformation:
    """Make the optimizer; the step size of sgd is in the paper's scale, which follows sigma."""
    if config.optimizer != "sgd":
        rate, decay = config.learning_rate, config.learning_rate_decay
        return {"adam": optax.adam, "adamw": optax.adamw}[config.optimizer](_decaying(rate, decay))
    rate = eggroll.paper_learning_rate(config.learning_rate, sigma=config.sigma, population_size=config.population_size)
    return optax.sgd(_decaying(rate, config.learning_rate_decay * config.sigma_decay**2))


def _decaying(rate: float, decay: float) -> Any:
    return rate if decay == 1 else optax.exponential_decay(rate, 1, decay)


def next_statistics(known: envs.ObservationStatistics, metrics: eggroll.Metrics) -> envs.ObservationStatistics:
    """Return the batch of the next generation: the statistics of all observations before it."""
    return envs.merge(known, metrics.aux)


class _Progress:
    """The training loop's `on_record` and callback: keeps the observation statistics, counts, checks the parameters.

    A run saves it with its state (`eggroll.runs.durable.Carried`).

    Args:
        task: that is trained.
        checks: of the unperturbed parameters.
        most_steps: environment steps that a generation can have.
    """

    def __init__(self, task: Task, checks: HeldOutChecks, *, most_steps: int):
        self.statistics = envs.initial_statistics(task.environment.observation_shape)
        self.env_steps, self.invalid = 0, 0
        self.checks, self._most_steps = checks, most_steps

    def on_record(self, record: Record) -> None:
        """Keep what follows a generation, and count."""
        self.statistics = record.batch
        self.env_steps += int(record.aux.number)
        self.invalid += record.invalid
        record.extra["env_steps"] = self.env_steps

    def quiet(self) -> int:
        """Return how many generations may run before a check can be due after the last of them."""
        return max(1, math.ceil(self.checks.steps_to_next(self.env_steps) / self._most_steps))

    def __call__(self, state: eggroll.ESState, record: Record) -> bool:
        """Check the parameters if that is due; return whether the target is met."""
        record.extra.update(self.checks(local(state.params), self.statistics, env_steps=self.env_steps))
        return self.checks.met

    def save(self) -> dict[str, Any]:
        """Return the progress as arrays."""
        checks = self.checks
        counts = np.array([self.env_steps, self.invalid, checks.done, checks.met, checks.best_env_steps], np.int64)
        return {"counts": counts, "best": np.float64(checks.best), "statistics": jax.device_get(self.statistics._asdict())}

    def load(self, saved: Any) -> None:
        """Restore what `save` returned."""
        checks = self.checks
        self.env_steps, self.invalid, checks.done, met, checks.best_env_steps = (int(count) for count in saved["counts"])
        checks.met, checks.best = bool(met), float(saved["best"])
        self.statistics = envs.ObservationStatistics(**jax.tree.map(jnp.asarray, saved["statistics"]))


class Evolution:
    """Trains a task; compiled once, run with any number of keys."""

    def __init__(self, config: Config, task: Task, evaluation: Evaluation):
        self._config, self._task, self._evaluation = config, task, evaluation
        self._es = make_strategy(config, task)

    def start(self, keys: Keys) -> tuple[eggroll.EvolutionStrategy, eggroll.ESState]:
        """Return the strategy, with its plan, and the initial state."""
        state = self._es.init(self._task.init_params(key=keys.init), key=keys.training)
        self._es.plan(state, envs.initial_statistics(self._task.environment.observation_shape))
        return self._es, state

    def train(self, seed_run: SeedRun, *, random_return: float | None = None) -> Trained:
        """Run the generations, resuming the run in the folder if so configured; all files of the run go to the folder.

        Args:
            seed_run: seed, folder and recipe.
            random_return: of random actions, a line in the figure.

        Raises:
            ValueError: the folder has a run with other settings, or damaged files.
        """
        config, keys, folder = self._config, seed_keys(seed_run.seed), seed_run.folder
        es, initial = self.start(keys)
        every = config.env_steps / config.checks
        checks = HeldOutChecks(self._evaluation, folder, key=keys.checks, every=every, target=config.known_target)
        most_steps = config.population_size * config.episodes * self._task.environment.max_steps
        progress = _Progress(self._task, checks, most_steps=most_steps)
        run = DurableRun(
            folder,
            es,
            initial,
            config=config.options(),
            carried=progress,
            checkpoint_every=config.checkpoint_every,
            accept_change=config.accept_change,
            recipe=seed_run.recipe,
        )
        with contextlib.closing(run):
            state, done = run.state, int(run.state.generation)
            history: list[Record] = []
            if progress.env_steps < config.env_steps and not checks.met and done != config.generations:
                state, history = train(
                    es,
                    state,
                    progress.statistics,
                    generations=None if config.generations is None else config.generations - done,
                    budget=("env_steps", config.env_steps),
                    callbacks=[progress],
                    on_device=config.on_device if es.mesh is None else 1,
                    next_batch=next_statistics,
                    on_record=progress.on_record,
                    quiet=progress.quiet,
                    run_folder=folder,
                    durable=run,
                    plot=lambda history, path: draw(path, random_return=random_return),
                )
        return Trained(
            local(state.params),
            progress.statistics,
            generations=int(state.generation),
            generation_seconds=statistics.median(record.seconds for record in history) if history else 0.0,
            env_steps=progress.env_steps,
            invalid=progress.invalid,
            checks=checks,
            advice=advise(history, es.plan(state)),
        )
