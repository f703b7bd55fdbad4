"""Checkpoints of a pytree of arrays with orbax, written atomically, with a fingerprint that is compared when they are read."""

from pathlib import Path
from typing import Any

import jax

from eggroll.files import Damaged
from eggroll.journal.fingerprint import fingerprint
from eggroll.journal.integrity import writing

TREE, CHECK = "tree", "check"


def save_checkpoint(folder: str | Path, tree: Any) -> None:
    """Write a pytree of arrays into `folder`, which is replaced if it exists.

    Raises:
        ModuleNotFoundError: orbax-checkpoint is not installed.
        OSError: it cannot be written.
    """
    import orbax.checkpoint as ocp

    tree = jax.device_get(tree)
    items = {TREE: ocp.args.StandardSave(tree), CHECK: ocp.args.JsonSave({"sha256": fingerprint(tree)})}
    with writing(Path(folder)), ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        checkpointer.save(Path(folder).absolute(), args=ocp.args.Composite(**items), force=True)


def saved_shapes(folder: str | Path) -> list[tuple[int, ...]]:
    """Return the shapes of the arrays of a checkpoint, sorted; the arrays themselves are not read.

    Raises:
        Damaged: the description of the arrays cannot be read.
    """
    import orbax.checkpoint as ocp

    try:
        tree = ocp.PyTreeCheckpointHandler().metadata((Path(folder) / TREE).absolute()).tree
        return sorted(array.shape for array in jax.tree.leaves(tree))
    except Exception as error:  # as in `load_checkpoint`
        raise Damaged(f"the checkpoint {folder} cannot be read: {error}") from error


def load_checkpoint(folder: str | Path, like: Any) -> Any:
    """Read what `save_checkpoint` wrote; `like` is a pytree of arrays or shapes with its structure.

    Raises:
        FileNotFoundError: there is no such folder.
        Damaged: its bytes differ from those written, or are of another tree. Checkpoints of versions before 0.3 have no
            fingerprint; of these only damage that orbax finds is an error.
    """
    import orbax.checkpoint as ocp

    folder = Path(folder).absolute()
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no checkpoint {folder}.")
    try:
        if not any((folder / name).exists() for name in (TREE, CHECK)):
            with ocp.StandardCheckpointer() as checkpointer:
                return checkpointer.restore(folder, like)
        items = {TREE: ocp.args.StandardRestore(like), CHECK: ocp.args.JsonRestore()}
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
            restored = checkpointer.restore(folder, args=ocp.args.Composite(**items))
        tree, written = restored[TREE], restored[CHECK]["sha256"]
    except Exception as error:  # orbax and tensorstore have no common error for damaged files
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise Damaged(f"the checkpoint {folder} cannot be read: {reason}") from error
    if fingerprint(tree) != written:
        raise Damaged(f"the checkpoint {folder} is damaged: its bytes differ from those written.")
    return tree
