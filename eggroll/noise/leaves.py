"""The noise of one parameter: a type for every role.

    FrozenLeaf     "frozen"     none
    DenseLeaf      "dense"      independent entries
    LowRankLeaf    "low-rank"   left^T right / sqrt(r) for every layer of a stack, over rows x columns      (`factored`)
    BuiltLeaf      "built"      the same, of a parameter that no product uses: members build it             (`factored`)
    FlipoutLeaf    "flipout"    U o (left^T right): each pair has its own signs, all pairs share U          (`factored`)

The quoted name is `plan.leaves[i].role`.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import jax.numpy as jnp
from jax import Array

from eggroll.noise import addresses, integer
from eggroll.noise.addresses import Factors
from eggroll.noise.integer import IntegerNoise
from eggroll.noise.once import computed_once
from eggroll.noise.rules import Integer, Noisy, Spec
from eggroll.noise.variables import Collection

LATE = 1 << 16  # entries of dense noise from which on it is drawn where it is read; smaller ones are drawn in one call
AxesOfNoise = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]  # stack, rows, columns


def at_least_float32(dtype: Any) -> Any:
    """The dtype that sums of values of a dtype are formed in: float64 of float64, else float32."""
    return dtype if jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize > 4 else jnp.dtype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class LeafPlan:
    """Fields of every role: `spec` is what the rules ask for, `role` what the parameter gets, `reason` why."""

    role: ClassVar[str]  # "low-rank", "built", "flipout", "dense" or "frozen"

    path: str
    shape: tuple[int, ...]
    dtype: Any
    spec: Spec
    reason: str
    converted: Any = None  # floating dtype that the function converts a quantised parameter to; None for all others
    stack: tuple[int, ...] = ()  # axes with independent noise per index; the leading ones where the noise is dense
    # Why members also build a parameter that is lazy in products, and how many of its entries at most; "": they do not.
    built: tuple[str, int] = dataclasses.field(default=("", 0), kw_only=True, compare=False)

    @property
    def evaluation(self) -> str:
        """What a member's function sees: "shared", "lazy", "lazy + built", or "copy", an array of the member's own."""
        return "shared"

    @property
    def copy_bytes(self) -> int:
        """Bytes of the arrays of its own that a member has of the parameter."""
        return (math.prod(self.shape) if self.evaluation == "copy" else self.built[1]) * self.noise_dtype.itemsize

    @property
    def work(self) -> float:
        """Multiplications of a product with the noise, as a share of those with the parameter; 0 where they are one product."""
        return 0.0

    def sizes(self, axes: Sequence[int]) -> tuple[int, ...]:
        """Sizes of the given axes."""
        return tuple(self.shape[axis] for axis in axes)

    @property
    def axes(self) -> AxesOfNoise:
        """Axes that are stacked, spanned by the left and spanned by the right factor."""
        return self.stack, (), ()

    @property
    def quantised(self) -> bool:
        """Whether the parameter is int8 under floating noise."""
        return self.converted is not None

    @property
    def noise_dtype(self) -> Any:
        """Dtype of floating noise: the parameter's own, or the dtype that a quantised one is converted to."""
        return self.converted or self.dtype

    @property
    def refresh(self) -> int:
        """Generations that share the right factor; 1 where there is none."""
        return 1

    @property
    def integer(self) -> IntegerNoise | None:
        """Integer noise of an int8 parameter; None for all others."""
        return None

    @property
    def noise_bytes(self) -> int:
        """Bytes of noise one member holds for this leaf: packed signs, or values."""
        return 0


@dataclasses.dataclass(frozen=True)
class FrozenLeaf(LeafPlan):
    """No noise."""

    role = "frozen"
    collection: Collection | None = None  # that the leaf belongs to; None: it is a parameter


@dataclasses.dataclass(frozen=True)
class PerturbedLeaf(LeafPlan):
    """Fields of the roles with noise."""

    spec: Noisy

    @property
    def distribution(self) -> str:
        """Of the values of a pair."""
        return self.spec.distribution

    @property
    def sigma_multiplier(self) -> float:
        """This leaf's sigma relative to the strategy's; 1 of integer noise, which has a shift instead."""
        return 1.0 if isinstance(self.spec, Integer) else self.spec.sigma_multiplier

    @property
    def integer(self) -> IntegerNoise | None:
        """Integer noise of an int8 parameter; None for all others."""
        if not isinstance(self.spec, Integer):
            return None
        spec, rank, factors = self.spec, *self._terms
        return IntegerNoise(spec.distribution, spec.shift, rank, factors, spec.update == "sign")

    @property
    def _terms(self) -> tuple[int, int]:
        """Rank of the noise and factors of each term."""
        raise NotImplementedError

    @property
    def values(self) -> int:
        """Random values per address."""
        raise NotImplementedError

    @property
    def words(self) -> int:
        """Random words per address."""
        needed = integer.words_needed if self.integer else addresses.words_needed
        return needed(self.values, self.distribution)

    @property
    def noise_bytes(self) -> int:
        """Bytes of noise one member holds for this leaf: packed signs, or values."""
        return math.prod(self.sizes(self.stack)) * self.values * self.noise_dtype.itemsize

    @property
    def is_late(self) -> bool:
        """Whether a member draws the noise where its function reads the parameter, a layer or some rows at a time."""
        return False

    @property
    def draws_alone(self) -> bool:
        """Whether every word is computed as it is decoded: many words, each for one value."""
        return self.is_late and self.distribution == "normal"

    @property
    def values_per_word(self) -> int:
        """Values that a random word gives."""
        if self.distribution == "rademacher":
            return addresses.WORD
        return 2 if self.integer else 1

    def decode_values(self, words: Array, count: int) -> Array:
        """Turn random words [..., words] into values [..., count] of the noise, or of its factors; int8 of integer noise."""
        if self.integer:
            return integer.decode(words, count, distribution=self.distribution)
        return addresses.decode(words, count, distribution=self.distribution, dtype=self.noise_dtype)

    def decode(self, words: Array) -> Factors | Array:
        """Turn this leaf's random words, uint32 [*stack, self.words], into its noise."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class DenseLeaf(PerturbedLeaf):
    """Noise with independent entries."""

    role = "dense"

    @property
    def evaluation(self) -> str:
        """A member has an array of its own."""
        return "copy"

    @property
    def _terms(self) -> tuple[int, int]:
        return 1, 1

    @property
    def values(self) -> int:
        """Random values per address: the size of a layer."""
        return math.prod(self.shape) // math.prod(self.sizes(self.stack))

    @property
    def is_late(self) -> bool:
        """Whether a member draws the noise where its function reads the parameter, a layer or some rows at a time."""
        return math.prod(self.shape) >= LATE and not self.integer and not self.quantised

    def values_at(self, keys: Array, index: Array) -> Array:
        """Floating values at indices of their addresses, each on its own; arguments as for `addresses.words_at`."""
        if self.distribution == "rademacher":
            bit = index % addresses.WORD
            words = addresses.words_at(keys, index // addresses.WORD) >> bit
            return (1 - 2 * (words & 1).astype(jnp.int32)).astype(self.noise_dtype)
        return self.decode_values(addresses.words_at(keys, index)[..., None], 1)[..., 0]

    def decode(self, words: Array) -> Array:
        """Turn this leaf's random words into its noise.

        Args:
            words: uint32 [*stack, self.words].

        Returns:
            An array of the leaf's shape; int8 of integer noise.
        """
        values = self.decode_values(words, self.values).reshape(self.shape)
        return computed_once(values) if self.is_late else values
