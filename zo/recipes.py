"""Recipes: known zeroth-order methods as settings of `ZerothOrder`.

tuner = zo.mezo(loss, learning_rate=1e-6)
state = tuner.init(params, key=jax.random.key(0))
state, metrics = tuner.step(state, batch)
"""

from collections.abc import Callable
from typing import Any

from eggroll.rules import Dense, Flipout, LowRank, Perturbation
from zo.blocks import Blocks
from zo.optimizers import Descent
from zo.strategy import ZerothOrder

Rate = float | Callable[[Any], Any]  # a constant, or an optax schedule


def mezo(
    loss: Callable | Blocks,
    *,
    learning_rate: Rate,
    sigma: float = 1e-3,
    directions: int = 1,
    weight_decay: float = 0.0,
    second_moment: float | None = None,
    perturbation: Perturbation = Dense("normal"),
    **options: Any,
) -> ZerothOrder:
    """MeZO (arXiv 2305.17333), and n-SPSA with more directions: two forwards a direction, dense normal noise.

    Args:
        loss: see `ZerothOrder`.
        learning_rate: 1e-7 to 1e-6 for large models; constant or a schedule.
        sigma: MeZO's epsilon.
        directions: perturbations a step.
        weight_decay: decoupled; biases and normalisation are exempt.
        second_moment: MEAZO's decay rate, None: plain MeZO.
        perturbation: noise of the directions.
        **options: other fields of `ZerothOrder`; an unknown one is a TypeError.
    """
    optimizer = Descent(learning_rate, weight_decay=weight_decay, second_moment=second_moment)
    return ZerothOrder(loss, directions=directions, sigma=sigma, optimizer=optimizer, perturbation=perturbation, **options)


def lozo(
    loss: Callable | Blocks,
    *,
    learning_rate: Rate,
    sigma: float = 1e-3,
    rank: int = 2,
    refresh: int = 50,
    directions: int = 1,
    weight_decay: float = 0.0,
    second_moment: float | None = None,
    **options: Any,
) -> ZerothOrder:
    """LOZO (arXiv 2410.07698): low-rank normal noise whose right factor lasts `refresh` steps; vectors get dense noise.

    The noise is U V^T / sqrt(rank), of unit variance, where LOZO has U V^T: a sigma here is sqrt(rank) of theirs, and with its
    1 / rank in the update, theirs times a rate is the same rate here.

    Args:
        loss: see `ZerothOrder`.
        learning_rate: constant or a schedule.
        sigma: standard deviation of the perturbation.
        rank: of the perturbation of a matrix.
        refresh: steps that share a right factor.
        directions: perturbations a step.
        weight_decay: decoupled; biases and normalisation are exempt.
        second_moment: MEAZO's decay rate.
        **options: other fields of `ZerothOrder`.
    """
    noise = LowRank(rank, "normal", refresh=refresh)
    rates: dict[str, Any] = dict(learning_rate=learning_rate, weight_decay=weight_decay, second_moment=second_moment)
    return mezo(loss, sigma=sigma, directions=directions, perturbation=noise, **rates, **options)


def fzoo(
    loss: Callable | Blocks,
    *,
    learning_rate: Rate,
    sigma: float = 1e-4,
    directions: int = 8,
    weight_decay: float = 0.0,
    perturbation: Perturbation = Dense("rademacher"),
    **options: Any,
) -> ZerothOrder:
    """FZOO (arXiv 2506.09034): one-sided Rademacher directions, the step normalised by the spread of their losses.

    Args:
        loss: see `ZerothOrder`.
        learning_rate: 5e-5 for large models; constant or a schedule.
        sigma: standard deviation of the perturbation.
        directions: >= 2; a step takes directions + 1 forwards.
        weight_decay: decoupled; biases and normalisation are exempt.
        perturbation: noise of the directions.
        **options: other fields of `ZerothOrder`.
    """
    more: dict[str, Any] = dict(directions=directions, weight_decay=weight_decay, perturbation=perturbation)
    return mezo(loss, learning_rate=learning_rate, sigma=sigma, estimator="fzoo", **more, **options)


def spsa15(
    loss: Callable | Blocks,
    *,
    learning_rate: Rate | None = None,
    sigma: float = 1e-4,
    directions: int = 16,
    weight_decay: float = 0.0,
    perturbation: Perturbation = Dense("rademacher"),
    **options: Any,
) -> ZerothOrder:
    """1.5-SPSA (arXiv 2609.38095): many two-sided probes a step, those of large curvature weigh less.

    Args:
        loss: see `ZerothOrder`.
        learning_rate: None: sigma, as there, where the two cancel.
        sigma: standard deviation of the perturbation.
        directions: probes; a step takes 2 directions + 1 forwards.
        weight_decay: decoupled; biases and normalisation are exempt.
        perturbation: noise of the directions.
        **options: other fields of `ZerothOrder`.
    """
    rate = sigma if learning_rate is None else learning_rate
    more: dict[str, Any] = dict(directions=directions, weight_decay=weight_decay, perturbation=perturbation)
    return mezo(loss, learning_rate=rate, sigma=sigma, estimator="curvature", **more, **options)


def grzo(
    loss: Callable | Blocks,
    *,
    learning_rate: Rate,
    sigma: float = 1e-3,
    directions: int = 16,
    weight_decay: float = 0.0,
    perturbation: Perturbation = Flipout("normal"),
    **options: Any,
) -> ZerothOrder:
    """GRZO (arXiv 2606.02857): every example of the batch sees a direction of its own, in two forwards of the batch.

    Matrices get `Flipout` noise, which all directions share but for the signs of its rows and columns; vectors get dense noise
    of their own. The differences are divided by their standard deviation over the batch.

    Args:
        loss: see `ZerothOrder`; it sees one example at a time, with a leading axis of 1.
        learning_rate: constant or a schedule.
        sigma: standard deviation of the perturbation.
        directions: >= 2, the examples of a batch.
        weight_decay: decoupled; biases and normalisation are exempt.
        perturbation: noise of the directions.
        **options: other fields of `ZerothOrder`.
    """
    more: dict[str, Any] = dict(directions=directions, weight_decay=weight_decay, perturbation=perturbation)
    return mezo(loss, learning_rate=learning_rate, sigma=sigma, estimator="grzo", **more, **options)


RECIPES: dict[str, Callable[..., ZerothOrder]] = {
    "mezo": mezo,
    "lozo": lozo,
    "fzoo": fzoo,
    "spsa15": spsa15,
    "grzo": grzo,
}
