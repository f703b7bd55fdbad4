"""Options of how int8 matrices evolve."""

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True)
class Int8:
    """How int8 matrices evolve, if `weights` is int8."""

    sigma: float = 3.0
    """Standard deviation of their perturbation, in integers. The paper has 0.4 for 7B parameters; small models need more."""
    optimizer: Literal["adam", "sgd"] = "adam"
    """adam, or sgd, which keeps no moments: with --precision feedback nothing is kept but the integers."""
    learning_rate: float = 0.3
    """Step size of Adam, in integers; of sgd about that for fitness of unit variance."""
    threshold: float | None = None
    """The paper's rule instead of a step size: Adam's update is standardised over a matrix, and entries of at least this size
    move by one integer. None: use the step size."""
    window: int = 16
    """With --precision feedback: steps that rounding errors are carried over. Every update computes half as many again."""

    def check(self) -> None:
        """Raise ValueError for settings out of range."""
        for name in ("sigma", "learning_rate"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"int8.{name} must be a finite number > 0, got {getattr(self, name)}.")
        if self.window < 1:
            raise ValueError(f"int8.window must be an integer >= 1, got {self.window}.")
        if self.threshold is not None and not 0 <= self.threshold < float("inf"):
            raise ValueError(f"int8.threshold must be a finite number >= 0 or None, got {self.threshold}.")
