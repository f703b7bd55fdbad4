"""Settings of a reasoning run whose matrices are int8: their noise, their optimizer.

A member sees Q + sigma E in place of the integers Q of `experiments.models.int8`. Integers move by Adam, whose step size is in
integers, or by the rule of the EGGROLL paper (`eggroll.standardised_sign`); scales stay, all else evolves as floats do.
"""

import dataclasses
from typing import Any

import optax

import eggroll
from eggroll.llm.int8 import INTEGERS, SCALE, optimizer_labels


@dataclasses.dataclass(frozen=True)
class Int8:
    """How int8 matrices evolve, where `weights` is int8."""

    sigma: float = 3.0
    """Standard deviation of their perturbation, in integers; 0.4 in the paper for 7B parameters, the small model needs more."""
    learning_rate: float = 0.3
    """Step size of Adam, in integers."""
    threshold: float | None = None
    """The paper's rule in place of that step size: what Adam says is standardised over a matrix, and entries of at least this
    size move by one integer. None: the step size."""

    def check(self) -> None:
        """Raise ValueError for settings out of range."""
        for name in ("sigma", "learning_rate"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"int8.{name} must be a finite number > 0, got {getattr(self, name)}.")
        if self.threshold is not None and not 0 <= self.threshold < float("inf"):
            raise ValueError(f"int8.threshold must be a finite number >= 0 or None, got {self.threshold}.")

    def rules(self, *, sigma: float, rank: int) -> list[tuple[str, Any]]:
        """Return the rules of the noise of matrices; `sigma` is that of the run, of floats."""
        noise = eggroll.LowRank(rank, sigma_multiplier=self.sigma / sigma)
        return [(f".*/{SCALE}", eggroll.Frozen()), (f".*/{INTEGERS}", noise)]

    def optimizer(self, floats: optax.GradientTransformation) -> optax.GradientTransformation:
        """Return an optimizer of integers and, by `floats`, of all else."""
        last = [optax.scale_by_learning_rate(self.learning_rate)]
        if self.threshold is not None:
            last = [eggroll.standardised_sign(self.threshold), optax.scale(-1.0)]
        integers = optax.chain(optax.scale_by_adam(), *last)
        return optax.multi_transform({INTEGERS: integers, "float": floats}, optimizer_labels)
