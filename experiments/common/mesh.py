"""The mesh of an experiment, from its command line."""

from collections.abc import Collection

import jax
from jax.sharding import Mesh


def parse_mesh(text: str | None, *, axes: Collection[str] = ("population", "data")) -> Mesh | None:
    """Make a mesh from text such as "population=4,data=2".

    Args:
        text: axes with their sizes; None: all devices along population if the run has several processes, else no mesh.
        axes: that have an effect. No experiment has "model": it needs parameters that are sharded.

    Raises:
        ValueError: the text is malformed, or there are too few devices; several processes must use all devices.
    """
    if text is None:
        return None if jax.process_count() == 1 else jax.make_mesh((jax.device_count(),), ("population",))
    parts = [part.partition("=") for part in text.split(",")]
    if any(name not in axes or not size.isdigit() or int(size) < 1 for name, _, size in parts):
        example = ",".join(f"{name}={size}" for name, size in zip(axes, (4, 2), strict=False))
        raise ValueError(f"mesh must be such as {example}, with axes out of {', '.join(axes)}, got {text!r}.")
    sizes = {name: int(size) for name, _, size in parts}
    if len(sizes) < len(parts):
        raise ValueError(f"mesh {text!r} names an axis twice.")
    count = 1
    for size in sizes.values():
        count *= size
    here = jax.device_count()
    if count > here or (count < here and jax.process_count() > 1):
        raise ValueError(f"mesh {text!r} has {count} devices, this run has {here}; several processes must use all.")
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), devices=jax.devices()[:count])
