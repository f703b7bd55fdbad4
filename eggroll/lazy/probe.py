"""`Probe`: a parameter without perturbation, which records how the function uses it."""

from collections.abc import Sequence

import equinox as eqx
import jax.numpy as jnp
from jax import Array

from eggroll.lazy.perturbed import Axes, Delta, PerturbedArray, Tag
from eggroll.lazy.quantised import QuantisedDelta
from eggroll.lazy.uses import Observer, Use


class Probe(Delta):
    """No perturbation; records every use in an observer."""

    recorder: Observer = eqx.field(static=True)
    along: frozenset[int] = eqx.field(static=True, default=frozenset())  # source axes that were indexed: they must be stacked

    @property
    def observer(self) -> Observer:
        """Records the uses."""
        return self.recorder

    def mark_indexed(self, tag: Tag) -> "Probe":
        """The same probe, after the axis tagged `tag` was indexed."""
        return Probe(self.recorder, self.along.union(tag))

    def read(self, value: PerturbedArray, where: str, reason: str, *, moves: bool) -> Array:
        """Record that the operation has no rule; it reads the parameter."""
        scanned = value.axes.tags[: len(value.axes.tags) - value.base.ndim]
        stacked = frozenset(source for tag in scanned for source in tag)
        looked_up = self.along - stacked
        free = frozenset(range(value.axes.ndim)) - looked_up - stacked
        use = Use(stacked=stacked, unsupported=reason, size=value.base.size)
        self.recorder.record(value.axes.path, Use(looked_up, free, stacked) if looked_up and free else use)
        return value.base

    def note(self, value: PerturbedArray, reason: str) -> None:
        """Record a use that allows any noise; without another one `reason` explains the role."""
        self.recorder.record(value.axes.path, Use(unsupported=reason))

    def observe(self, value: PerturbedArray, contracted: Sequence[int], batched: Sequence[int] = ()) -> None:
        """Record a use that contracts the axes `contracted` of `value` and batches over `batched`."""

        def sources(positions: Sequence[int] | range) -> frozenset[int]:
            return frozenset(source for axis in positions for source in value.tags[axis])

        ndim, axes = value.base.ndim, value.axes
        free = sources([axis for axis in range(ndim) if axis not in {*contracted, *batched}]) - self.along
        dropped = frozenset(range(axes.ndim)) - sources(range(ndim))
        use = Use(sources(contracted) - self.along, free, sources(batched) | dropped | self.along)
        scanned = axes.tags[: len(axes.tags) - ndim]
        inserted = any(not tag for tag in scanned)
        split = any(frozenset(tag) & sources(range(ndim)) for tag in scanned)
        if (
            not use.contracted
            or inserted
            or split
            or use.contracted & use.free
            or use.contracted & use.stacked
            or use.free & use.stacked
        ):
            use = use._replace(unsupported="one of its axes is split between roles", size=value.base.size)
        self.recorder.record(axes.path, use)


def probe(array: Array, *, path: str, observer: Observer, quantised: bool = False) -> PerturbedArray:
    """Wrap a parameter so that its uses are recorded in `observer`."""
    delta = Probe(observer)
    axes = Axes(path, array.ndim, tuple((axis,) for axis in range(array.ndim)))
    return PerturbedArray(array, QuantisedDelta(delta, jnp.dtype(jnp.float32)) if quantised else delta, axes)
