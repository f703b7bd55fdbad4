"""Train a policy on an environment: `python -m experiments.rl --help`.

A plain Flax network is the policy. It is evolved without backpropagation, with low-rank (eggroll) or dense (openes) noise, or
trained by PPO; `random` acts without looking. The last line of standard output is a JSON object with the mean return of the
trained parameters over fresh episodes, beside that of random actions. Artefacts go to one run folder per seed.
"""

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

import eggroll
from eggroll.devices.processes import is_first
from eggroll.envs.drawing.render import render_episode
from eggroll.experiments.common.checkpoint import save_checkpoint
from eggroll.experiments.common.memory import peak_mib
from eggroll.experiments.common.run import SUMMARY, join_processes, print_summary, write_json
from eggroll.experiments.common.seeds import begin, seed_folder, summary_of
from eggroll.experiments.rl.baseline import PPORuns, RandomRuns
from eggroll.experiments.rl.config import Config, parse
from eggroll.experiments.rl.evolution import Evolution
from eggroll.experiments.rl.inputs import load
from eggroll.experiments.rl.ppo import PPO
from eggroll.experiments.rl.problem import MLP, Evaluation, Task, Trained


def make_runs(config: Config, task: Task, evaluation: Evaluation) -> Evolution | PPORuns | RandomRuns:
    """Make what trains: `train(init_key=, run_key=, check_key=, folder=, recipe=)`, compiled once for all seeds."""
    if config.algorithm == "random":
        return RandomRuns()
    if config.algorithm == "ppo":
        return PPORuns(config, task, evaluation, critic=MLP(config.hidden_sizes, 1, config.activation))
    return Evolution(config, task, evaluation)


def run_seed(config: Config, runs: Any, evaluation: Evaluation, *, seed: int) -> dict[str, Any]:
    """Train with one seed, evaluate, write the artefacts; `summary.json` comes last and says that the run is whole."""
    init_key, run_key, check_key, evaluation_key, random_key = jax.random.split(jax.random.key(seed), 5)
    folder = _folder(config, seed)
    begin(folder, resume=config.resume)
    start = time.perf_counter()
    recipe = {"function": "eggroll.experiments.rl.__main__:remake", "options": config.options() | {"seed": seed}}
    trained = runs.train(init_key=init_key, run_key=run_key, check_key=check_key, folder=folder, recipe=recipe)
    seconds = time.perf_counter() - start
    mean_return = random_return = evaluation.random_return(key=random_key)
    if trained.params is not None:
        save_checkpoint(folder / "checkpoint", {"params": trained.params, "statistics": trained.statistics._asdict()})
        mean_return = evaluation.mean_return(trained.params, trained.statistics, key=evaluation_key)
        print(f"seed {seed}: mean return {mean_return:.4g}; metrics and checkpoint are in {folder}", flush=True)
        if config.render and is_first():
            _render(evaluation.task, trained, folder / "policy.gif", key=evaluation_key)
    if trained.invalid:
        what = "steps" if config.algorithm == "ppo" else "members"
        print(f"seed {seed}: {trained.invalid} {what} gave a reward or an observation that was not finite.", flush=True)
    row = {
        "mean_return": mean_return,
        "random_return": random_return,
        "generations": trained.generations,
        "env_steps": trained.env_steps,
        "invalid": trained.invalid,
        "seconds": round(seconds, 2),
        "generation_seconds": round(trained.generation_seconds, 5),
        "peak_mib": round(peak_mib()),
    }
    if is_first():
        write_json(folder / SUMMARY, {"options": config.options(), "seed": seed} | row)
    return row


def _render(task: Task, trained: Trained, path: Path, *, key: jax.Array) -> None:
    known = trained.statistics if task.normalise else None
    drawn = render_episode(task.environment, task.policy(trained.params), key=key, path=path, statistics=known)
    print(f"an episode is drawn in {drawn}" if drawn else f"{task.environment.name} cannot be drawn", flush=True)


def remake(options: dict[str, Any]) -> tuple[eggroll.EvolutionStrategy, eggroll.ESState]:
    """Make the strategy and the initial state of a run again: the recipe of its journal."""
    options = options | {"hidden_sizes": tuple(options["hidden_sizes"]), "ppo": PPO(**options["ppo"])}
    config = Config(**options)
    task = load(config)
    init_key, run_key, *_ = jax.random.split(jax.random.key(config.seed), 5)
    return Evolution(config, task, Evaluation(task, episodes=1)).start(init_key=init_key, run_key=run_key)


def _folder(config: Config, seed: int) -> Path:
    return seed_folder(config, seed, default=f"rl-{config.env.replace('/', '-')}-{config.algorithm}")


def run(config: Config, runs: Any, evaluation: Evaluation) -> dict[str, Any]:
    """Run every seed; return the summary that `main` prints."""
    rows = [run_seed(config, runs, evaluation, seed=seed) for seed in range(config.seed, config.seed + config.seeds)]
    return {"env": config.env, "algorithm": config.algorithm} | summary_of(rows, first_seed=config.seed)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line; wrong options end it with one sentence."""
    try:
        config = parse(arguments)
        config.check()
        join_processes()
        task = load(config)
        evaluation = Evaluation(task, episodes=config.evaluation_episodes)
        runs = make_runs(config, task, evaluation)
        summary = run(config, runs, evaluation)
    except (ValueError, RuntimeError, ModuleNotFoundError) as error:
        sys.exit(f"error: {error}")
    print_summary(summary)


if __name__ == "__main__":
    main()
