"""What a run says at its end: why it ended, its returns next to those of random actions, its figure."""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from eggroll.experiments.common.options import flag
from eggroll.experiments.rl.config import Config
from eggroll.experiments.rl.problem import Trained
from eggroll.runs.diagnosis import RECENT
from eggroll.runs.metrics import read_metrics
from eggroll.runs.plot import plot_history
from eggroll.runs.record import Record

HELD_OUT = "held_out_return"
_DEVIATIONS = 1.96  # of a normal distribution, 95 %


def interval(returns: Any) -> tuple[float, float]:
    """Return the 95 % interval of the mean of independent returns [episodes]: mean +- 1.96 std / sqrt(n); NaN of only one."""
    values = np.asarray(returns, np.float64)
    half = _DEVIATIONS * values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return float(values.mean() - half), float(values.mean() + half)


def describe(returns: Any) -> str:
    """Return the mean of some returns and, of more than one, its interval as text."""
    low, high = interval(returns)
    return f"{np.mean(returns):.4g}" + (f" [{low:.4g}, {high:.4g}]" if len(returns) > 1 else "")


def why_ended(config: Config, trained: Trained) -> str:
    """Return which option ended a run: "target", "generations" or "env_steps"."""
    if trained.checks is not None and trained.checks.met:
        return "target"
    return "generations" if trained.generations == config.generations else "env_steps"


def ending(config: Config, trained: Trained, *, seconds: float) -> str:
    """Return the line that says why a run ended."""
    name = why_ended(config, trained)
    limit = f"{config.known_target:g}" if name == "target" else f"{getattr(config, name):,}"
    unit = "updates" if config.algorithm == "ppo" else "generations"
    return f"ended by {flag(name)} {limit} after {trained.generations:,} {unit}, {trained.env_steps:,} steps, {seconds:.1f} s"


def stopped(folder: Path) -> str:
    """Return the line of a run that was interrupted: how far it came, by its metrics."""
    rows = [row for row in read_metrics(folder) if row.get("env_steps") is not None]
    if not rows:
        return "stopped in the first generation"
    checks = [row for row in rows if row.get("held_out_return") is not None]
    best = max(checks, key=lambda row: (row["held_out_return"], row["env_steps"]), default=None)
    found = "no check yet" if best is None else f"best check {best['held_out_return']:.4g} at {best['env_steps']:,.0f} steps"
    return f"stopped after {rows[-1]['env_steps']:,.0f} steps, {found}"


def find_members_at_random(history: Sequence[Record], random_return: float | None) -> dict[str, str]:
    """Say so if the members play worse than random actions, and the parameters that they perturb far better.

    Args:
        history: of the run, or its last generations.
        random_return: of random actions; None: not known.

    Returns:
        As `find_unusual`; "far" is more than the spread of the population, in the median check. The members are worse in the
        median generation and in the last one: of a run that has just begun to learn, the median is old.
    """
    history = [record for record in history if math.isfinite(record.mean_fitness)]
    gaps = [record.extra.get(HELD_OUT, math.nan) - record.mean_fitness for record in history]
    gaps = [gap for gap in gaps if math.isfinite(gap)]
    if random_return is None or not math.isfinite(random_return) or not gaps:
        return {}
    last = history[-RECENT:]
    mean, spread = (statistics.median(getattr(record, name) for record in last) for name in ("mean_fitness", "std_fitness"))
    gap = statistics.median(gaps)
    if max(mean, last[-1].mean_fitness) >= random_return or gap <= spread:
        return {}
    words = (
        f"The members' mean return of {mean:.4g} is below that of random actions, {random_return:.4g}, and {gap:.3g} below the "
        f"held-out return (held_out_minus_mean): sigma ({history[-1].sigma:g}) costs them what the parameters have learned. "
        "Lower sigma."
    )
    return {"held_out_minus_mean": words}


def draw(folder: Path, *, random_return: float | None) -> None:
    """Draw `fitness.png` from the folder's `metrics.jsonl`: returns against environment steps."""
    rows = [{"mean_fitness": row.get("mean_return"), **row} for row in read_metrics(folder)]  # PPO's are called so
    references = {} if random_return is None else {"random actions": random_return}
    plot_history(rows, folder / "fitness.png", x="env_steps", references=references)
