"""`PerturbedArray`: a parameter plus a low-rank perturbation, as one lazy array value.

    value = base + scale * left right^T        left [stack, rows, r], right [stack, columns, r]
    value = base + scale * shared o left right^T                       where the members share noise (`flipout`)

The user's function sees an ordinary array; products use the factors and never build the sum. Every axis carries a *tag*, the
source axes of the parameter it came from, so that views (`views`) act on base and factors alike, products (`products`) know
which factor to contract, and `scan` may slice leading stacked axes off every component. A value without factors is a *probe*:
it records in its `Observer` how the parameter is used, which is how `plan` reads the roles of the leaves.
Only this file imports quax.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.extend.core as jexc
import jax.numpy as jnp
import quax
from jax import Array

from eggroll.noise import addresses
from eggroll.noise.integer import IntegerNoise

Tag = tuple[int, ...]  # source axes of the parameter that an axis came from; () for an inserted axis of size 1
MOVES = frozenset(  # primitives that move entries about and compute nothing
    ["transpose", "reshape", "squeeze", "broadcast_in_dim", "slice", "dynamic_slice", "gather", "rev", "copy", "split"]
)
register = quax.register
interpret_with_rules = quax.quaxify


class Use(NamedTuple):
    """One use of a parameter: its source axes that were contracted, left free, stacked; or why the use has no rule."""

    contracted: frozenset[int] = frozenset()
    free: frozenset[int] = frozenset()
    stacked: frozenset[int] = frozenset()
    unsupported: str | None = None


class Observer:
    """Collects the uses of every probed parameter during one abstract trace, and the dtypes that quantised ones turn to."""

    def __init__(self) -> None:
        self.uses: dict[str, list[Use]] = {}
        self.dtypes: dict[str, list[Any]] = {}

    def record(self, path: str, use: Use) -> None:
        """Add one use of the parameter at `path`."""
        self.uses.setdefault(path, []).append(use)

    def convert(self, path: str, dtype: Any) -> None:
        """Add one conversion of the quantised parameter at `path`."""
        self.dtypes.setdefault(path, []).append(jnp.dtype(dtype))

    def widest(self, path: str) -> Any:
        """The widest dtype that the quantised parameter at `path` is converted to, float32 where none was seen."""
        return max(self.dtypes.get(path, []), key=lambda dtype: dtype.itemsize, default=jnp.dtype(jnp.float32))


@dataclasses.dataclass(frozen=True)
class Layout:
    """Static description of a `PerturbedArray`.

    `tags` describes the trailing axes of the base; leading axes that are missing were sliced off by a scan.
    """

    path: str
    ndim: int  # of the parameter itself
    tags: tuple[Tag, ...]
    rows: frozenset[int] = frozenset()
    columns: frozenset[int] = frozenset()
    rank: int = 0
    indexed: frozenset[int] = frozenset()  # source axes that a probe was indexed along: they must be stacked
    observer: Observer | None = None
    integer: IntegerNoise | None = None
    quantised: Any = None  # floating dtype of the noise of an int8 base that the function has not converted yet
    implementation: str = "reference"  # of products that have the form of a kernel's

    def owns(self, component: str, tag: Tag) -> bool:
        """Whether `component` ("base", "left", "right", "scale", "shared") has the axis tagged `tag`."""
        if component in ("base", "shared"):
            return True
        if not tag:
            return component == "right"
        if self.rows.issuperset(tag):
            return component == "left"
        if self.columns.issuperset(tag):
            return component == "right"
        return True  # a stacked axis


class LazyArray(quax.ArrayValue):
    """What the function takes for an array; the file's head says why."""


