"""Evolve a policy on a gymnax environment: `python -m experiments.rl --help`.

A plain Flax network is the policy, `eggroll.EvolutionStrategy` trains it without backpropagation, and the last line of standard
output is a JSON object with the mean return of the trained parameters over fresh episodes. Artefacts go to one run folder.
"""

import dataclasses
import functools
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import tyro
from jax import Array

import eggroll
import envs
from eggroll.training import Record, train
from experiments.common.checkpoint import save_checkpoint
from experiments.common.run import print_summary, run_folder
from experiments.models.mlp import MLP

TARGETS = {"CartPole-v1": 495.0, "Acrobot-v1": -85.0, "Pendulum-v1": -180.0}


@dataclasses.dataclass(frozen=True)
class Config:
    """Evolve a policy on a gymnax environment with low-rank evolution strategies."""

    env: str = "CartPole-v1"
    """Name of a gymnax environment."""
    seed: int = 0
    """Seed of the whole run; the same seed gives the same run."""
    population_size: int = 256
    """Members evaluated per generation, even."""
    generations: int = 200
    """Generations at most."""
    sigma: float = 0.1
    """Standard deviation of the perturbation of one weight."""
    rank: int = 1
    """Rank of the perturbation of a matrix."""
    learning_rate: float = 0.05
    """Step size of Adam."""
    episodes: int = 1
    """Episodes per member; its fitness is their mean return."""
    hidden_sizes: tuple[int, ...] = (32, 32)
    """Widths of the policy's hidden layers."""
    sampled_actions: bool = False
    """Sample actions from the policy in training; evaluation takes the most likely action in any case."""
    normalise: bool = True
    """Normalise observations by their running mean and standard deviation."""
    target: float | None = None
    """Stop when the unperturbed parameters reach this mean return in a held-out check. None: 495 for CartPole-v1, -85 for
    Acrobot-v1, -180 for Pendulum-v1, never for others."""
    check_every: int = 5
    """Generations between held-out checks."""
    evaluation_episodes: int = 100
    """Episodes of a held-out check, and of the final evaluation, whose episodes are fresh."""
    folder: Path | None = None
    """Run folder; its files are replaced. None: runs/rl-<env>-<seed>."""

    def check(self) -> None:
        """Raise ValueError for what no part below would refuse in one sentence."""
        for name in ("generations", "episodes", "check_every", "evaluation_episodes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be an integer >= 1, got {getattr(self, name)}.")
        if not 0 < self.learning_rate < float("inf"):
            raise ValueError(f"learning_rate must be a finite number > 0, got {self.learning_rate}.")
        if any(size < 1 for size in self.hidden_sizes):
            raise ValueError(f"hidden_sizes must be integers >= 1, got {self.hidden_sizes}.")


@dataclasses.dataclass(frozen=True)
class Task:
    """A policy network acting in an environment."""

    environment: envs.Environment
    network: nn.Module
    sampled: bool  # whether training samples actions
    normalise: bool

    def play(
        self, params: Any, statistics: envs.ObservationStatistics, key: Array, *, episodes: int, sampled: bool
    ) -> envs.Episode:
        """Run episodes of the policy with `params`; results have a leading axis of `episodes`."""

        def policy(observation: Array, key: Array) -> Array:
            output: Any = self.network.apply(params, observation.reshape(-1))
            return envs.choose_action(self.environment.action_space, output, key=key if sampled else None)

        known = statistics if self.normalise else None
        return envs.run_episodes(self.environment, policy, key=key, episodes=episodes, statistics=known)

    def init_params(self, *, key: Array) -> Any:
        """Draw initial parameters of the policy."""
        return self.network.init(key, jnp.zeros(self.environment.observation_shape, jnp.float32).reshape(-1))


def make_task(config: Config) -> Task:
    """Make the environment and the policy that `config` names."""
    environment = envs.make(config.env)
    outputs = envs.output_size(environment.action_space, sampled=config.sampled_actions)
    return Task(environment, MLP(config.hidden_sizes, outputs), config.sampled_actions, config.normalise)


def make_strategy(config: Config, task: Task) -> eggroll.EvolutionStrategy:
    """Make the strategy; its batch is the observation statistics, its aux the sums that update them."""

    def fitness(params: Any, statistics: envs.ObservationStatistics, key: Array) -> tuple[Array, envs.ObservationSums]:
        played = task.play(params, statistics, key, episodes=config.episodes, sampled=task.sampled)
        return played.total_reward.mean(), jax.tree.map(lambda x: x.sum(axis=0), played.sums)

    return eggroll.EvolutionStrategy(
        fitness,
        population_size=config.population_size,
        sigma=config.sigma,
        optimizer=optax.adam(config.learning_rate),
        perturbation=eggroll.LowRank(rank=config.rank),
        aux="sum",
    )


class HeldOutCheck:
    """Callback of the training loop: keeps the observation statistics, counts steps, checks the unperturbed parameters."""

    def __init__(self, config: Config, task: Task, *, key: Array):
        self.statistics = envs.initial_statistics(task.environment.observation_shape)
        self.env_steps = 0
        self._every = config.check_every
        self._target = TARGETS.get(config.env) if config.target is None else config.target
        self._key = key
        self._play = jax.jit(functools.partial(task.play, episodes=config.evaluation_episodes, sampled=False))

    def batch(self, generation: int) -> envs.ObservationStatistics:
        """The batch of a generation: statistics of all generations before it."""
        return self.statistics

    def __call__(self, state: eggroll.ESState, record: Record) -> bool:
        """Merge the generation's sums; every few generations, tell whether the target is met on held-out episodes."""
        self.statistics = envs.merge(self.statistics, record.aux)
        self.env_steps += int(record.aux.number)
        if (record.generation + 1) % self._every:
            return False
        mean_return = self.mean_return(state.params, key=jax.random.fold_in(self._key, record.generation))
        record.extra["held_out_return"] = mean_return
        return self._target is not None and mean_return >= self._target

    def mean_return(self, params: Any, *, key: Array) -> float:
        """Mean return of `params` without perturbation over fresh episodes, actions being deterministic."""
        return float(self._play(params, self.statistics, key).total_reward.mean())


def run(config: Config, task: Task, es: eggroll.EvolutionStrategy) -> dict[str, Any]:
    """Train, write the artefacts, evaluate; return the summary that `main` prints."""
    init_key, run_key, check_key, evaluation_key = jax.random.split(jax.random.key(config.seed), 4)
    folder = run_folder(config.folder or f"rl-{config.env}-{config.seed}")
    start = time.perf_counter()
    check = HeldOutCheck(config, task, key=check_key)
    state = es.init(task.init_params(key=init_key), key=run_key)
    state, history = train(es, state, check.batch, generations=config.generations, callbacks=[check], run_folder=folder)
    seconds = time.perf_counter() - start
    save_checkpoint(folder / "checkpoint", {"params": state.params, "statistics": check.statistics._asdict()})
    print(f"metrics, figure and checkpoint are in {folder}")
    return {
        "env": config.env,
        "algorithm": "eggroll",
        "mean_return": check.mean_return(state.params, key=evaluation_key),
        "generations": len(history),
        "env_steps": check.env_steps,
        "seconds": round(seconds, 2),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line; wrong options end it with one sentence."""
    config = tyro.cli(Config, args=arguments, prog="python -m experiments.rl")
    try:
        config.check()
        task = make_task(config)
        es = make_strategy(config, task)
    except ValueError as error:
        sys.exit(f"error: {error}")
    print_summary(run(config, task, es))


if __name__ == "__main__":
    main()
