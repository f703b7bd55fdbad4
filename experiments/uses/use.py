"""A use: a small JAX program that uses parameters in one way, with its parameters and batch at any size.

Shapes are words: `n` the width, `2n` and `n/2` from it, `b` rows of the batch, digits themselves. Weights are normal with
standard deviation rows^(-1/2) / 2, so that outputs and the effect of a perturbation are of order one.
"""

import dataclasses
import importlib.util
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array


class Sizes(NamedTuple):
    """Sizes of a program."""

    rows: int  # b, examples of a batch
    width: int  # n, a multiple of 8


class Program(NamedTuple):
    """`function(params, batch)` of one member and what it is called with."""

    function: Callable[[Any, Any], Any]
    params: Any
    batch: Any


@dataclasses.dataclass(frozen=True)
class Use:
    """One use of parameters."""

    name: str
    make: Callable[[Sizes], Program]
    expected: str = "low-rank"  # today's role, at least: "low-rank", "built", "dense" or "refused"
    package: str | None = None  # it comes from this package

    @property
    def is_installed(self) -> bool:
        """Whether its package, if any, is here."""
        return not self.package or importlib.util.find_spec(self.package.split(".")[0]) is not None


@dataclasses.dataclass(frozen=True)
class Draw:
    """Shape, dtype and distribution of an array."""

    shape: str
    dtype: str = "float32"
    below: str = ""  # integers in [0, below)
    near: float = 0.0  # mean
    times: float = 1.0  # of the standard deviation

    def array(self, name: str, sizes: Sizes) -> Array:
        """Draw it; the name chooses the values."""
        shape = [measure(word, sizes) for word in self.shape.split()]
        random = np.random.default_rng(zlib.crc32(name.encode()))
        if self.below:
            return jnp.asarray(random.integers(0, measure(self.below, sizes), shape), self.dtype)
        values = self.near + self.times * random.standard_normal(shape)
        return jnp.asarray(np.round(values) if self.dtype.startswith("int") else values, self.dtype)


def measure(word: str, sizes: Sizes) -> int:
    """The size that a word of a shape stands for."""
    if word.isdigit():
        return int(word)
    factor, letter, divisor = word.partition("n") if "n" in word else word.partition("b")
    size = sizes.width if letter == "n" else sizes.rows
    return int(factor or 1) * size // int(divisor.lstrip("/") or 1)


def ids(shape: str, below: str) -> Draw:
    """Integers in [0, below)."""
    return Draw(shape, "int32", below)


def draw(spec: Any, sizes: Sizes, *, weights: bool, name: str = "batch") -> Any:
    """Draw a tree of specs: a `Draw`, the shape of one, or a mapping or sequence of these; weights scale with their rows."""
    if isinstance(spec, Mapping):
        return {key: draw(value, sizes, weights=weights, name=f"{name}/{key}") for key, value in spec.items()}
    if isinstance(spec, Sequence) and not isinstance(spec, str):
        return [draw(value, sizes, weights=weights, name=f"{name}/{index}") for index, value in enumerate(spec)]
    if isinstance(spec, Draw):
        return spec.array(name, sizes)
    words = spec.split()
    rows = math.prod(measure(word, sizes) for word in words[-2:-1]) or 1
    return Draw(spec, times=0.5 * rows**-0.5 if weights else 1.0).array(name, sizes)


def use(name: str, params: Any, function: Callable, batch: Any = "b n", *, expected: str = "low-rank") -> Use:
    """Make a use from the specs of its parameters and its batch."""

    def make(sizes: Sizes) -> Program:
        return Program(function, draw(params, sizes, weights=True), draw(batch, sizes, weights=False))

    return Use(name, make, expected)
