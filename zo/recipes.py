"""Recipes: known zeroth-order methods as settings of `ZerothOrder`.

    tuner = zo.mezo(loss, learning_rate=1e-6)
    state = tuner.init(params, key=jax.random.key(0))
    state, metrics = tuner.step(state, batch)

All are `mezo` with other defaults, and take what `mezo` takes, but for what they set themselves.
"""

from collections.abc import Callable
from typing import Any

from eggroll.noise import addresses
from eggroll.noise.rules import Dense, Flipout, LowRank, Perturbation
from eggroll.zo.blocks import Blocks
from eggroll.zo.optimizers.descent import Descent
from eggroll.zo.optimizers.rebuilt_adam import RebuiltAdam
from eggroll.zo.strategy import ZerothOrder

Loss = Callable | Blocks
Rate = float | Callable[[Any], Any]  # a constant, or an optax schedule


def mezo(
    loss: Loss,
    *,
    learning_rate: Rate,
    sigma: float = 1e-3,
    directions: int = 1,
    weight_decay: float = 0.0,
    second_moment: float | None = None,
    adam: RebuiltAdam | None = None,
    momentum: float | None = None,
    perturbation: Perturbation | None = None,
    **options: Any,
) -> ZerothOrder:
    """MeZO (arXiv 2305.17333), and n-SPSA with more directions: two forwards a direction, dense noise.

    Rademacher noise by default, which is drawn several times as fast as the paper's normal noise and learned as much in the
    comparison on a real model (experiments/RESULTS.md); `perturbation=Dense("normal")` is the paper's.

    Args:
        loss: see `ZerothOrder`.
        learning_rate: 1e-7 to 1e-6 for large models; constant or a schedule.
        sigma: standard deviation of the perturbation, MeZO's epsilon.
        directions: perturbations a step.
        weight_decay: decoupled; biases and normalisation are exempt.
        second_moment: MEAZO's decay rate, None: plain MeZO.
        adam: see `adamezo`.
        momentum: see `lozo_m`.
        perturbation: noise of the directions; None: dense, of signs or, with `adam`, normal, since the squares of signs are all
            equal and would leave its second moment nothing.
        **options: other fields of `ZerothOrder`; an unknown one is a TypeError.
    """
    optimizer = Descent(learning_rate, weight_decay=weight_decay, second_moment=second_moment, adam=adam, momentum=momentum)
    noise = Dense("rademacher" if adam is None else "normal") if perturbation is None else perturbation
    return ZerothOrder(loss, directions=directions, sigma=sigma, optimizer=optimizer, perturbation=noise, **options)


def adamezo(
    loss: Loss, *, learning_rate: Rate, b1: float = 0.9, b2: float = 0.999, history: int = 10, **options: Any
) -> ZerothOrder:
    """AdaMeZO (arXiv 2605.00650): MeZO with Adam's moments, rebuilt from the coefficients of the last steps.

    Args:
        loss: see `ZerothOrder`.
        learning_rate: a step moves a parameter by about so much, as with Adam.
        b1: decay rate of the first moment.
        b2: of the second.
        history: steps that the moments are made of; a step draws the noise of all of them again.
        **options: of `mezo`.
    """
    return mezo(loss, learning_rate=learning_rate, adam=RebuiltAdam(b1, b2, history), **options)


def lozo(
    loss: Loss,
    *,
    learning_rate: Rate,
    rank: int = 2,
    refresh: int = 50,
    distribution: addresses.Distribution = "normal",
    **options: Any,
) -> ZerothOrder:
    """LOZO (arXiv 2410.07698): low-rank normal noise whose right factor lasts `refresh` steps; vectors get dense noise.

    The noise is U V^T / sqrt(rank), of unit variance, where LOZO has U V^T: a sigma here is sqrt(rank) of theirs, and with its
    1 / rank in the update, theirs times a rate is the same rate here.

    Args:
        loss: see `ZerothOrder`.
        learning_rate: constant or a schedule.
        rank: of the perturbation of a matrix.
        refresh: steps that share a right factor.
        distribution: of the factors' entries.
        **options: of `mezo`.
    """
    return mezo(loss, learning_rate=learning_rate, perturbation=LowRank(rank, distribution, refresh=refresh), **options)


def lozo_m(loss: Loss, *, learning_rate: Rate, momentum: float = 0.9, **options: Any) -> ZerothOrder:
    """LOZO-M (arXiv 2410.07698): LOZO with momentum in its subspace; `init` needs a batch.

    Args:
        loss: see `ZerothOrder`.
        learning_rate: constant or a schedule.
        momentum: its decay rate, b in b N + (1 - b) c U.
        **options: of `lozo`.
    """
    return lozo(loss, learning_rate=learning_rate, momentum=momentum, **options)


def fzoo(
    loss: Loss,
    *,
    learning_rate: Rate,
    sigma: float = 1e-4,
    directions: int = 8,
    perturbation: Perturbation = Dense("rademacher"),
    **options: Any,
) -> ZerothOrder:
    """FZOO (arXiv 2506.09034): one-sided Rademacher directions, the step normalised by the spread of their losses.

    Args:
        loss: see `ZerothOrder`.
        learning_rate: 5e-5 for large models; constant or a schedule.
        sigma: standard deviation of the perturbation.
        directions: >= 2; a step takes directions + 1 forwards.
        perturbation: noise of the directions.
        **options: of `mezo`.
    """
    return mezo(
        loss,
        learning_rate=learning_rate,
        sigma=sigma,
        directions=directions,
        perturbation=perturbation,
        estimator="fzoo",
        **options,
    )


def spsa15(
    loss: Loss,
    *,
    learning_rate: Rate | None = None,
    sigma: float = 1e-4,
    directions: int = 16,
    perturbation: Perturbation = Dense("rademacher"),
    **options: Any,
) -> ZerothOrder:
    """1.5-SPSA (arXiv 2609.38095): many two-sided probes a step, those of large curvature weigh less.

    Args:
        loss: see `ZerothOrder`.
        learning_rate: None: sigma, as there, where the two cancel.
        sigma: standard deviation of the perturbation.
        directions: probes; a step takes 2 directions + 1 forwards.
        perturbation: noise of the directions.
        **options: of `mezo`.
    """
    return mezo(
        loss,
        learning_rate=sigma if learning_rate is None else learning_rate,
        sigma=sigma,
        directions=directions,
        perturbation=perturbation,
        estimator="curvature",
        **options,
    )


def grzo(
    loss: Loss, *, sigma: float = 1e-3, directions: int = 16, perturbation: Perturbation = Flipout("normal"), **options: Any
) -> ZerothOrder:
    """GRZO (arXiv 2606.02857): every example of the batch sees a direction of its own, in two forwards of the batch.

    Matrices get `Flipout` noise, which all directions share but for the signs of its rows and columns; vectors get dense noise
    of their own. The differences are divided by their standard deviation over the batch.

    Args:
        loss: see `ZerothOrder`; it sees one example at a time, with a leading axis of 1.
        sigma: standard deviation of the perturbation.
        directions: >= 2, the examples of a batch.
        perturbation: noise of the directions.
        **options: of `mezo`.
    """
    return mezo(loss, sigma=sigma, directions=directions, perturbation=perturbation, estimator="grzo", **options)


RECIPES: dict[str, Callable[..., ZerothOrder]] = {
    "mezo": mezo,
    "adamezo": adamezo,
    "lozo": lozo,
    "lozo_m": lozo_m,
    "fzoo": fzoo,
    "spsa15": spsa15,
    "grzo": grzo,
}
