"""The unperturbed model on the problems of a generation, next to its members: how much a perturbation changes, and costs.

    texts_changed  share of the members' completions that are not the unperturbed model's for the same problem
    kept           (mean reward of the members - least) / (reward of the unperturbed model - least)

It costs as much as one more member of each group that is compared, so a run does it once between two checks.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

import eggroll
from eggroll.devices.processes import local
from eggroll.population.metrics import Metrics

ENOUGH = 16  # pairs to judge the share of tied ones by
NEARLY_ALL = 0.9  # tied pairs that a run warns of
GROUPS = 8  # of members with problems of their own that are compared, at most


class Comparison(NamedTuple):
    """The unperturbed model and the members on the problems of G groups."""

    texts_changed: float
    unperturbed: np.ndarray  # [G, prompts], fitness of the unperturbed model for each problem
    members: np.ndarray  # [G, prompts], mean fitness of the members of the group
    least: float  # lowest fitness for a problem

    @property
    def kept(self) -> float:
        """The share of the unperturbed reward that the members keep; NaN if there is none."""
        above = float(self.unperturbed.mean()) - self.least
        return (float(self.members.mean()) - self.least) / above if above > 0 else math.nan

    @property
    def kept_error(self) -> float:
        """The standard error of `kept` over problems: of a ratio of two means, to first order."""
        own, above = (self.unperturbed - self.least).reshape(-1), float(self.unperturbed.mean()) - self.least
        residuals = (self.members - self.least).reshape(-1) - self.kept * own
        return float(residuals.std(ddof=1)) / math.sqrt(own.size) / above if own.size > 1 and above > 0 else math.nan

    @property
    def has_signal(self) -> bool:
        """Whether anything scored more than the least."""
        return max(float(self.unperturbed.max()), float(self.members.max())) > self.least

    @property
    def has_collapsed(self) -> bool:
        """Whether the members lose more than half of the reward, certain to two standard errors."""
        return self.kept + 2 * self.kept_error < 0.5

    def advice(self, tied_pairs: float, *, pairs: int, sigma: float) -> str:
        """Say what to change if nearly all pairs are tied, or if the members have collapsed; nothing of too few pairs."""
        if pairs < ENOUGH or not self.has_signal:
            return ""
        if self.has_collapsed:
            rewards = (
                f"a mean reward of {self.members.mean():.3g} where the unperturbed model has {self.unperturbed.mean():.3g}"
            )
            return f"at sigma {sigma:g} the members have {rewards}: try a smaller sigma; --probe measures several in a minute."
        if tied_pairs >= NEARLY_ALL:
            cause = "sigma is too small" if self.texts_changed < 0.5 else "ask more problems of a member (--prompts)"
            return (
                f"at sigma {sigma:g}, {tied_pairs:.0%} of the pairs have members of the same reward, which teach nothing, and "
                f"{self.texts_changed:.0%} of the texts differ from the unperturbed model's: {cause}; --probe measures several "
                "sigmas in a minute."
            )
        return ""


def compare(
    texts: Sequence[str], unperturbed: Sequence[str], *, fitness: np.ndarray, own: np.ndarray, groups: int
) -> Comparison:
    """Compare.

    Args:
        texts: of N members, member by member.
        unperturbed: of the unperturbed model, for the problems of the first G groups.
        fitness: [N, prompts], of the members.
        own: [G, prompts], of the unperturbed model.
        groups: of members, of which the first G are compared.
    """
    count, size = len(own), len(fitness) // groups
    known = np.array(unperturbed, object).reshape(count, 1, -1)
    members = np.array(texts[: size * len(unperturbed)], object).reshape(count, size, -1)
    of_group = fitness[: count * size].reshape(count, size, -1)
    changed = members != known
    return Comparison(float(changed.mean()), own, of_group.mean(axis=1), float(min(of_group.min(), own.min())))


@dataclasses.dataclass(frozen=True)
class Compared(eggroll.External):
    """`External` whose `score(outputs, known, unperturbed)` also gets what the unperturbed parameters give, if it is due.

    Args:
        complete: compiled `(params, inputs) -> outputs` of unperturbed parameters.
        every: generations from one comparison to the next; None is given to `score` in the others.
    """

    complete: Callable
    every: int

    def step(self, state: eggroll.ESState, batch: Any) -> tuple[eggroll.ESState, Metrics]:
        """As `External.step`."""
        inputs, known = batch
        is_due = int(state.generation) % self.every == 0
        unperturbed = jax.device_get(self.complete(local(state.params), inputs)) if is_due else None
        given = dataclasses.replace(self, score=lambda outputs, known: self.score(outputs, known, unperturbed))
        return super(Compared, given).step(state, (inputs, known))
