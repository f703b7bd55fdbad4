"""DistZO2 (arXiv 2507.03211): how the devices of a mesh share an offloaded step.

    "population"   perturbed streams over devices: directions, or the two signs of one (perturbation parallelism)
    "data"         the batch over devices; losses are (total, weight), summed
    all of them    every device stores, uploads, updates and downloads its 1/N of a block; an all-gather completes the block

Only the blocks and two scalars per perturbed forward cross between devices. On one device this is ZO2.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from eggroll.devices.mesh import put
from eggroll.noise import addresses
from eggroll.noise.leaves import DenseLeaf, LeafPlan
from eggroll.state import is_key, keys_to_words
from eggroll.update.estimator import leaf_gradient

AXES = ("population", "data")
HOST = "pinned_host"
ALIGNED = 2 * addresses.WORD  # values of a slice are a multiple of it: slices start at an even word of every distribution

SAME = PartitionSpec()  # the same on every device
SLICES = PartitionSpec(AXES)
BATCH = PartitionSpec("data")
OWN = PartitionSpec(*AXES)  # of `add_device_axes`


@functools.partial(jax.tree_util.register_dataclass, data_fields=["values"], meta_fields=["shape", "dtype", "key_impl"])
@dataclasses.dataclass(frozen=True)
class Sliced:
    """One leaf of a block: flat, padded with zeros, in equal slices over all devices; typed keys as their words."""

    values: Array  # [N slice]; in a program [slice]
    shape: tuple[int, ...]  # of the leaf, or of its words
    dtype: Any  # dtype of the model's computation
    key_impl: Any = None  # implementation of typed keys; None: numbers

    def assemble(self, values: Array) -> Array:
        """Return the leaf of the model's computation from all its values, with their padding."""
        return self.typed(values[: math.prod(self.shape)].reshape(self.shape).astype(self.dtype))

    def typed(self, array: Array) -> Array:
        """Return typed keys for words [..., *shape]; other arrays as they are."""
        return array if self.key_impl is None else jax.random.wrap_key_data(array, impl=self.key_impl)


def is_sliced(leaf: Any) -> bool:
    """Return whether `leaf` is `Sliced` (for `jax.tree` functions)."""
    return isinstance(leaf, Sliced)


