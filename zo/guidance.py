"""Which learning rate suits a model, a batch and a noise: measured before the first step, with forwards only.

Along a direction z of unit variance the losses at theta, theta + sigma z and theta - sigma z give

    p = (l+ - l-) / (2 sigma) = g z            projected gradient
    c = (l+ - 2 l_0 + l-) / sigma^2 = z' H z   curvature

up to terms of higher order in sigma. A two-point step theta - eta (1/n) sum_k p_k z_k changes the loss of a quadratic by

    -eta (1/n) sum_k p_k (g* z_k) + eta^2 / 2 (1/n^2) sum_kj p_k p_j z_k' H z_j

where g* is the gradient on other batches than the one that gave p. The mean over directions, with p and q on two batches, is

    -eta E[p q] + eta^2 / 2 (A / n + (1 - 1/n) B) E[p^2],        A = E[p^2 c] / E[p^2],   B = g' H g / |g|^2

For normal noise A = tr H + 2 B, which is where the many dimensions of a model come in: one step moves along n of them only, and
tr H / n bounds its length. So B = (A - E[c]) / 2, and the eta that lowers the loss most is

    eta = signal / (A / n + (1 - 1/n) B),        signal = E[p q] / E[p^2],   at most 1

Twice that eta gains nothing, and more makes the loss grow. That is one step: in a run the curvature grows and the signal fades,
so that a tenth of eta is suggested, at which a step still gains a fifth (2 f - f^2 at the fraction f of eta).

Signs have no diagonal in A, which is smaller by 2 sum_i g_i^2 H_ii / |g|^2, so that nothing known gives B; normal noise of the
same form is measured in their place, which errs to smaller rates. For low-rank noise B is approximate, and matters where n > 1.
"""

import dataclasses
import math
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from eggroll import programs
from eggroll.devices.mesh import shard_inputs
from eggroll.noise.leaves import PerturbedLeaf
from eggroll.noise.rules import Frozen, Perturbation, Spec
from eggroll.population.metrics import FitnessReport
from eggroll.state import check_not_consumed
from eggroll.zo.estimators import ESTIMATORS, Estimator, coefficients
from eggroll.zo.offload.runner import Offload
from eggroll.zo.optimizers.descent import Descent
from eggroll.zo.strategy import ZerothOrder

THREE_POINT = "curvature"  # the estimator that evaluates l+, l- and l_0
DIRECTIONS = 8
MARGIN = 0.1  # of the best single step, for a run of many


class Guidance(NamedTuple):
    """What the loss does along random directions, and the learning rate that follows."""

    loss: float  # at the unperturbed parameters
    projected_gradient: float  # root mean square of p
    curvature: float  # mean of c weighted by p^2, A
    signal: float  # E[p q] / E[p^2]: the share of p^2 that batches have in common
    best_step: float  # eta in units of the recipe: the learning rate that lowers the loss most in one step
    learning_rate: float  # that is suggested, `MARGIN` of it; NaN where none is, and `reason` says why
    reason: str = ""


NOTHING = Guidance(math.nan, math.nan, math.nan, math.nan, math.nan, math.nan)


def suggest_learning_rate(
    tuner: ZerothOrder | Offload, state: Any, batches: Sequence[Any], *, directions: int = DIRECTIONS
) -> Guidance:
    """Measure gradient and curvature along some directions, and suggest a learning rate for the next steps.

    Args:
        tuner: of the run to come; its learning rate is of no consequence.
        state: of the tuner, not consumed; an offloaded one without a pending update, such as that of `init`.
        batches: two or more of the batches of the run, which have to differ; each takes 2 `directions` + 1 forwards.
        directions: to measure along, a multiple of the devices that share them.

    Raises:
        ValueError: fewer than two batches.
    """
    if len(batches) < 2:
        raise ValueError(f"batches must be two or more, whose common gradient counts, got {len(batches)}.")
    check_not_consumed(state)
    recipe = tuner.tuner if isinstance(tuner, Offload) else tuner
    # As many as in a step; one, with the whole batch, where each has an example of its own.
    at_once = 1 if ESTIMATORS[recipe.estimator].per_example else recipe.chunk_directions or recipe.directions
    noise = _normal(recipe.perturbation)
    measuring = dataclasses.replace(
        recipe, estimator=THREE_POINT, directions=directions, chunk_directions=at_once, perturbation=noise
    )
    offloaded = dataclasses.replace(tuner, tuner=measuring) if isinstance(tuner, Offload) else None
    reports = [_measure(measuring, state, batch) if offloaded is None else offloaded.measure(state, batch) for batch in batches]
    losses = -np.stack([jax.device_get(report.fitness) for report in reports]).reshape(len(batches), directions, 2)
    base = -np.array([jax.device_get(report.mean_fitness) for report in reports])
    plan = (offloaded or measuring).plan(state, batches[0])
    multipliers = {leaf.sigma_multiplier for leaf in plan.leaves if isinstance(leaf, PerturbedLeaf)}
    return guide(losses[..., 0], losses[..., 1], base, sigma=float(state.sigma), tuner=recipe, multipliers=multipliers)


