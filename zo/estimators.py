"""Estimators: the losses of perturbed forwards to one coefficient per direction.

    descent direction = 1 / (2 n sigma) sum_k d_k E_k

n directions E_k at addresses (key, step, k), losses l_k+ and l_k- at theta +- sigma E_k, l_0 at theta:

    two_point   d = l+ - l-                        SPSA, MeZO (arXiv 2305.17333); d / (2 sigma) is the projected gradient
    one_sided   d = 2 (l+ - l_0)                   n + 1 forwards instead of 2 n
    fzoo        d = 2 sigma (l+ - l_0) / std(l+)   FZOO (arXiv 2506.09034): normalised by the spread of the losses
    curvature   d = w (l+ - l-)                    1.5-SPSA (arXiv 2609.38095): w = 1 / max(1, |c|^0.1),
                                                   c = (l+ - 2 l_0 + l-) / sigma^2
    grzo        d = delta / (std(delta) + e)       GRZO (arXiv 2606.02857): delta_k = (l_k+ - l_k-) / 2, of example k alone
"""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
from jax import Array

from eggroll.population.metrics import FitnessReport, report_fitness

CURVATURE_POWER = 0.1  # of 1.5-SPSA
SPREAD_FLOOR = 1e-8  # e of GRZO


@dataclasses.dataclass(frozen=True)
class Estimator:
    """How a step evaluates and what it makes of the losses.

    Args:
        signs: of the perturbed forwards of a direction.
        unperturbed: whether the loss at the unperturbed parameters is needed too.
        differences: `differences(plus, other, base, sigma, valid) -> d`, float32; plus [n], other [n] (l_-, or l_0 where there
            is one sign), base [] (0 where `unperturbed` is False), valid bool [n]: the entries that count.
        per_example: every direction sees its own example of the batch, which has as many as there are directions.
        normalised: d is divided by a spread over the directions, of which there must be two.
    """

    signs: tuple[float, ...]
    unperturbed: bool
    differences: Callable[[Array, Array, Array, Array, Array], Array]
    per_example: bool = False
    normalised: bool = False

    def forwards(self, directions: int) -> int:
        """Forwards of the batch in a step with this many directions."""
        return len(self.signs) * (1 if self.per_example else directions) + self.unperturbed


def _two_point(plus: Array, other: Array, base: Array, sigma: Array, valid: Array) -> Array:
    return plus - other


def _one_sided(plus: Array, other: Array, base: Array, sigma: Array, valid: Array) -> Array:
    return 2 * (plus - other)


def _fzoo(plus: Array, other: Array, base: Array, sigma: Array, valid: Array) -> Array:
    spread = _spread(plus, valid)
    # Losses that are all equal say nothing; neither does one direction, whose spread is 0.
    return jnp.where(spread > 0, 2 * sigma * (plus - other) / jnp.where(spread > 0, spread, 1.0), 0.0)


def _grzo(plus: Array, other: Array, base: Array, sigma: Array, valid: Array) -> Array:
    delta = (plus - other) / 2
    spread = _spread(delta, valid)
    return jnp.where(spread > 0, delta / (spread + SPREAD_FLOOR), 0.0)


def _spread(values: Array, valid: Array) -> Array:
    """Standard deviation of the valid values, whose number divides; exactly 0 where they are equal."""
    count = jnp.maximum(valid.sum(), 1).astype(jnp.float32)
    values = values - values[jnp.argmax(valid)]  # the mean of equal values would be rounded
    mean = jnp.where(valid, values, 0.0).sum() / count
    return jnp.sqrt(jnp.where(valid, (values - mean) ** 2, 0.0).sum() / count)


def _curvature(plus: Array, other: Array, base: Array, sigma: Array, valid: Array) -> Array:
    curvature = jnp.abs(plus - 2 * base + other) / sigma**2
    return (plus - other) / jnp.maximum(1.0, curvature**CURVATURE_POWER)


ESTIMATORS = {
    "two_point": Estimator((1.0, -1.0), False, _two_point),
    "one_sided": Estimator((1.0,), True, _one_sided),
    "fzoo": Estimator((1.0,), True, _fzoo, normalised=True),
    "curvature": Estimator((1.0, -1.0), True, _curvature),
    "grzo": Estimator((1.0, -1.0), False, _grzo, per_example=True, normalised=True),
}


def coefficients(estimator: Estimator, plus: Array, other: Array, base: Array, *, sigma: Array) -> Array:
    """Return d [n] float32 of the losses.

    A direction with a loss that is not finite gets 0, and the others grow by n / (valid directions), which keeps the mean of
    the estimate; where no direction is valid all are NaN, and the step changes nothing.

    Args:
        estimator: out of `ESTIMATORS`.
        plus: float32 [n].
        other: float32 [n], l_- or l_0.
        base: float32 [], l_0.
        sigma: float32 [].
    """
    valid = jnp.isfinite(plus) & jnp.isfinite(other)
    if estimator.unperturbed:
        valid &= jnp.isfinite(base)
    plus, other, base = (jnp.where(jnp.isfinite(losses), losses, 0.0) for losses in (plus, other, base))
    d = estimator.differences(plus, other, base, sigma, valid)
    share = plus.shape[0] / jnp.maximum(valid.sum(), 1).astype(jnp.float32)
    return jnp.where(valid.any(), jnp.where(valid, d * share, 0.0), jnp.nan).astype(jnp.float32)


def report_losses(estimator: Estimator, losses: Array, base: Array, *, sigma: Array, rank: int) -> FitnessReport:
    """Report the losses of a step as minus fitness; the coefficients are -d.

    Args:
        estimator: out of `ESTIMATORS`.
        losses: float32 [n, S], of S signs.
        base: float32 [], l_0; NaN where the estimator does not evaluate it.
        sigma: float32 [].
        rank: the largest rank of the perturbations.
    """
    plus, other = losses[:, 0], losses[:, 1] if len(estimator.signs) == 2 else jnp.broadcast_to(base, losses.shape[:1])
    found = -coefficients(estimator, plus, other, base, sigma=sigma)
    report = report_fitness(-jnp.stack([plus, other], axis=1).reshape(-1), found, rank=rank, aux=None)
    return report._replace(mean_fitness=-base) if estimator.unperturbed else report
