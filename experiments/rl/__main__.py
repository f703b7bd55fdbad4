"""Train a policy on an environment: `python -m eggroll.experiments.rl --help`.

A plain Flax network is the policy. It is evolved without backpropagation, with low-rank (eggroll) or dense (openes) noise, or
trained by PPO; `random` ignores its observations. The last line of standard output is a JSON object with the mean return of the
trained parameters over fresh episodes, and that of random actions. Each seed writes its artefacts to its own run folder, which
`--evaluate RUN` and `--render RUN` load again (`experiments.rl.finished`).
"""

import math
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jax import Array

import eggroll
from eggroll.devices.processes import first_does
from eggroll.envs.drawing.render import check_drawing
from eggroll.experiments.common.loop import seconds_spent
from eggroll.experiments.common.options import refuse
from eggroll.experiments.common.run import exit_on_error, exit_on_interrupt, leave, print_summary, start_processes
from eggroll.experiments.common.seeds import Row, SeedRun, run_seeds
from eggroll.experiments.rl import finished
from eggroll.experiments.rl.baseline import PolicyGradient, RandomPolicy
from eggroll.experiments.rl.config import EVOLUTION, Config, parse, restore_config
from eggroll.experiments.rl.evolution import Evolution
from eggroll.experiments.rl.inputs import ignored_in, load, make_critic
from eggroll.experiments.rl.problem import (
    BEST,
    LAST,
    Evaluation,
    HeldOutChecks,
    Task,
    Trained,
    is_above,
    load_policy,
    save_policy,
    seed_keys,
)
from eggroll.experiments.rl.report import describe, ending, stopped, why_ended

STOPPED = "stopped; the same command with --resume continues after the last whole generation."  # by Ctrl-C
PPO_STOPPED = "stopped; ppo keeps no checkpoints of a run: the same command begins again."
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
    random_returns = evaluation.random_returns(key=seed_keys(run.seed).random)
    random_return = float(random_returns.mean())
    start = time.perf_counter() - seconds_spent(run.folder)
    try:
        trained = algorithm.train(run, random_return=random_return)
    except KeyboardInterrupt:
        print(f"seed {run.seed}: {stopped(run.folder)}, random {random_return:.4g}; files are in {run.folder}", flush=True)
        raise
    seconds = time.perf_counter() - start
    row: Row = {
        "mean_return": random_return,
        "random_return": random_return,
        "above_random": False,
        "generations": trained.generations,
        "env_steps": trained.env_steps,
        "invalid": trained.invalid,
        "seconds": round(seconds, 2),
        "generation_seconds": round(trained.generation_seconds, 5),
    }
    if trained.checks is None:
        return row
    print(f"seed {run.seed}: {ending(config, trained, seconds=seconds)}", flush=True)
    row["ended"] = why_ended(config, trained)
    return row | _evaluate(config, trained, trained.checks, evaluation, random_returns, run=run)


def _evaluate(
    config: Config, trained: Trained, checks: HeldOutChecks, evaluation: Evaluation, random_returns: Array, *, run: SeedRun
) -> Row:
    """Save and evaluate the last parameters, and evaluate those of the best check on the same fresh episodes."""
    key, seed = seed_keys(run.seed).evaluation, f"seed {run.seed}"
    save_policy(run.folder / LAST, trained.params, trained.statistics)
    returns = best_returns = evaluation.returns(trained.params, trained.statistics, key=key)
    if trained.invalid:
        what = "steps" if config.algorithm == "ppo" else "members"
        bad = "a reward that was not finite, or an observation whose square was not"
        print(f"{seed}: {trained.invalid} {what} gave {bad}.", flush=True)
    print(f"{seed}: return {describe(returns)} of {len(returns)} episodes, random {random_returns.mean():.4g}", flush=True)
    if checks.best_env_steps:
        if checks.best_env_steps != trained.env_steps:
            best_returns = evaluation.returns(*load_policy(run.folder / BEST, evaluation.task), key=key)
        best = f"best check {checks.best:.4g} at {checks.best_env_steps:,} steps"
        print(f"{seed}: {best}, whose parameters return {best_returns.mean():.4g}", flush=True)
    above_random = is_above(returns, random_returns)
    if not above_random:
        how = "less than two standard errors above" if returns.mean() > random_returns.mean() else "not above"
        means = f"{returns.mean():.4g} is {how} that of random actions, {random_returns.mean():.4g}"
        print(f"{seed}: the mean return {means}. {trained.advice}".rstrip(), flush=True)
    elif trained.unusual and not checks.met:
        print(f"{seed}: if more can be reached: {trained.advice}", flush=True)
    print(f"{seed}: metrics, figure, best and last parameters are in {run.folder}", flush=True)
    if config.render:
        first_does(lambda: _render(evaluation.task, trained, run.folder / "policy.gif", key=key))
    return {
        "mean_return": float(returns.mean()),
        "above_random": above_random,
        "best_return": float(best_returns.mean()),
        "best_check": checks.best if checks.best_env_steps else math.nan,
        "best_env_steps": checks.best_env_steps,
        "unusual": trained.unusual,
        "parameters": {"best": BEST if checks.best_env_steps else LAST, "last": LAST},
    }


def _render(task: Task, trained: Trained, path: Path, *, key: Array) -> None:
    """Draw an episode; one that fails is a warning, and costs the run nothing else."""
    try:
        print(f"an episode is drawn in {task.render(trained.params, trained.statistics, path, key=key)}", flush=True)
    except Exception as failed:
        warnings.warn(f"no episode was drawn: {failed}", stacklevel=2)


def remake(options: dict[str, Any]) -> tuple[eggroll.EvolutionStrategy, eggroll.ESState]:
    """Remake the strategy and the initial state of a run, from the recipe in its journal."""
    config = restore_config(options)
    task = load(config)
    return Evolution(config, task, Evaluation(task, episodes=1)).start(seed_keys(config.seed))


def run(config: Config) -> Row:
    """Run every seed; return the summary that `main` prints."""
    task = load(config)
    refuse(ignored_in(task.environment, config))  # of a run that is loaded they are not known: it stores no preset
    if config.render:
        first_does(lambda: check_drawing(task.environment))
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
    arguments = sys.argv[1:] if arguments is None else arguments
    if finished.is_asked_for(arguments):
        finished.main(arguments)
        return
    with exit_on_error():
        config = parse(arguments)
    with exit_on_interrupt(STOPPED if config.algorithm in EVOLUTION else PPO_STOPPED), exit_on_error():
        config.check()
        start_processes()
        summary = run(config)
    print_summary(summary)


if __name__ == "__main__":
    leave(main)