class PerturbedArray(LazyArray):
    """Lazy `base + scale * left right^T`; see the file's head. Build it with `perturb` or `probe`."""

    base: Array  # [...]
    left: Array | None  # [stack and row axes in base order, r]
    right: Array | None  # [stack and column axes in base order, r]
    words: Array | None  # packed Rademacher signs of both factors, uint32 [stack, words]
    scale: Array | None  # [stack]
    layout: Layout = eqx.field(static=True)
    shared: Array | None = None  # like the base

    def aval(self) -> Any:
        """Abstract value of the sum."""
        return jax.typeof(self.base)

    @property
    def tags(self) -> tuple[Tag, ...]:
        """One tag per axis of the base as it is now."""
        return self.layout.tags[len(self.layout.tags) - self.base.ndim :]

    @property
    def observed(self) -> bool:
        """Whether this is a probe."""
        return self.layout.observer is not None

    def positions(self, component: str, tags: Sequence[Tag] | None = None) -> list[int]:
        """The axes, by position in the base or in `tags`, that `component` has."""
        return [axis for axis, tag in enumerate(self.tags if tags is None else tags) if self.layout.owns(component, tag)]

    def with_layout(self, **changes: Any) -> "PerturbedArray":
        """The same components under another description."""
        return dataclasses.replace(self, layout=dataclasses.replace(self.layout, **changes))

    def record(self, use: Use) -> None:
        """Record one use of a probe."""
        assert self.layout.observer is not None
        self.layout.observer.record(self.layout.path, use)

    def unsupported(self, where: str) -> "UnsupportedUse":
        """The error for a use without a rule."""
        return UnsupportedUse(self.layout.path, where)

    def unpacked(self) -> "PerturbedArray":
        """The same value with its packed signs, if any, unpacked into factors."""
        if self.words is None:
            return self
        sizes = list(zip(self.tags, self.base.shape, strict=True))
        m = math.prod(size for tag, size in sizes if self.layout.rows.issuperset(tag))
        n = math.prod(size for tag, size in sizes if self.layout.columns.issuperset(tag))
        packed = addresses.Factors(self.layout.rank, m, n, None, None, self.words)
        return self.with_factors(*packed.unpacked(self.base.dtype))

    def ready_for_loops(self) -> "PerturbedArray":
        """The same value as loops read it in every turn: unpacked, but not for a kernel, which unpacks as it reads."""
        return self if self.layout.implementation != "reference" else self.unpacked()

    def with_factors(self, left: Array, right: Array) -> "PerturbedArray":
        """Attach factors [stack, r, m] and [stack, r, n] as components in the base's axis order, the rank last."""
        stack = self.positions("scale")

        def arranged(factor, component):
            own = self.positions(component)
            spanned = [axis for axis in own if axis not in stack]
            shape = self.base.shape
            factor = factor.reshape(*(shape[a] for a in stack), self.layout.rank, *(shape[a] for a in spanned))
            order = [*stack, None, *spanned]
            return factor.transpose([order.index(axis) for axis in own] + [len(stack)])

        left, right = arranged(left, "left"), arranged(right, "right")
        return PerturbedArray(self.base, left, right, None, self.scale, self.layout, self.shared)

    def materialise(self) -> Array:
        """Refuse: a perturbed parameter is never built in the hot path."""
        raise self.unsupported("an operation that needs the whole array")

    @staticmethod
    def default(primitive: jexc.Primitive, values: Sequence[Any], params: dict[str, Any]) -> Any:
        """Record a primitive without a rule when probing; refuse it otherwise."""
        plain = []
        for value in values:
            if isinstance(value, PerturbedArray):
                if value.layout.quantised is not None and primitive.name not in MOVES:
                    raise UnconvertedUse(value.layout.path, f"'{primitive.name}'")
                if not value.observed:
                    raise value.unsupported(f"'{primitive.name}'")
                value.record(Use(unsupported=f"used by '{primitive.name}', which has no low-rank rule"))
                value = value.base
            plain.append(value)
        return primitive.bind(*plain, **params)


def plain(output: Any, where: str) -> Any:
    """An output as a plain array: a probe records that it was returned, a perturbed parameter is refused."""
    if not isinstance(output, PerturbedArray):
        return output.materialise() if is_perturbed(output) else output
    if output.layout.quantised is not None:
        raise UnconvertedUse(output.layout.path, where)
    if not output.observed:
        raise output.unsupported(where)
    output.record(Use(unsupported=f"returned as {where}"))
    return output.base