@dataclasses.dataclass(frozen=True)
class Devices:
    """The devices of an offloaded run.

    Args:
        given: a mesh with axes out of `AXES`; None: the first device alone.

    Raises:
        ValueError: another axis.
    """

    given: Mesh | None

    def __post_init__(self) -> None:
        others = [] if self.given is None else sorted(set(self.given.axis_names) - set(AXES))
        if others:
            raise ValueError(f"blocks are offloaded over mesh axes {' and '.join(AXES)}, got {', '.join(map(repr, others))}.")

    @functools.cached_property
    def mesh(self) -> Mesh:
        """The mesh with both axes, of size 1 where the given mesh lacks them."""
        if self.given is None:
            return Mesh(np.array(jax.devices()[:1]).reshape(1, 1), AXES, axis_types=(AxisType.Auto,) * 2)
        names = self.given.axis_names
        ordered = self.given.devices.transpose([names.index(axis) for axis in AXES if axis in names])
        return Mesh(ordered.reshape([self.size(axis) for axis in AXES]), AXES, axis_types=(AxisType.Auto,) * 2)

    def size(self, axis: str) -> int:
        """Devices along an axis."""
        return 1 if self.given is None else self.given.shape.get(axis, 1)

    def spread(self, function: Callable, ins: Sequence[Any], outs: Any) -> Callable:
        """Map `function` over the devices; `ins` and `outs` are specs out of `SAME`, `SLICES`, `BATCH` and `OWN`."""
        ins = tuple(SAME if spec == BATCH and self.size("data") == 1 else spec for spec in ins)
        return jax.shard_map(function, mesh=self.mesh, in_specs=ins, out_specs=outs, check_vma=False)

    def replicate(self, tree: Any) -> Any:
        """Replicate a tree on every device."""
        return jax.tree.map(lambda leaf: put(leaf, NamedSharding(self.mesh, SAME)), tree)

    def batch(self, batch: Any) -> Any:
        """Shard a batch over "data".

        Raises:
            ValueError: the number of devices along "data" does not divide the number of examples.
        """
        parts = self.size("data")
        for leaf in jax.tree.leaves(batch) if parts > 1 else ():
            if jnp.ndim(leaf) == 0 or jnp.shape(leaf)[0] % parts:
                raise ValueError(
                    f"batch leaves need examples along axis 0 in a multiple of the devices of mesh axis 'data', {parts}, "
                    f"got shape {jnp.shape(leaf)}."
                )
        return jax.tree.map(lambda leaf: put(leaf, NamedSharding(self.mesh, BATCH if parts > 1 else SAME)), batch)

    @property
    def host(self) -> NamedSharding:
        """Sharding of slices between the steps."""
        return NamedSharding(self.mesh, SLICES, memory_kind=HOST)

    def store(self, leaf: Any, transfer_dtype: Any) -> Sliced:
        """Put one leaf of a block into the host's memory.

        Args:
            leaf: in the dtype of the model's computation; typed keys, too.
            transfer_dtype: of float32 leaves in the host's memory and in transfers; None: unchanged.

        Raises:
            RuntimeError: the memory is full; the message names the setting that raises CUDA's limit.
        """
        impl = jax.random.key_impl(leaf) if is_key(leaf) else None
        array = np.asarray(keys_to_words(leaf))
        stored = transfer_dtype if array.dtype == np.float32 and transfer_dtype is not None else array.dtype
        flat = np.zeros(self.mesh.size * self.slice_size(array.size), stored)
        flat[: array.size] = np.ravel(array).astype(stored)
        try:
            values = jax.make_array_from_callback(flat.shape, self.host, lambda index: flat[index].copy())
        except RuntimeError as error:
            raise RuntimeError(
                f"the host's memory for blocks is full ({flat.nbytes / 2**30:.3g} GiB more were requested); on CUDA it is "
                "capped at 64 GiB unless XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB is set higher before JAX starts."
            ) from error
        return Sliced(values, array.shape, array.dtype, impl)

    def slice_size(self, size: int) -> int:
        """Values in a slice of a leaf."""
        return -(-size // (self.mesh.size * ALIGNED)) * ALIGNED

    def gather(self, block: Any) -> Any:
        """Gather a block from its slices, in the dtypes of the model's computation."""

        def gathered(leaf: Sliced) -> Array:
            return leaf.assemble(jax.lax.all_gather(leaf.values, AXES, tiled=True))

        return jax.tree.map(gathered, block, is_leaf=is_sliced)

    def slice_of_gradient(
        self,
        leaf: LeafPlan,
        coefficients: Array,
        *,
        noise_key: Array,
        noise_generation: Array | int,
        sigma: Array | float | None,
        first_index: Array | int,
    ) -> Array:
        """This device's slice of the gradient of one leaf, float32 [slice]; arguments as for `estimator.gradient`."""
        count = self.slice_size(math.prod(leaf.shape))
        return part_of_gradient(
            leaf,
            coefficients,
            first=jax.lax.axis_index(AXES) * count,
            count=count,
            padded=self.mesh.size * count,
            noise_key=noise_key,
            noise_generation=noise_generation,
            sigma=sigma,
            first_index=first_index,
        )

    def slice_of_words(self, key: Array, count: int) -> Array:
        """This device's slice [count] of `hash_words`, which do not depend on the number of devices."""
        first = (jax.lax.axis_index(AXES) * count).astype(jnp.uint32)
        return hash_words(key, first + jnp.arange(count, dtype=jnp.uint32))

    def streams(self, directions: int, signs: tuple[float, ...]) -> tuple[Array, Array]:
        """The streams of this device: directions [a] and their signs [a, b]; b is 1 where devices share a direction.

        Padding streams after the last are evaluated too; `losses` drops them.
        """
        count, values = self._entries(directions, len(signs)), jnp.asarray(signs, jnp.float32)
        each = -(-count // self.size("population"))
        index = jax.lax.axis_index("population") * each + jnp.arange(each, dtype=jnp.int32)
        if count == directions:
            return index, jnp.broadcast_to(values, (each, len(signs)))
        return index // len(signs), values[index % len(signs)][:, None]

    def losses(self, parts: tuple[Array, Array], directions: int, signs: int) -> Array:
        """Losses [n, S] of all streams on every device, from the totals and weights [a, b] of its own."""
        every = jax.lax.all_gather(self.ratio(parts), "population", tiled=True)
        return every[: self._entries(directions, signs)].reshape(directions, signs)

    def _entries(self, directions: int, signs: int) -> int:
        """Number of items sharded over "population": directions, or streams where there are fewer directions than devices."""
        return directions if directions >= self.size("population") else directions * signs

    @staticmethod
    def ratio(parts: tuple[Array, Array]) -> Array:
        """Loss from the totals and weights of the shards of a batch."""
        total, weight = jax.lax.psum(parts, "data")
        return total / weight


def hash_words(key: Array, places: Array) -> Array:
    """Random words at places of a parameter, uint32 of any shape: the same however it is cut into parts.

    A hash of place and key: threefry's words, which noise is made of, take longer than copying a short float saves.
    """
    first, second = jax.random.key_data(key)
    return _mix(_mix(places * jnp.uint32(0x9E3779B9) + first) ^ second)


def _mix(word: Array) -> Array:
    """A bijection of words in which every bit of the result depends on every bit (lowbias32, hash-prospector)."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        word = (word ^ (word >> shift)) * jnp.uint32(factor)
    return word ^ (word >> 16)


def add_device_axes(tree: Any) -> Any:
    """Add two leading axes of size 1 to per-device values that leave a program, to be sharded over the mesh."""
    return jax.tree.map(lambda leaf: jnp.asarray(leaf)[None, None], tree)


def drop_device_axes(tree: Any) -> Any:
    """Undo `add_device_axes` where the values enter a program."""
    return jax.tree.map(lambda leaf: leaf[0, 0], tree)


def part_of_gradient(
    leaf: LeafPlan,
    coefficients: Array,
    *,
    first: Array | int,
    count: int,
    padded: int,
    noise_key: Array,
    noise_generation: Array | int,
    sigma: Array | float | None,
    first_index: Array | int = 0,
) -> Array:
    """Values first ... first + count - 1 of the flat gradient of one leaf; dense noise is drawn for these only.

    Args:
        leaf: its plan, of one block.
        coefficients: float32 [n].
        first: a multiple of `ALIGNED`.
        count: a multiple of `ALIGNED`.
        padded: length to which the flat gradient is padded; values past its end are arbitrary.
        noise_key, noise_generation, sigma, first_index: as for `estimator.gradient`.
    """
    drawn = functools.partial(
        leaf_gradient,
        coefficients=coefficients,
        noise_key=noise_key,
        noise_generation=noise_generation,
        sigma=sigma,
        first_index=first_index,
    )
    if isinstance(leaf, DenseLeaf):
        part = dataclasses.replace(leaf, shape=(count,), stack=())
        return drawn(part, first_word=first // addresses.WORD if leaf.distribution == "rademacher" else first)
    flat = jnp.ravel(drawn(leaf))
    return jax.lax.dynamic_slice_in_dim(jnp.pad(flat, (0, padded - flat.size)), first, count)


def is_short_float(dtype: Any) -> bool:
    """Whether a dtype is a float of 16 bits or fewer."""
    try:
        return jnp.issubdtype(dtype, jnp.floating) and jnp.dtype(dtype).itemsize <= 2
    except TypeError:  # no dtype at all
        return False
