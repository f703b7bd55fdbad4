"""The learning rate that gradient and curvature suggest before the first step (`eggroll.zo.guidance`), in words."""

import math
import warnings
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from eggroll import zo
from eggroll.devices.processes import is_first
from eggroll.experiments.zo.data.examples import Examples
from eggroll.noise.plan import Plan
from eggroll.zo.guidance import DIRECTIONS


def guide(
    tuner: zo.ZerothOrder | zo.Offload, state: Any, batches: Sequence[Examples], *, learning_rate: float | None
) -> zo.Guidance:
    """Measure, print and return what the loss does along some directions.

    Args:
        tuner: of the run to come.
        state: its initial one, which is not consumed.
        batches: two, of the run.
        learning_rate: of the run; None: it has none that is constant.
    """
    recipe = tuner.tuner if isinstance(tuner, zo.Offload) else tuner
    sharing = 1 if recipe.mesh is None else recipe.mesh.shape.get("population", 1)
    directions = sharing * math.ceil(DIRECTIONS / sharing)
    if is_first():
        print(
            f"measuring gradient and curvature along {directions} directions, {2 * (2 * directions + 1)} forwards", flush=True
        )
    found = zo.suggest_learning_rate(tuner, state, batches, directions=directions)
    if is_first():
        print(describe(found, directions=directions, rate=learning_rate), flush=True)
    return found


def describe(found: zo.Guidance, *, directions: int, rate: float | None) -> str:
    """Return what was found as text; `rate` is the learning rate of the run."""
    measured = (
        f"projected gradient {found.projected_gradient:.3g}, curvature {found.curvature:.3g} along {directions} directions"
    )
    if math.isnan(found.learning_rate):
        return f"{measured}; no learning rate is suggested: {found.reason}"
    chosen = "" if rate is None else f"; this run has {rate:g}, {_times(rate / found.learning_rate)}"
    tried = f"one step gains most at {found.best_step:.1e}, try --learning-rate {found.learning_rate:.1e}"
    return f"{measured}; {tried}{chosen}"


def warn_of_spacing(params: Any, plan: Plan, sigma: float) -> None:
    """Warn where rounding to bfloat16 hides dense noise from more than half of the perturbed weights.

    A value of [2^k, 2^(k + 1)) has neighbours 2^(k - 7) away: it stays what it is where that exceeds twice sigma.
    """
    perturbed = [pair for pair in zip(jax.tree.leaves(params), plan.leaves, strict=True) if pair[1].role != "frozen"]
    hidden = 0.0
    for values, leaf in perturbed:
        if leaf.role == "dense" and values.dtype == jnp.bfloat16:
            own = sigma * getattr(leaf, "sigma_multiplier", 1.0)
            hidden += values.size * float(_share_above(values, 2.0 ** (math.floor(math.log2(256 * own)) + 1)))
    share = hidden / max(1, sum(values.size for values, _ in perturbed))
    if share > 0.5:
        words = f"{100 * share:.0f} % of the perturbed weights are bfloat16 with a spacing above twice sigma {sigma:g}"
        warnings.warn(f"{words}, so that they hardly move: raise --sigma, or use --perturbation lowrank.", stacklevel=3)


@jax.jit
def _share_above(values: Array, least: float) -> Array:
    return jnp.mean(jnp.abs(values).astype(jnp.float32) >= least)


def _times(ratio: float) -> str:
    """A ratio in words."""
    return f"{ratio:.3g} times as much" if ratio >= 1 else f"{1 / ratio:.3g} times less"