class UnsupportedUse(ValueError):
    """A parameter planned as low-rank is used in a way that has no rule."""

    def __init__(self, path: str, where: str):
        self.path, self.where = path, where
        super().__init__(
            f"Parameter '{path}' is planned as low-rank but the function uses it in {where}, which has no low-rank rule; "
            f"put the rule ('{path}', eggroll.Dense()) first in `perturbation`."
        )


class UnconvertedUse(ValueError):
    """An int8 parameter with floating noise is computed with as it is."""

    def __init__(self, path: str, where: str):
        super().__init__(
            f"int8 parameter '{path}' has floating noise but is used in {where} before it is a float: write "
            "param.astype(x.dtype) first, or give it the rule Integer() or Frozen()."
        )


def is_perturbed(leaf: Any) -> bool:
    """Whether `leaf` is a lazy parameter (for `jax.tree` functions)."""
    return isinstance(leaf, LazyArray)


def probe(array: Array, *, path: str, observer: Observer, quantised: bool = False) -> PerturbedArray:
    """Wrap a parameter so that its uses are recorded in `observer`."""
    tags = tuple((axis,) for axis in range(array.ndim))
    layout = Layout(path, array.ndim, tags, observer=observer, quantised=jnp.dtype(jnp.float32) if quantised else None)
    return PerturbedArray(array, None, None, None, None, layout)


def perturb(
    base: Array,
    factors: addresses.Factors,
    *,
    scale: Array,
    path: str,
    rows: Sequence[int],
    columns: Sequence[int],
    integer: IntegerNoise | None = None,
    quantised: Any = None,
    shared: Array | None = None,
    implementation: str = "reference",
) -> PerturbedArray:
    """Wrap a parameter with the factors of its perturbation.

    Args:
        base: the parameter; its axes are stacked axes, rows and columns in any order.
        factors: `addresses.Factors` of shapes [stack, r, m] and [stack, r, n], packed or not.
        scale: [stack], sign * sigma / sqrt(r); of integer noise the int32 sign.
        path: the parameter's path, for messages.
        rows: the axes of `base` that the left factor spans.
        columns: the axes of `base` that the right factor spans.
        integer: of an int8 parameter with integer noise.
        quantised: floating dtype of the noise of an int8 parameter that has floating noise.
        shared: noise of the shape of `base` that multiplies the product of the factors, None: none.
        implementation: of the products (`eggroll.implementation`).

    Returns:
        The lazy sum.
    """
    tags = tuple((axis,) for axis in range(base.ndim))
    sides = frozenset(rows), frozenset(columns)
    more: dict[str, Any] = dict(integer=integer, quantised=quantised, implementation=implementation)
    layout = Layout(path, base.ndim, tags, *sides, factors.rank, **more)
    value = PerturbedArray(base, None, None, factors.words, scale, layout, shared)
    if factors.words is None:
        return value.with_factors(*factors.unpacked(base.dtype))
    # Packed signs of stacked layers are unpacked layer by layer inside the scan over them; those of a single matrix at once,
    # outside any loop that uses it. A scan can slice packed signs only along leading axes.
    # A kernel reads them packed.
    stack = value.positions("scale")
    is_matrix = not stack and implementation != "reference"
    return value if is_matrix or (stack and stack == list(range(len(stack)))) else value.unpacked()


def view(value: PerturbedArray, tags: Sequence[Tag], operation: Callable[[Array, str], Array]) -> PerturbedArray:
    """Apply `operation(array, component)` to every component; `tags` describes the base's axes afterwards."""
    value = value.unpacked()
    components = {
        name: None if (array := getattr(value, name)) is None else operation(array, name)
        for name in ("base", "left", "right", "scale", "shared")
    }
    return PerturbedArray(words=None, layout=dataclasses.replace(value.layout, tags=tuple(tags)), **components)
