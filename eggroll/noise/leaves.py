"""The noise of one parameter: a type for every role.

    FrozenLeaf     "frozen"     none
    DenseLeaf      "dense"      independent entries
    LowRankLeaf    "low-rank"   left^T right / sqrt(r) for every layer of a stack, over rows x columns
    FlipoutLeaf    "flipout"    U o (left^T right): each pair has its own signs, all pairs share U

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
from eggroll.noise.rules import Flipout, Integer, LowRank, Noisy, Spec
from eggroll.noise.variables import Collection

AxesOfNoise = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]  # stack, rows, columns


def at_least_float32(dtype: Any) -> Any:
    """The dtype that sums of values of a dtype are formed in: float64 of float64, else float32."""
    return dtype if jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize > 4 else jnp.dtype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class LeafPlan:
    """Fields of every role: `spec` is what the rules ask for, `role` what the parameter gets, `reason` why."""

    role: ClassVar[str]  # "low-rank", "flipout", "dense" or "frozen"

    path: str
    shape: tuple[int, ...]
    dtype: Any
    spec: Spec
    reason: str
    converted: Any = None  # floating dtype that the function converts a quantised parameter to; None for all others
    stack: tuple[int, ...] = ()  # axes with independent noise per index; the leading ones where the noise is dense
    # Why members also build a parameter that is lazy in products; "": they do not.
    built: str = dataclasses.field(default="", kw_only=True, compare=False)

    @property
    def evaluation(self) -> str:
        """What a member's function sees: "shared", "lazy", "lazy + built", or "copy", an array of the member's own."""
        return "shared"

    @property
    def copy_bytes(self) -> int:
        """Bytes of the arrays of its own that a member has of the parameter."""
        has_copy = self.evaluation in ("copy", "lazy + built")
        return math.prod(self.shape) * self.noise_dtype.itemsize if has_copy else 0

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

    def decode(self, words: Array) -> Array:
        """Turn this leaf's random words into its noise.

        Args:
            words: uint32 [*stack, self.words].

        Returns:
            An array of the leaf's shape; int8 of integer noise.
        """
        return self.decode_values(words, self.values).reshape(self.shape)


@dataclasses.dataclass(frozen=True)
class FactoredLeaf(PerturbedLeaf):
    """Fields of the roles whose noise is a product of factors."""

    rows: tuple[int, ...] = ()  # axes spanned by the left factor
    columns: tuple[int, ...] = ()  # axes spanned by the right factor

    @property
    def evaluation(self) -> str:
        """Products use the factors; other uses are of an array that the member builds."""
        return "lazy + built" if self.built else "lazy"

    @property
    def axes(self) -> AxesOfNoise:
        """Axes that are stacked, spanned by the left and spanned by the right factor."""
        return self.stack, self.rows, self.columns

    @property
    def rank(self) -> int:
        """Number of terms r."""
        raise NotImplementedError

    @property
    def _terms(self) -> tuple[int, int]:
        return self.rank, 2

    @property
    def matrix(self) -> tuple[int, int]:
        """Size of a layer as a matrix: (m, n), rows by columns."""
        return math.prod(self.sizes(self.rows)), math.prod(self.sizes(self.columns))

    @property
    def values(self) -> int:
        """Random values per address: r (m + n)."""
        return self.rank * sum(self.matrix)

    @property
    def noise_bytes(self) -> int:
        """Bytes of noise one member holds for this leaf: packed signs, or values."""
        if self.distribution == "rademacher" and not self.integer:
            return math.prod(self.sizes(self.stack)) * 4 * self.words
        return super().noise_bytes

    def decode(self, words: Array) -> Factors:
        """Turn this leaf's random words into its noise.

        Args:
            words: uint32 [*stack, self.words].

        Returns:
            Factors [*stack, r, m] and [*stack, r, n].
        """
        m, n = self.matrix
        if self.integer:
            return addresses.split_factors(self.decode_values(words, self.values), rank=self.rank, m=m, n=n)
        return addresses.decode_factors(words, rank=self.rank, m=m, n=n, distribution=self.distribution, dtype=self.noise_dtype)


@dataclasses.dataclass(frozen=True)
class LowRankLeaf(FactoredLeaf):
    """Low-rank noise left^T right / sqrt(r)."""

    role = "low-rank"
    spec: LowRank | Integer
    implementation: str = "reference"  # of its products, "reference" or "mosaic_gpu"

    @property
    def rank(self) -> int:
        """Number of terms r."""
        return self.spec.rank

    @property
    def refresh(self) -> int:
        """Generations that share the right factor."""
        return self.spec.refresh if isinstance(self.spec, LowRank) else 1


@dataclasses.dataclass(frozen=True)
class FlipoutLeaf(FactoredLeaf):
    """Flipout noise U o (left^T right): the factors are signs, U is dense and shared by all pairs."""

    role = "flipout"
    spec: Flipout

    @property
    def rank(self) -> int:
        """Number of terms: 1."""
        return 1

    @property
    def distribution(self) -> str:
        """Of a pair's own values, the signs."""
        return "rademacher"

    @property
    def shared(self) -> DenseLeaf:
        """The plan of U."""
        about = self.path, self.shape, self.dtype, self.spec, self.reason
        return DenseLeaf(*about, converted=self.converted, stack=self.stack)
