"""How a population is laid out (pairs, signs, chunks, shared batches), and the scalars that identify its perturbations."""

import dataclasses
import numbers
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

SIGNS = (1.0, -1.0)


@dataclasses.dataclass(frozen=True)
class PopulationLayout:
    """How a population is laid out and run.

    Args:
        num_pairs: P; the population has N = 2 P members, member index 2 p for sign +1 and 2 p + 1 for sign -1.
        members_per_batch: None: one batch is shared by all; 1: the batch has a leading axis of N, one entry per member;
            g (even, dividing N): a leading axis of N / g, consecutive groups of g members share an entry; 2: one for a pair.
        chunk_pairs: evaluate this many pairs at a time; None: all at once.
        signs: of the members of a pair; (1.0,) for one-sided estimates, whose "pairs" have one member.
        same_key: all members get the same key, not one for every pair.
        apart: the two members of a pair are entries of their own, so that devices can share a pair: `num_pairs` counts
            entries, entry j being pair j // S with sign j % S of the S signs, and results have leading axes [entries, 1].
    """

    num_pairs: int
    members_per_batch: int | None = None
    chunk_pairs: int | None = None
    signs: tuple[float, ...] = SIGNS
    same_key: bool = False
    apart: bool = False

    @classmethod
    def of_members(cls, population_size: int, members_per_batch: int | None, chunk_size: int | None) -> "PopulationLayout":
        """Layout from counts of members.

        Raises:
            ValueError: a count is odd, too small, or does not divide the population.
        """
        if not _is_even(population_size):
            raise ValueError(f"population_size must be an even integer >= 2 (antithetic pairs), got {population_size!r}.")
        g = members_per_batch
        if g is not None and not (
            isinstance(g, numbers.Integral) and g >= 1 and (g == 1 or g % 2 == 0) and population_size % g == 0
        ):
            raise ValueError(
                f"members_per_batch must be None, 1 or even and divide population_size {population_size}, got {g!r}."
            )
        if chunk_size is not None and not (
            isinstance(chunk_size, numbers.Integral) and chunk_size >= 2 and chunk_size % 2 == 0
        ):
            raise ValueError(f"chunk_size must be an even integer >= 2 or None, got {chunk_size!r}.")
        return cls(population_size // 2, members_per_batch, None if chunk_size is None else chunk_size // 2)

    @property
    def population_size(self) -> int:
        """N = 2 P; P where estimates are one-sided."""
        return self.num_pairs if self.apart else len(self.signs) * self.num_pairs

    @property
    def is_chunked(self) -> bool:
        """Whether the pairs run in more than one chunk."""
        return self.chunk_pairs is not None and self.chunk_pairs < self.num_pairs

    def check_batch(self, batch: Any) -> None:
        """Raise ValueError unless every leaf of `batch` has the leading axis that `members_per_batch` asks for."""
        if self.members_per_batch is None:
            return
        if not jax.tree.leaves(batch):
            raise ValueError(
                f"members_per_batch {self.members_per_batch} has no effect without a batch; give one, or leave it out."
            )
        expected = self.population_size // self.members_per_batch
        for leaf in jax.tree.leaves(batch):
            if jnp.ndim(leaf) == 0 or jnp.shape(leaf)[0] != expected:
                raise ValueError(
                    f"batch leaves need a leading axis of {expected} (population_size {self.population_size} / "
                    f"members_per_batch {self.members_per_batch}), got shape {jnp.shape(leaf)}."
                )

    def one_member(self, batch: Any) -> Any:
        """Abstract shapes of one member's share of a batch of arrays, scalars or shapes."""
        shapes = jax.eval_shape(lambda x: x, batch)
        drop = 0 if self.members_per_batch is None else 1
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[drop:], x.dtype), shapes)


def _is_even(count: Any) -> bool:
    return isinstance(count, numbers.Integral) and int(count) >= 2 and int(count) % 2 == 0


class Scalars(NamedTuple):
    """What identifies the perturbations of a generation."""

    noise_key: Array  # typed key of the run
    noise_generation: Array  # int32 [], generation // noise_reuse
    sigma: Array | None  # float32 []; not used for integer noise
    evaluation_key: Array  # split per pair, unless the layout has `same_key`
