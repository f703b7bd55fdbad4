"""The noise of one parameter whose noise is a product of factors; the other roles are in `leaves`."""

import dataclasses
import math

from jax import Array

from eggroll.noise import addresses
from eggroll.noise.addresses import Factors
from eggroll.noise.leaves import AxesOfNoise, DenseLeaf, PerturbedLeaf
from eggroll.noise.rules import Flipout, Integer, LowRank


@dataclasses.dataclass(frozen=True)
class FactoredLeaf(PerturbedLeaf):
    """Fields of the roles whose noise is a product of factors."""

    rows: tuple[int, ...] = ()  # axes spanned by the left factor
    columns: tuple[int, ...] = ()  # axes spanned by the right factor

    @property
    def evaluation(self) -> str:
        """Products use the factors; other uses are of an array that the member builds."""
        return "lazy + built" if self.built[0] else "lazy"

    @property
    def work(self) -> float:
        """Multiplications with the factors, r (m + n), as a share of those with the parameter, m n."""
        return self.rank * sum(self.matrix) / math.prod(self.matrix)

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
class BuiltLeaf(LowRankLeaf):
    """The noise of a `LowRankLeaf` for a parameter that no product uses: every member builds the sum.

    It needs r (m + n) random values where dense noise needs m n, and has the low-rank update.
    """

    role = "built"

    @property
    def evaluation(self) -> str:
        """A member has an array of its own."""
        return "copy"

    @property
    def work(self) -> float:
        """None: the sum is one product."""
        return 0.0


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
    def work(self) -> float:
        """The product with U is as large as that with the parameter."""
        return 1.0

    @property
    def distribution(self) -> str:
        """Of a pair's own values, the signs."""
        return "rademacher"

    @property
    def shared(self) -> DenseLeaf:
        """The plan of U."""
        about = self.path, self.shape, self.dtype, self.spec, self.reason
        return DenseLeaf(*about, converted=self.converted, stack=self.stack)
