"""Training a `Task` with evolution strategies: low-rank (eggroll) or dense (openes) noise through the same engine."""

import contextlib
import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

import eggroll
from eggroll import envs
from eggroll.devices.processes import local
from eggroll.experiments.common.mesh import parse_mesh
from eggroll.experiments.common.options import flag
from eggroll.experiments.common.schedules import Rate, make_schedule
from eggroll.experiments.common.seeds import SeedRun
from eggroll.experiments.rl.config import WITH_END, Config
from eggroll.experiments.rl.problem import Evaluation, HeldOutChecks, Keys, Task, Trained, seed_keys
from eggroll.experiments.rl.report import draw, find_members_at_random
from eggroll.runs.diagnosis import RECENT, WARNED, advise, find_unusual
from eggroll.runs.durable import DurableRun
from eggroll.runs.record import Record, read_records
from eggroll.runs.training import train

Look = Callable[[Sequence[Record]], dict[str, str]]
MANY_EPISODES = 4096  # fewer are not worth the two compilations that measure their memory


class Aux(NamedTuple):
    """What a member returns in addition to its fitness."""

    sums: Any  # `envs.ObservationSums`; of the valid members
    steps: Any  # int32, of the environment; of every member, also of one whose fitness is not finite


def make_strategy(config: Config, task: Task) -> eggroll.EvolutionStrategy:
    """Make the strategy; its batch is the observation statistics, its aux the sums that update them, and the steps played."""

    def fitness(params: Any, known: envs.ObservationStatistics, key: Array) -> tuple[Array, Aux]:
        played = task.play(params, known, key, episodes=config.episodes)
        return played.total_reward.mean(), Aux(jax.tree.map(lambda x: x.sum(axis=0), played.sums), played.steps.sum())

    many = config.population_size * config.episodes >= MANY_EPISODES
    sigma, rate = make_schedules(config, task)
    return eggroll.EvolutionStrategy(
        fitness,
        population_size=config.population_size,
        sigma=sigma,
        optimizer=make_optimizer(config, sigma, rate),
        perturbation=eggroll.Dense() if config.algorithm == "openes" else eggroll.LowRank(rank=config.rank),
        shaping=config.shaping,
        noise_reuse=config.noise_reuse,
        chunk_size=config.chunk_size,
        memory_budget="device" if many and config.chunk_size is None else None,
        aux=Aux("sum", "all"),
        mesh=parse_mesh(config.mesh, axes=("population",)),
    )


def steps_of_generation(config: Config, task: Task) -> int:
    """Return the environment steps of a generation in which no episode ends early."""
    return config.population_size * config.episodes * task.environment.max_steps


def planned_generations(config: Config, task: Task) -> int:
    """Return the number of generations after which schedules end; where episodes end early, env_steps may allow more."""
    return config.generations or math.ceil(config.env_steps / steps_of_generation(config, task))


def make_schedules(config: Config, task: Task) -> tuple[Rate, Rate]:
    """Make sigma and the step size: numbers, or functions of the generation.

    Raises:
        ValueError: a schedule has an end, and the run has only one generation.
    """
    generations, made = planned_generations(config, task), []
    for name in ("sigma", "learning_rate"):
        kind, decay, end = (getattr(config, f"{name}_{part}") for part in ("schedule", "decay", "end"))
        if kind in WITH_END and generations < 2:
            steps = f"--env-steps {config.env_steps:,}: a generation has up to {steps_of_generation(config, task):,}"
            limit = f"--generations {config.generations}" if config.generations else steps
            raise ValueError(f"{flag(f'{name}_schedule')} {kind} needs at least 2 generations; raise {limit}.")
        made.append(make_schedule(kind, getattr(config, name), decay=decay, end=end, generations=generations))
    return made[0], made[1]


def make_optimizer(config: Config, sigma: Rate, rate: Rate) -> optax.GradientTransformation:
    """Make the optimizer; the step size of sgd is in the paper's scale, which follows sigma."""
    if config.optimizer != "sgd":
        return {"adam": optax.adam, "adamw": optax.adamw}[config.optimizer](rate)

    def paper_rate(generation: Any) -> Any:
        now, width = (value(generation) if callable(value) else value for value in (rate, sigma))
        return eggroll.paper_learning_rate(now, sigma=width, population_size=config.population_size)

    return optax.sgd(paper_rate if callable(rate) or callable(sigma) else paper_rate(0))


