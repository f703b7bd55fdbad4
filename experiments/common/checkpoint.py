"""Checkpoints of a pytree of arrays with orbax, written atomically."""

from pathlib import Path
from typing import Any

import jax


def save_checkpoint(folder: str | Path, tree: Any) -> None:
    """Write a pytree of arrays into `folder`, which is replaced if it exists.

    Raises:
        ModuleNotFoundError: orbax-checkpoint is not installed.
    """
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(Path(folder).absolute(), jax.device_get(tree), force=True)


def load_checkpoint(folder: str | Path, like: Any) -> Any:
    """Read what `save_checkpoint` wrote; `like` is a pytree of arrays or shapes with its structure."""
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(Path(folder).absolute(), like)
