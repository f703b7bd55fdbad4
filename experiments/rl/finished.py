"""After the run: `python -m eggroll.experiments.rl --evaluate RUN` and `--render RUN`.

    run = load_run("runs/rl-CartPole-v1-eggroll-0", parameters="best")
    run.returns(episodes=100).mean()
    run.render("policy.gif")

The last line of standard output is a JSON object with the mean return, its interval, and the mean return of random actions.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import jax
import tyro

from eggroll import envs
from eggroll.devices.processes import first_does
from eggroll.experiments.common.checkpoint import find_checkpoint
from eggroll.experiments.common.finished import read_run
from eggroll.experiments.common.options import check_integers
from eggroll.experiments.common.run import exit_on_error, print_summary, start_processes
from eggroll.experiments.rl.config import Config, restore_config
from eggroll.experiments.rl.inputs import load
from eggroll.experiments.rl.problem import BEST, LAST, Evaluation, Task, is_above, load_policy, seed_keys
from eggroll.experiments.rl.report import describe, interval

Which = Literal["best", "last"]


@dataclasses.dataclass(frozen=True)
class Options:
    """Load a finished run: print the mean return of its policy, and draw an episode with --render."""

    evaluate: Path | None = None
    """Folder of the run."""
    render: Path | None = None
    """The same, and write an episode as policy.gif into it."""
    parameters: Which = "best"
    """Those of the best held-out check, or the last ones."""
    episodes: int | None = None
    """Number of episodes. None: as many as the run's own evaluation had."""
    seed: int | None = None
    """Seed of the episodes. None: that of the run, whose own final evaluation has the same episodes if there are as many."""
    env: str | None = None
    """Refuse a run of another environment than this one."""
    imports: Annotated[tuple[str, ...] | None, tyro.conf.arg(name="import")] = None
    """Files or modules that register environments and networks. None: those that it was trained with."""


class Finished(NamedTuple):
    """A run that was loaded."""

    folder: Path
    config: Config
    task: Task
    params: Any
    statistics: envs.ObservationStatistics

    def returns(self, *, episodes: int | None = None, seed: int | None = None) -> jax.Array:
        """Play episodes; return their returns, float32 [episodes]. Without arguments they are those of the run's evaluation."""
        evaluation = self._evaluation(episodes)
        return evaluation.returns(self.params, self.statistics, key=seed_keys(self._seed(seed)).evaluation)

    def random_returns(self, *, episodes: int | None = None, seed: int | None = None) -> jax.Array:
        """Return those of uniformly random actions."""
        return self._evaluation(episodes).random_returns(key=seed_keys(self._seed(seed)).random)

    def render(self, path: str | Path, *, seed: int | None = None) -> Path:
        """Draw an episode as an animated GIF; ValueError where the environment cannot be drawn."""
        key = seed_keys(self._seed(seed)).evaluation
        return self.task.render(self.params, self.statistics, Path(path), key=key)

    def _evaluation(self, episodes: int | None) -> Evaluation:
        return Evaluation(self.task, episodes=self.config.evaluation_episodes if episodes is None else episodes)

    def _seed(self, seed: int | None) -> int:
        return self.config.seed if seed is None else seed


def load_run(
    folder: str | Path, *, parameters: Which = "best", env: str | None = None, imports: Sequence[str] | None = None
) -> Finished:
    """Load the policy of a run.

    Args:
        folder: of the run of one seed. Of a run that was stopped, the best parameters can be loaded.
        parameters: those of the best held-out check, or the last ones.
        env: the environment that the run must have; None: any.
        imports: files or modules that register environments and networks; None: those of `--import` when it was trained.

    Raises:
        FileNotFoundError: the folder has no run of one seed, or not these parameters, or a file that it imported is elsewhere.
        ValueError: it is a run of another experiment or environment, or its parameters do not fit the environment.
    """
    found = read_run(Path(folder), experiment="rl", names=("env", "algorithm"))
    folder, summary = found.folder, found.summary
    options = found.options | {"seed": found.seed}
    names = {"best": BEST} if summary is None else summary.get("parameters", {"best": LAST, "last": LAST})
    if env is not None and options["env"] != env:
        raise ValueError(f"{folder} is a run of {options['env']}, not of {env}; leave --env out, or name another folder.")
    if options["algorithm"] == "random":
        raise ValueError(f"{folder} is a run of random actions, which has no parameters.")
    saved = folder / names.get(parameters, parameters)
    if parameters not in names or not find_checkpoint(saved).is_dir():
        why = "the run has not ended" if summary is None else f"there is no folder {saved}"
        raise FileNotFoundError(f"{folder} has no {parameters} parameters: {why}.")
    if imports is not None:
        options |= {"imports": imports}
    elif absent := [source for source in options.get("imports", ()) if source.endswith(".py") and not Path(source).is_file()]:
        raise FileNotFoundError(
            f"{folder} was trained with --import {absent[0]}, which is not here: run this in the folder of that run's "
            "command, or give --import its path."
        )
    config = restore_config(options)
    task = load(config)
    return Finished(folder, config, task, *load_policy(saved, task))


def is_asked_for(arguments: Sequence[str]) -> bool:
    """Return whether a command line is about a finished run; `--render` without a folder belongs to training."""
    following = [*arguments[1:], "--"]
    return any(
        name.partition("=")[0] == "--evaluate" or name.startswith("--render=") or (name == "--render" and value[:1] != "-")
        for name, value in zip(arguments, following, strict=True)
    )


def main(arguments: Sequence[str]) -> None:
    """Run from the command line; wrong options end it with a one-line error."""
    options = tyro.cli(Options, args=arguments, prog="python -m eggroll.experiments.rl")
    with exit_on_error():
        folders = {folder for folder in (options.evaluate, options.render) if folder is not None}
        if len(folders) != 1:
            raise ValueError(f"--evaluate and --render must name one run, got {', '.join(map(str, folders))}.")
        check_integers(options, "episodes")
        start_processes()
        summary = evaluate(folders.pop(), options)
    print_summary(summary)


def evaluate(folder: Path, options: Options) -> dict[str, Any]:
    """Evaluate a run, and draw it if asked for; return what `main` prints."""
    run = load_run(folder, parameters=options.parameters, env=options.env, imports=options.imports)
    if options.render is not None and run.task.environment.draw is None:
        raise ValueError(f"--render has no effect with a run of {run.config.env}: it cannot be drawn.")
    returns = run.returns(episodes=options.episodes, seed=options.seed)
    random_returns = run.random_returns(episodes=options.episodes, seed=options.seed)
    what = f"{options.parameters} parameters, {len(returns)} episodes of {run.config.env}"
    print(f"mean return {describe(returns)}, random actions {random_returns.mean():.4g}; {what}", flush=True)
    summary = {
        "env": run.config.env,
        "algorithm": run.config.algorithm,
        "run": str(run.folder),
        "parameters": options.parameters,
        "episodes": len(returns),
        "mean_return": float(returns.mean()),
        "interval": interval(returns),
        "random_return": float(random_returns.mean()),
        "above_random": is_above(returns, random_returns),
    }
    if options.render is None:
        return summary
    path = run.folder / "policy.gif"
    first_does(lambda: print(f"an episode is drawn in {run.render(path, seed=options.seed)}", flush=True))
    return summary | {"picture": str(path)}