def next_statistics(known: envs.ObservationStatistics, metrics: eggroll.Metrics) -> envs.ObservationStatistics:
    """Return the batch of the next generation: the statistics of all observations before it."""
    return envs.merge(known, metrics.aux.sums)


class _Progress:
    """The training loop's `on_record` and callback: keeps the observation statistics, counts, checks the parameters.

    A run saves it with its state (`eggroll.runs.carried.Carried`).

    Args:
        task: that is trained.
        checks: of the unperturbed parameters.
        look: returns what is unusual in the first record and the last ones.
        most_steps: environment steps that a generation can have.
    """

    def __init__(self, task: Task, checks: HeldOutChecks, *, look: Look, most_steps: int):
        self.statistics = envs.initial_statistics(task.environment.observation_shape)
        self.env_steps, self.invalid = 0, 0
        self.checks, self._look, self._most_steps = checks, look, most_steps
        self._records: list[Record] = []  # the first one, and the last ones
        self._named = {*WARNED}

    def remember(self, records: Sequence[Record]) -> None:
        """Keep records that `look` needs: of the run before it was resumed, or the next one."""
        records = [*self._records, *records]
        self._records = [*records[:1], *records[1:][-RECENT:]]

    def on_record(self, record: Record) -> None:
        """Keep what follows a generation, and count."""
        self.statistics = record.batch
        self.env_steps += int(np.sum(record.aux.steps))
        self.invalid += record.invalid
        self.remember([record])
        record.extra["env_steps"] = self.env_steps

    def quiet(self) -> int:
        """Return how many generations may run before a check can be due after the last of them."""
        return max(1, math.ceil(self.checks.steps_to_next(self.env_steps) / self._most_steps))

    def __call__(self, state: eggroll.ESState, record: Record) -> bool:
        """Check the parameters if that is due; return whether the target is met."""
        found = self.checks(local(state.params), self.statistics, env_steps=self.env_steps)
        record.extra.update(found)
        if found:
            self._name_unusual(record.generation)
        return self.checks.met

    def _name_unusual(self, generation: int) -> None:
        """Print what is unusual and was not named before."""
        for name, words in self._look(self._records).items():
            if name not in self._named:
                self._named.add(name)
                print(f"generation {generation}: {words}", flush=True)

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
            random_return: of random actions, a line in the figure, which members should exceed.

        Raises:
            ValueError: the folder has a run with other settings, or damaged files.
        """
        config, keys, folder = self._config, seed_keys(seed_run.seed), seed_run.folder
        if {config.sigma_schedule, config.learning_rate_schedule} & {*WITH_END}:
            print(
                f"seed {seed_run.seed}: schedules end after {planned_generations(config, self._task):,} generations", flush=True
            )
        es, initial = self.start(keys)
        checks = HeldOutChecks(self._evaluation, folder, config, key=keys.checks)
        most_steps = steps_of_generation(config, self._task)
        plan = es.plan(initial)

        def look(history: Sequence[Record]) -> dict[str, str]:
            return find_unusual(history, plan) | find_members_at_random(history, random_return)

        progress = _Progress(self._task, checks, look=look, most_steps=most_steps)
        run = DurableRun(
            folder,
            es,
            initial,
            config=config.options(),
            carried=progress,
            checkpoint_every=config.checkpoint_every,
            accept_change=config.accept_change,
            recipe=seed_run.recipe,
            lock=seed_run.lock,
        )
        with contextlib.closing(run):
            state = run.state
            progress.remember([record for record in read_records(folder) if record.generation < int(state.generation)])
            left = None if config.generations is None else config.generations - int(state.generation)
            state, _ = train(
                es,
                state,
                progress.statistics,
                generations=0 if progress.env_steps >= config.env_steps or checks.met else left,
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
        history = read_records(folder)  # before a resume, too
        unusual = look(history)
        return Trained(
            local(state.params),
            progress.statistics,
            generations=int(state.generation),
            generation_seconds=statistics.median(record.seconds for record in history) if history else 0.0,
            env_steps=progress.env_steps,
            invalid=progress.invalid,
            checks=checks,
            unusual=tuple(unusual),
            advice=" ".join(unusual.values()) or advise(history, plan),
        )
