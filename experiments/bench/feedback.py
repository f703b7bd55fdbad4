"""What error feedback costs: the update of int8 matrices with every precision, without the evaluation of the population.

A window of h steps computes (h + 1) / 2 estimates an update on average, so the mean over whole windows is reported.
"""

import dataclasses
import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

import eggroll
from eggroll.experiments.bench.memory.programs import tree_bytes
from eggroll.experiments.bench.timing import advancing, machine, rounds_ms
from eggroll.experiments.common.run import print_summary


@dataclasses.dataclass(frozen=True)
class FeedbackBench:
    """Time updates of int8 matrices: float32 masters, stochastic rounding, error feedback."""

    layers: int = 2
    """Matrices, stacked."""
    width: int = 1024
    """Rows and columns of a matrix."""
    members: int = 64
    """Members of the population, whose noise has rank 1."""
    windows: tuple[int, ...] = (10, 50)
    """Windows of error feedback."""
    rounds: int = 50
    """Updates of every form, a multiple of the windows; the means are reported."""


def run(config: FeedbackBench) -> None:
    """Run the benchmark; the last line of standard output is JSON."""
    if any(config.rounds % window for window in config.windows):
        raise SystemExit(f"error: rounds must be a multiple of the windows {config.windows}, got {config.rounds}.")
    about = machine()
    print("  ".join(f"{key} {value}" for key, value in about.items()))
    print(f"{config.layers * config.width**2:,} int8 weights, {config.members} members")
    forms: dict[str, tuple[str | eggroll.Feedback, optax.GradientTransformation]] = {
        "master + adam": ("master", optax.adam(0.3)),
        "master + sgd": ("master", optax.sgd(3.0)),
        "stochastic + sgd": ("stochastic", optax.sgd(3.0)),
    } | {f"feedback {h} + sgd": (eggroll.Feedback(h), optax.sgd(3.0)) for h in config.windows}
    made = {name: make_update(config, *form) for name, form in forms.items()}
    times = rounds_ms({name: update for name, (update, _) in made.items()}, repeats=config.rounds)
    rows = {name: {"ms": statistics.mean(times[name]), "state_bytes": state} for name, (_, state) in made.items()}
    for name, row in rows.items():
        print(f"{name:<20}{row['ms']:>10.1f} ms{row['state_bytes'] / 1e6:>10.1f} MB beyond the weights")
    print_summary(rows | {"about": about | dataclasses.asdict(config)})


def make_update(
    config: FeedbackBench, precision: str | eggroll.Feedback, optimizer: optax.GradientTransformation
) -> tuple[Callable[[], object], int]:
    """Return a form that repeats an update from coefficients, and the bytes of masters and optimizer."""

    def fitness(params: Any, batch: Array, key: Array) -> Array:
        x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w.astype(x.dtype)), None), batch, params["w"])
        return x.mean()

    es = eggroll.EvolutionStrategy(
        fitness, population_size=config.members, sigma=3.0, optimizer=optimizer, precision=precision, shaping="z_score"
    )
    weights = jnp.zeros((config.layers, config.width, config.width), jnp.int8)
    state = es.init({"w": weights}, key=jax.random.key(0))
    es.plan(state, jnp.ones((1, config.width)))
    coefficients = jax.random.normal(jax.random.key(1), (config.members // 2,))
    return advancing(lambda state: (es.replay(state, coefficients), None), state), tree_bytes((state.opt_state, state.masters))
