"""The mesh of an experiment, from its command line."""

import jax
from jax.sharding import Mesh

from eggroll.devices.mesh import AXES


def parse_mesh(text: str | None) -> Mesh | None:
    """Make a mesh from text such as "population=4,data=2".

    Args:
        text: axes out of population, data and model with their sizes; None: all devices along population if the run has
            several processes, else no mesh.

    Raises:
        ValueError: the text is malformed, or there are too few devices; several processes must use all devices.
    """
    if text is None:
        return None if jax.process_count() == 1 else jax.make_mesh((jax.device_count(),), ("population",))
    parts = [part.partition("=") for part in text.split(",")]
    if any(name not in AXES or not size.isdigit() or int(size) < 1 for name, _, size in parts):
        raise ValueError(f"mesh must be such as population=4,data=2, with axes out of {', '.join(AXES)}, got {text!r}.")
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
