"""`PerturbedArray`: a parameter plus its perturbation, as one lazy array value.

    value = base + delta

The user's function sees an ordinary array; products use the factors of the delta and never build the sum. Every axis carries a
*tag*, the source axes of the parameter it came from, so that views (`views`) act on base and delta alike, products (`products`)
know which factor to contract, and `scan` may slice leading stacked axes off every component. There is one class of `Delta` for
each kind of perturbation:

    Probe             no perturbation: records how the parameter is used                    (`probe`)
    LowRankDelta      scale * left right^T, the factors arranged as the base or packed      (`low_rank`)
    FlipoutDelta      scale * shared o left right^T                                         (`low_rank`)
    IntegerDelta      low-rank, in integers                                                 (`low_rank`)
    QuantisedDelta    one of these on an int8 base that is not converted to a float yet     (`quantised`)

Only this file imports quax.
"""

import abc
import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import equinox as eqx
import jax
import jax.extend.core as jexc
import jax.numpy as jnp
import quax
from jax import Array

from eggroll.lazy.uses import FailedUse, Observer, UnsupportedUse, UseError

Tag = tuple[int, ...]  # source axes of the parameter that an axis came from; () for an inserted axis of size 1
Operation = Callable[[Array, str], Array]  # what a view does with the component of a name: "base", "left", ...
MOVES = frozenset(  # primitives that rearrange entries without computing
    ["transpose", "reshape", "squeeze", "broadcast_in_dim", "slice", "dynamic_slice", "gather", "rev", "copy", "split"]
)
_ruled: set[jexc.Primitive] = set()  # primitives with a rule
Builds = dict[str, tuple[str, int]]  # per path: why members build the parameter, and how many of its entries at most
_builds: ContextVar[Builds | None] = ContextVar("builds", default=None)
CONTROL_FLOW = ("scan", "while", "cond")  # their bodies are evaluated with the rules, where errors are named
interpret_with_rules = quax.quaxify


@contextlib.contextmanager
def recording_builds() -> Iterator[Builds]:
    """Collect the parameters that members build while a function is traced."""
    builds: Builds = {}
    token = _builds.set(builds)
    try:
        yield builds
    finally:
        _builds.reset(token)


def record_build(path: str, reason: str, size: int) -> None:
    """Record that members build `size` entries of the parameter at `path`."""
    if (builds := _builds.get()) is not None and size > builds.get(path, ("", 0))[1]:
        builds[path] = reason, size


def register(primitive: jexc.Primitive, *, precedence: int = 0) -> Callable[[Callable], Callable]:
    """Register a rule of a primitive for operands of the annotated types."""
    _ruled.add(primitive)
    return quax.register(primitive, precedence=precedence)


@dataclasses.dataclass(frozen=True)
class Axes:
    """Where the axes of a lazy parameter came from, and which of them the factors span.

    `tags` describes the trailing axes of the base; leading axes that are missing were sliced off by a scan.
    """

    path: str
    ndim: int  # of the parameter itself
    tags: tuple[Tag, ...]
    rows: frozenset[int] = frozenset()
    columns: frozenset[int] = frozenset()

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
    """A value that the user's function treats as an array; see the module docstring."""

    def materialise(self) -> Array:
        """Refuse: a lazy value is never built behind the rules' back."""
        raise UnsupportedUse(self.source(), "an operation that needs the whole array")

    @abc.abstractmethod
    def source(self) -> str:
        """The path of the parameter that the value is made of."""

    @abc.abstractmethod
    def read(self, where: str, reason: str, *, moves: bool) -> Array:
        """Return what an operation without a rule reads: `Delta.read`."""

    def move(self, primitive: jexc.Primitive, others: Sequence[Any], params: dict[str, Any]) -> Any:
        """The result of a primitive that only rearranges entries, if the value allows any such; None otherwise."""
        return None

    def is_read_by(self, primitive: jexc.Primitive, operands: Sequence[Any], place: int, params: dict[str, Any]) -> bool:
        """Whether a primitive `read`s this value, `operands[place]`, whatever rules there are: then it is read only once."""
        return False

    def distribute(self, primitive: jexc.Primitive, operands: Sequence[Any], place: int, params: dict[str, Any]) -> Any:
        """Results of a primitive that is linear in this value, `operands[place]`, made of those of its parts; None: no such."""
        return None

    def sliceable(self) -> Any:
        """The same value as `scan` may slice it along its leading axis."""
        return self

    @staticmethod
    def default(primitive: jexc.Primitive, values: Sequence[Any], params: dict[str, Any]) -> Any:
        """Evaluate a primitive without a rule on what its lazy operands `read`: recorded, built, or refused."""
        where, moves = f"'{primitive.name}'", primitive.name in MOVES
        lazy = [place for place, value in enumerate(values) if is_perturbed(value)]
        for place in lazy if primitive.name == "dot_general" else lazy if len(lazy) == 1 else []:
            if (outputs := values[place].distribute(primitive, values, place, params)) is not None:
                return outputs
        first, *others = values
        if moves and is_perturbed(first) and (moved := first.move(primitive, others, params)) is not None:
            return moved
        reason = f"used by {where}, which has no low-rank rule"
        plain = [value.read(where, reason, moves=moves) if is_perturbed(value) else value for value in values]
        return primitive.bind(*plain, **params)

    def unpack(self) -> "LazyArray":
        """The same value without packed signs."""
        return self

    def prepare_for_loops(self) -> "LazyArray":
        """The same value in the form that a loop should read on every iteration."""
        return self

    def prepare_slice(self) -> "LazyArray":
        """The same value, a layer that a loop has sliced, in the form that its body should read."""
        return self