def _normal(perturbation: Perturbation) -> Perturbation:
    """The same noise with normal entries."""
    if isinstance(perturbation, Spec):
        return perturbation if isinstance(perturbation, Frozen) else dataclasses.replace(perturbation, distribution="normal")
    rules: Any = [(pattern, _normal(spec)) for pattern, spec in perturbation]
    return rules


def _measure(tuner: ZerothOrder, state: Any, batch: Any) -> FitnessReport:
    """The losses of a step, without making it."""
    plan, shapes = tuner.plan(state, batch), programs.signature((state, batch))
    state, batch = shard_inputs(tuner.placement, state, batch, batch_over="examples")

    def score(state: Any, batch: Any) -> FitnessReport:
        return tuner.score(plan, state, batch)

    return programs.compile_once("measure", tuner, programs.Identity(plan), shapes, function=score)(state, batch)


def guide(
    plus: np.ndarray,
    minus: np.ndarray,
    base: np.ndarray,
    *,
    sigma: float,
    tuner: ZerothOrder,
    multipliers: Collection[float] = (1.0,),
) -> Guidance:
    """Suggest a learning rate from losses.

    Args:
        plus: float [S, K], l+ of K directions on each of S batches.
        minus: float [S, K], l-.
        base: float [S], l_0.
        sigma: of the perturbation.
        tuner: of the steps to come: its estimator, its optimizer, and n, its number of directions.
        multipliers: the different sigma multipliers of the parameters.
    """
    plus, minus, base = (np.asarray(losses, np.float64) for losses in (plus, minus, base))
    if not np.isfinite(base).all():
        return NOTHING._replace(reason="the loss of the unperturbed parameters was not finite; look at the model and the data")
    if not all(np.isfinite(losses).all() for losses in (plus, minus)):
        return NOTHING._replace(reason="a loss was not finite; lower sigma")
    p, c = (plus - minus) / (2 * sigma), (plus - 2 * base[:, None] + minus) / sigma**2
    square, count = np.mean(p**2), len(p)
    equal = "the losses of all directions were equal; raise sigma"
    if not square:
        return NOTHING._replace(loss=float(base.mean()), projected_gradient=0.0, reason=equal)
    shared = (p.sum(axis=0) ** 2 - (p**2).sum(axis=0)).mean() / (count * (count - 1))  # E[p q] over pairs of batches
    signal, along = float(shared / square), float(np.mean(p**2 * c) / square)
    across = max(0.0, (along - float(c.mean())) / 2)
    found = Guidance(float(base.mean()), math.sqrt(square), along, signal, math.nan, math.nan)
    scale = _scale(tuner, plus, minus, base, sigma=sigma)
    if scale is None:
        return found._replace(reason="the steps of this recipe do not follow the size of the gradient")
    if not scale:
        return found._replace(reason=equal)
    if len(multipliers) > 1:
        return found._replace(reason="parameters have different sigma multipliers")
    if not signal > 0:
        return found._replace(reason="the batches have no gradient in common along these directions; take larger batches")
    step = along / tuner.directions + (1 - 1 / tuner.directions) * across
    if not step > 0:
        return found._replace(reason="the loss does not curve upwards along these directions; raise sigma")
    # p and c are along m z, and the estimate divides by the m of a parameter: its step is p z / m.
    best = min(1.0, signal) / step / scale * math.prod(multipliers) ** 2
    return found._replace(best_step=best, learning_rate=MARGIN * best)


def _scale(tuner: ZerothOrder, plus: np.ndarray, minus: np.ndarray, base: np.ndarray, *, sigma: float) -> float | None:
    """By how much the step of a recipe is longer than eta (1/n) sum_k p_k z_k at the same rate.

    None: not by one factor. 0: the losses that it compares are equal.
    """
    estimator: Estimator = ESTIMATORS[tuner.estimator]
    optimizer = tuner.optimizer
    if estimator.per_example or not isinstance(optimizer, Descent) or optimizer.adam is not None:
        return None
    signs = len(estimator.signs)
    plain = (plus - (minus if signs == 2 else base[:, None])) / (signs * sigma)
    length = float(np.sqrt(np.mean(np.square(plain))))
    if not length:
        return 0.0
    if optimizer.second_moment is not None:
        return 1 / length  # which divides by the size of the estimator's own coefficients, whatever it makes of p
    if tuner.estimator == "two_point":
        return 1.0
    own = []
    for up, down, middle in zip(plus, minus, base, strict=True):
        other = down if signs == 2 else np.full_like(up, middle)
        losses = (jnp.asarray(values, jnp.float32) for values in (up, other, middle))
        own.append(np.asarray(coefficients(estimator, *losses, sigma=jnp.float32(sigma))) / (2 * sigma))
    return float(np.sqrt(np.mean(np.square(own)))) / length
