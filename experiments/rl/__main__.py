"""Train a policy on an environment: `python -m eggroll.experiments.rl --help`.

A plain Flax network is the policy. It is evolved without backpropagation, with low-rank (eggroll) or dense (openes) noise, or
trained by PPO; `random` ignores its observations. The last line of standard output is a JSON object with the mean return of the
trained parameters over fresh episodes, and that of random actions. Each seed writes its artefacts to its own run folder.
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

import eggroll
from eggroll.devices.processes import first_does
from eggroll.envs.drawing.render import render_episode
from eggroll.experiments.common.checkpoint import save_checkpoint
from eggroll.experiments.common.run import exit_on_error, print_summary, start_processes
from eggroll.experiments.common.seeds import Row, SeedRun, run_seeds
from eggroll.experiments.rl.baseline import PolicyGradient, RandomPolicy
from eggroll.experiments.rl.config import Config, parse
from eggroll.experiments.rl.evolution import Evolution
from eggroll.experiments.rl.inputs import load, make_critic
from eggroll.experiments.rl.ppo import PPO
from eggroll.experiments.rl.problem import Evaluation, Task, Trained, is_above, seed_keys

Algorithm = Evolution | PolicyGradient | RandomPolicy


def make_algorithm(config: Config, task: Task, evaluation: Evaluation) -> Algorithm:
    """Make the algorithm; its method `train` is compiled once for all seeds."""
    if config.algorithm == "random":
        return RandomPolicy()
    if config.algorithm == "ppo":
        return PolicyGradient(config, task, evaluation, critic=make_critic(config, task))
    return Evolution(config, task, evaluation)


def train(config: Config, algorithm: Algorithm, evaluation: Evaluation, *, run: SeedRun) -> Row:
    """Train with one seed, evaluate, write the artefacts; return the fields of its summary."""
    keys = seed_keys(run.seed)
    start = time.perf_counter()
    trained = algorithm.train(run)
    seconds = time.perf_counter() - start
    returns = random_returns = evaluation.random_returns(key=keys.random)
    if trained.params is not None:
        save_checkpoint(run.folder / "checkpoint", {"params": trained.params, "statistics": trained.statistics._asdict()})
        returns = evaluation.returns(trained.params, trained.statistics, key=keys.evaluation)
        print(f"seed {run.seed}: mean return {returns.mean():.4g}; metrics and checkpoint are in {run.folder}", flush=True)
        if config.render:
            first_does(lambda: _render(evaluation.task, trained, run.folder / "policy.gif", key=keys.evaluation))
    if trained.invalid:
        what = "steps" if config.algorithm == "ppo" else "members"
        print(f"seed {run.seed}: {trained.invalid} {what} gave a reward or an observation that was not finite.", flush=True)
    above_random = is_above(returns, random_returns)
    if trained.params is not None and not above_random:
        means = f"{returns.mean():.4g} is not above that of random actions, {random_returns.mean():.4g}"
        print(f"seed {run.seed}: the mean return {means}. {trained.advice}".rstrip(), flush=True)
    return {
        "mean_return": float(returns.mean()),
        "random_return": float(random_returns.mean()),
        "above_random": above_random,
        "generations": trained.generations,
        "env_steps": trained.env_steps,
        "invalid": trained.invalid,
        "seconds": round(seconds, 2),
        "generation_seconds": round(trained.generation_seconds, 5),
    }


def _render(task: Task, trained: Trained, path: Path, *, key: jax.Array) -> None:
    statistics = trained.statistics if task.normalise else None
    policy, memory = task.policy(trained.params), task.memory
    drawn = render_episode(task.environment, policy, key=key, path=path, statistics=statistics, memory=memory)
    print(f"an episode is drawn in {drawn}", flush=True)


def remake(options: dict[str, Any]) -> tuple[eggroll.EvolutionStrategy, eggroll.ESState]:
    """Remake the strategy and the initial state of a run, from the recipe in its journal."""
    tuples = {name: tuple(options.get(name, ())) for name in ("hidden_sizes", "imports")}
    options = {"network": "mlp"} | options | tuples | {"ppo": PPO(**options["ppo"])}
    config = Config(**options)
    task = load(config)
    return Evolution(config, task, Evaluation(task, episodes=1)).start(seed_keys(config.seed))


def run(config: Config) -> Row:
    """Run every seed; return the summary that `main` prints."""
    task = load(config)
    evaluation = Evaluation(task, episodes=config.evaluation_episodes)
    algorithm = make_algorithm(config, task, evaluation)
    summary = run_seeds(
        config,
        lambda run: train(config, algorithm, evaluation, run=run),
        experiment="rl",
        default=f"rl-{config.env.replace('/', '-')}-{config.algorithm}",
        options=config.options(),
    )
    return {"env": config.env, "algorithm": config.algorithm} | summary


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line; wrong options end it with a one-line error."""
    with exit_on_error():
        config = parse(arguments)
        config.check()
        start_processes()
        summary = run(config)
    print_summary(summary)


if __name__ == "__main__":
    main()