class Delta(eqx.Module):
    """What a lazy parameter adds to its base; the module docstring lists the classes."""

    @property
    def observer(self) -> Observer | None:
        """Records the uses of a probe; None for all other deltas."""
        return None

    def map(self, operation: Operation) -> "Delta":
        """Apply `operation` to every component; there is none to apply it to here."""
        return self

    def unpack(self, value: "PerturbedArray") -> "Delta":
        """The same delta of `value` with its packed signs, if any, unpacked into factors."""
        return self

    def prepare_for_loops(self, value: "PerturbedArray") -> "Delta":
        """The same delta of `value` in the form that a loop should read on every iteration."""
        return self

    def prepare_slice(self) -> "Delta":
        """The delta of a layer that a loop has sliced, in the form that its body should read."""
        return self

    def mark_indexed(self, tag: Tag) -> "Delta":
        """The same delta, after the axis tagged `tag` was indexed."""
        return self

    def read(self, value: "PerturbedArray", where: str, reason: str, *, moves: bool) -> Array:
        """Return what an operation without a rule reads.

        Args:
            value: the array that this delta belongs to.
            where: the operation, for errors.
            reason: of dense noise, for the plan.
            moves: whether the operation only rearranges entries.

        Raises:
            UnsupportedUse, UnconvertedUse: there is a perturbation that cannot be built.
        """
        raise UnsupportedUse(value.axes.path, where)


class PerturbedArray(LazyArray):
    """Lazy `base + delta`; see the module docstring. Build it with `perturb` or `probe`."""

    base: Array  # [...]
    delta: Delta
    axes: Axes = eqx.field(static=True)

    def aval(self) -> Any:
        """Abstract value of the sum."""
        return jax.typeof(self.base)

    @property
    def tags(self) -> tuple[Tag, ...]:
        """One tag per axis of the base as it is now."""
        return self.axes.tags[len(self.axes.tags) - self.base.ndim :]

    def positions(self, component: str, tags: Sequence[Tag] | None = None) -> list[int]:
        """The axes, by position in the base or in `tags`, that `component` has."""
        return [axis for axis, tag in enumerate(self.tags if tags is None else tags) if self.axes.owns(component, tag)]

    def with_delta(self, delta: Delta) -> "PerturbedArray":
        """The same base with another delta."""
        return PerturbedArray(self.base, delta, self.axes)

    def view(self, tags: Sequence[Tag], operation: Operation) -> "PerturbedArray":
        """Apply `operation(array, component)` to every component; `tags` describes the base's axes afterwards."""
        delta, axes = self.delta.unpack(self), dataclasses.replace(self.axes, tags=tuple(tags))
        return PerturbedArray(operation(self.base, "base"), delta.map(operation), axes)

    def unpack(self) -> "PerturbedArray":
        """The same value without packed signs."""
        return self.with_delta(self.delta.unpack(self))

    def prepare_for_loops(self) -> "PerturbedArray":
        """The same value in the form that a loop should read on every iteration: unpacked, unless for a kernel."""
        return self.with_delta(self.delta.prepare_for_loops(self))

    def prepare_slice(self) -> "PerturbedArray":
        """The same value, a layer that a loop has sliced, in the form that its body should read."""
        return self.with_delta(self.delta.prepare_slice())

    def unsupported(self, where: str) -> UnsupportedUse:
        """The error for a use without a rule."""
        return UnsupportedUse(self.axes.path, where)

    def sliceable(self) -> "PerturbedArray":
        """The same value; refused where a factor does not have the leading axis."""
        owners = [] if self.delta.observer else ["left", "right", "scale"]
        if not all(self.axes.owns(component, self.tags[0]) for component in owners):
            raise self.unsupported("'scan' over its rows or columns")
        return self

    def source(self) -> str:
        """The path of the parameter."""
        return self.axes.path

    def read(self, where: str, reason: str, *, moves: bool) -> Array:
        """Return what an operation without a rule reads: `Delta.read`."""
        return self.delta.read(self, where, reason, moves=moves)


def to_plain(output: Any, where: str, *, reason: str = "") -> Any:
    """An output as a plain array: what a lazy value gives when it is `read`, with `reason` or that it was returned."""
    return output.read(where, reason or f"returned as {where}", moves=False) if is_perturbed(output) else output


def run_rule(primitive: jexc.Primitive, operands: Sequence[Any], params: dict[str, Any]) -> Any:
    """Bind a primitive, by its rule where an operand is lazy; whatever fails there names the parameters."""
    lazy, params = [operand for operand in operands if is_perturbed(operand)], primitive.get_bind_params(params)
    if not lazy:
        return primitive.bind(*operands, **params)
    try:
        if primitive not in _ruled:
            return LazyArray.default(primitive, operands, params)
        return interpret_with_rules(functools.partial(primitive.bind, **params))(*operands)
    except UnsupportedUse as error:  # by a rule: the members build what it cannot use, if their noise is of a kind that can be
        blamed = [value for value in lazy if value.source() == error.path] or lazy
        plain = [
            value.read(error.where, "", moves=False) if any(value is own for own in blamed) else value for value in operands
        ]
        return run_rule(primitive, plain, params)
    except UseError:
        raise
    except Exception as error:  # of a rule, of quax or of JAX
        if primitive.name in CONTROL_FLOW:
            raise
        raise FailedUse(sorted({value.source() for value in lazy}), primitive.name, error) from error


def shape_of(value: Any) -> tuple[int, ...]:
    """The shape of a value, lazy or not."""
    return value.aval().shape if is_perturbed(value) else jnp.shape(value)


def is_perturbed(leaf: Any) -> bool:
    """Whether `leaf` is a lazy parameter (for `jax.tree` functions)."""
    return isinstance(leaf, LazyArray)
