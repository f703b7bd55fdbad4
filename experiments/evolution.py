"""Training a `Task` with evolution strategies: low-rank (eggroll) or dense (openes) noise through the same engine."""

from pathlib import Path
from typing import Any

import jax
import optax
from jax import Array

import eggroll
import envs
from eggroll.training import Record, train
from experiments.rl_config import Config
from experiments.task import Evaluation, Task


def make_strategy(config: Config, task: Task) -> eggroll.EvolutionStrategy:
    """Make the strategy; its batch is the observation statistics, its aux the sums that update them."""

    def fitness(params: Any, statistics: envs.ObservationStatistics, key: Array) -> tuple[Array, envs.ObservationSums]:
        played = task.play(params, statistics, key, episodes=config.episodes, sampled=task.sampled)
        return played.total_reward.mean(), jax.tree.map(lambda x: x.sum(axis=0), played.sums)

    return eggroll.EvolutionStrategy(
        fitness,
        population_size=config.population_size,
        sigma=config.sigma if config.sigma_decay == 1 else optax.exponential_decay(config.sigma, 1, config.sigma_decay),
        optimizer=make_optimizer(config),
        perturbation=eggroll.Dense() if config.algorithm == "openes" else eggroll.LowRank(rank=config.rank),
        shaping=config.shaping,
        chunk_size=config.chunk_size,
        aux="sum",
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


class HeldOutCheck:
    """Callback of the training loop: keeps the observation statistics, counts steps, checks the unperturbed parameters."""

    def __init__(self, config: Config, task: Task, evaluation: Evaluation, *, key: Array):
        self.statistics = envs.initial_statistics(task.environment.observation_shape)
        self.env_steps = 0
        self._config, self._evaluation, self._key = config, evaluation, key

    def batch(self, generation: int) -> envs.ObservationStatistics:
        """The batch of a generation: statistics of all generations before it."""
        return self.statistics

    def __call__(self, state: eggroll.ESState, record: Record) -> bool:
        """Merge the generation's sums; every few generations, tell whether the target is met on held-out episodes."""
        self.statistics = envs.merge(self.statistics, record.aux)
        self.env_steps += int(record.aux.number)
        record.extra["env_steps"] = self.env_steps
        spent = self._config.env_steps is not None and self.env_steps >= self._config.env_steps
        if (record.generation + 1) % self._config.check_every:
            return spent
        key = jax.random.fold_in(self._key, record.generation)
        mean_return = self._evaluation.mean_return(state.params, self.statistics, key=key)
        record.extra["held_out_return"] = mean_return
        target = self._config.known_target
        return spent or (target is not None and mean_return >= target)


class Evolution:
    """Trains a task; compiled once, run with any number of keys."""

    def __init__(self, config: Config, task: Task, evaluation: Evaluation):
        self._config, self._task, self._evaluation = config, task, evaluation
        self._es = make_strategy(config, task)

    def train(self, *, init_key: Array, run_key: Array, check_key: Array, folder: Path) -> dict[str, Any]:
        """Run the generations; metrics and figure go to `folder`.

        Returns:
            params, statistics, generations and env_steps.
        """
        check = HeldOutCheck(self._config, self._task, self._evaluation, key=check_key)
        state = self._es.init(self._task.init_params(key=init_key), key=run_key)
        generations = self._config.generations
        state, history = train(self._es, state, check.batch, generations=generations, callbacks=[check], run_folder=folder)
        return {
            "params": state.params,
            "statistics": check.statistics,
            "generations": len(history),
            "env_steps": check.env_steps,
        }
