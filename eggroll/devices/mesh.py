"""A mesh of devices as one generation uses it: axis names, checks, and where arrays lie.

    "population"   every device evaluates its own pairs and sums its own part of the gradient
    "data"         every device evaluates its members on its share of the batch
    "model"        left to the partitioner: parameters that are sharded over it stay so

What runs there is in `sharded`.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from eggroll.devices.processes import check_same, local
from eggroll.population.fitness import member_arguments
from eggroll.population.layout import PopulationLayout
from eggroll.state import ESState

AXES = ("population", "data", "model")
COMPARE_EVERY = 50  # generations


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where a generation runs.

    Args:
        mesh: axes out of `AXES`; whatever their types, they are used as automatic or manual ones.
        layout: the whole population.
        shard_optimizer: keep the optimizer state, and float32 masters, in equal shares over "population".

    Raises:
        TypeError: `mesh` is no `jax.sharding.Mesh`.
        ValueError: an unknown axis, or a population that cannot be spread over the mesh.
    """

    mesh: Mesh
    layout: PopulationLayout
    shard_optimizer: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.mesh, Mesh):
            raise TypeError(f"mesh must be a jax.sharding.Mesh or None, got {type(self.mesh).__name__}.")
        names = self.mesh.axis_names
        if not names or set(names) - set(AXES):
            raise ValueError(f"mesh axes must be out of {', '.join(AXES)}, got {', '.join(map(repr, names)) or 'none'}.")
        devices, layout = self.size("population"), self.layout
        on_axis = f"devices of mesh axis 'population', {devices}"
        if layout.num_pairs < devices:
            raise ValueError(
                f"population_size {layout.population_size} has {layout.num_pairs} pairs, fewer than the {on_axis}."
            )
        groups = layout.population_size // (layout.members_per_batch or layout.population_size)
        if (layout.members_per_batch or 1) > 2 and groups % devices:
            raise ValueError(f"members_per_batch makes {groups} groups, which the {on_axis}, do not divide.")
        if self.shard_optimizer and ("population" not in names or "model" in names):
            raise ValueError(f"shard_optimizer needs a mesh with the axis 'population' and without 'model', got {names}.")
        object.__setattr__(self, "mesh", _automatic(self.mesh))

    def size(self, axis: str) -> int:
        """Devices along an axis, 1 without it."""
        return self.mesh.shape.get(axis, 1)

    @property
    def manual(self) -> tuple[str, ...]:
        """Axes that `jax.shard_map` takes over; those of one device have nothing to join."""
        return tuple(name for name in ("population", "data") if self.size(name) > 1)

    def axis(self, name: str) -> str | None:
        """The name of an axis of more than one device, else None: an entry of a `PartitionSpec`."""
        return name if self.size(name) > 1 else None

    @property
    def local_layout(self) -> PopulationLayout:
        """What one device evaluates: ceil(P / devices) pairs; padding pairs have zero weight."""
        return dataclasses.replace(self.layout, num_pairs=-(-self.layout.num_pairs // self.size("population")))

    @property
    def replicated(self) -> NamedSharding:
        """The same on every device."""
        return NamedSharding(self.mesh, PartitionSpec())

    @property
    def per_member(self) -> NamedSharding:
        """Leading axis P, or N, over "population"; replicated where the devices do not divide P."""
        divides = self.layout.num_pairs % self.size("population") == 0
        return NamedSharding(self.mesh, PartitionSpec(self.axis("population") if divides else None))

    def shardings(self, state: ESState) -> Any:
        """The sharding of every leaf of a state; on a mesh with "model", parameters and what follows them stay as they lie."""
        owned = functools.partial(jax.tree.map, self._sharding_of_weight)
        sharing = functools.partial(jax.tree.map, self._sharding_of_share) if self.shard_optimizer else owned
        places: Any = jax.tree.map(lambda _: self.replicated, state)
        return places._replace(
            params=owned(state.params),
            opt_state=sharing(state.opt_state),
            masters=sharing(state.masters),
            member_state=jax.tree.map(lambda _: self.per_member, state.member_state),
        )

    def _sharding_of_weight(self, leaf: Array) -> NamedSharding | None:
        if "model" not in self.mesh.axis_names:
            return self.replicated
        if isinstance(leaf, jax.core.Tracer):
            return None  # the partitioner decides
        sharding = leaf.sharding
        if isinstance(sharding, NamedSharding) and _automatic(sharding.mesh) == self.mesh:
            return NamedSharding(self.mesh, sharding.spec)
        return self.replicated

    def _sharding_of_share(self, leaf: Array) -> NamedSharding:
        return NamedSharding(self.mesh, self.share_spec(leaf.shape))

    def share_spec(self, shape: tuple[int, ...]) -> PartitionSpec:
        """The first axis that the devices divide is shared over "population"; an array without one is replicated."""
        for axis, size in enumerate(shape):
            if size and size % self.size("population") == 0:
                return PartitionSpec(*[None] * axis, self.axis("population"))
        return PartitionSpec()

    def batch_spec(self, *, split: bool, padded: bool) -> PartitionSpec:
        """The sharding of a batch; before it is padded its member axis may not be divisible."""
        examples = ("data",) if split and self.axis("data") else ()
        if self.layout.members_per_batch is None:
            return PartitionSpec(*examples)
        return PartitionSpec(self.axis("population") if padded else self.per_member.spec[0], *examples)

    def local_batch(self, batch: Any) -> Any:
        """Shapes of one device's share of a batch.

        Raises:
            ValueError: the devices along "data" do not divide the examples.
        """
        layout, parts = self.local_layout, self.size("data")
        axis = 0 if layout.members_per_batch is None else 1
        entries = layout.population_size // (layout.members_per_batch or 1)

        def share(leaf: Any) -> jax.ShapeDtypeStruct:
            shape = list(leaf.shape)
            if self.axis("data"):
                if len(shape) <= axis or shape[axis] % parts:
                    raise ValueError(
                        f"batch leaves need examples along axis {axis} in a multiple of the devices of mesh axis 'data', "
                        f"{parts}, got shape {leaf.shape}."
                    )
                shape[axis] //= parts
            if axis:
                shape[0] = entries
            return jax.ShapeDtypeStruct(tuple(shape), leaf.dtype)

        return jax.tree.map(share, jax.eval_shape(lambda x: x, batch))

    def check(self, function: Callable, state: ESState, batch: Any) -> bool:
        """Return True when a batch can be split, and fitness and aux keep their shapes on a share of it.

        Raises:
            ValueError: it cannot, or they do not: they would not be means over the examples.
        """
        if self.axis("data") is None:
            return True
        share = self.local_batch(batch)
        if state.member_state is not None:
            raise ValueError("member_state cannot be carried on a mesh with the axis 'data': its shares would differ.")
        ones = (self.layout.one_member(batch), self.local_layout.one_member(share))
        whole, part = (jax.eval_shape(function, state.params, *member_arguments(one, None)) for one in ones)
        if whole != part:
            raise ValueError(
                "fitness and aux must be means over the examples to split the batch over mesh axis 'data', but their shapes "
                f"follow the batch: {_shapes(whole)} on all of it, {_shapes(part)} on a share."
            )
        return True


def shard_inputs(
    placement: Placement | None, state: ESState, tree: Any, *, batch_over: Literal["examples", "members"] | None = None
) -> tuple[ESState, Any]:
    """Shard a state, and a tree that goes with it, over the mesh; nothing moves when they already are.

    Args:
        placement: the mesh; None: one device.
        state: any state.
        tree: a batch, fitness or coefficients.
        batch_over: how a batch is sharded: its examples over "data" too, or its member axis alone; None: replicated.

    Returns:
        `(state, tree)`.
    """
    if placement is None:
        return state, tree
    sharding, compared = placement.replicated, True
    if batch_over is not None:
        sharding = NamedSharding(placement.mesh, placement.batch_spec(split=batch_over == "examples", padded=False))
        compared = _compares_batch(placement, state)
    sharded = jax.tree.map(lambda leaf: put(leaf, sharding, compared=compared), tree)
    return jax.tree.map(put, state, placement.shardings(state)), sharded


def _compares_batch(placement: Placement, state: ESState) -> bool:
    """Whether the processes compare their batches in this generation, which shows wrong seeds; it costs a collective."""
    if placement.replicated.is_fully_addressable or isinstance(state.generation, jax.core.Tracer):
        return False
    return int(local(state.generation)) % COMPARE_EVERY == 0


def report_shardings(placement: Placement | None) -> Any:
    """Shardings of an evaluation's results: report and sigma are replicated, the members' state stays with its members."""
    return None if placement is None else (placement.replicated, placement.per_member, placement.replicated)


def replicated(placement: Placement | None) -> Any:
    """Sharding of what every device knows."""
    return None if placement is None else placement.replicated


def update_shardings(placement: Placement | None, state: ESState) -> Any:
    """Shardings of an update's results: the state as it came, the report replicated."""
    return None if placement is None else (placement.shardings(state), placement.replicated)


def output_shardings(placement: Placement | None) -> Any:
    """Sharding of the members' outputs: with the members; replicated where the devices belong to several processes."""
    if placement is None or placement.replicated.is_fully_addressable:
        return None
    return placement.replicated


def put(leaf: Any, sharding: NamedSharding | None, *, compared: bool = True) -> Any:
    """Put one array where `sharding` says, also over several processes, each of which has the whole value.

    Args:
        leaf: array or number; a tracer stays where it is.
        sharding: None: it stays too.
        compared: check that all processes have the same value.
    """
    if isinstance(leaf, jax.core.Tracer) or sharding is None or getattr(leaf, "sharding", None) == sharding:
        return leaf
    if sharding.is_fully_addressable:
        return jax.device_put(leaf, sharding)
    # Devices of several processes, each of which has the whole value.
    if isinstance(leaf, Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        words = put(jax.random.key_data(leaf), sharding)
        return jax.random.wrap_key_data(words, impl=jax.random.key_impl(leaf))
    if isinstance(leaf, Array) and not leaf.is_fully_addressable:
        return jax.device_put(leaf, sharding)
    values = np.asarray(leaf if isinstance(leaf, Array) else jnp.asarray(leaf))
    if compared:
        check_same(values, f"parameters, key, batch, fitness or coefficients (an array {values.shape})")
    return jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])


def _shapes(tree: Any) -> list[tuple[int, ...]]:
    return [leaf.shape for leaf in jax.tree.leaves(tree)]


def _automatic(mesh: Any) -> Mesh:
    """The same devices and names, without axes of explicit sharding."""
    return Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))
