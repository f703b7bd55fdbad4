"""Checkpoints of a pytree of arrays with orbax, with a fingerprint that is compared when they are read.

F.partial    the new one, until it is complete and on disk
F.old        the one before, from when it is moved aside until the new one is F; read if a kill left no F
"""

import shutil
from pathlib import Path
from typing import Any

import jax

from eggroll.devices.processes import first_does
from eggroll.files import Damaged, sync
from eggroll.journal.fingerprint import fingerprint
from eggroll.journal.integrity import writing

TREE, CHECK, OLD = "tree", "check", ".old"


def save_checkpoint(folder: str | Path, tree: Any) -> None:
    """Write a pytree of arrays into `folder`, which is replaced once the new checkpoint is complete; all processes call this.

    Raises:
        ModuleNotFoundError: orbax-checkpoint is not installed.
        OSError: it cannot be written; `load_checkpoint` still reads the older one.
    """
    import orbax.checkpoint as ocp

    folder = Path(folder).absolute()
    partial = folder.with_name(f"{folder.name}.partial")
    tree = jax.device_get(tree)
    items = {TREE: ocp.args.StandardSave(tree), CHECK: ocp.args.JsonSave({"sha256": fingerprint(tree)})}
    with writing(folder), ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        checkpointer.save(partial, args=ocp.args.Composite(**items), force=True)
        first_does(lambda: _replace(folder, partial))


def _replace(folder: Path, partial: Path) -> None:
    """Give a complete checkpoint its name; at every moment `find_checkpoint` finds this one or the one before."""
    old = folder.with_name(folder.name + OLD)
    for path in (*partial.rglob("*"), partial):
        sync(path)
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    partial.rename(folder)
    sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def find_checkpoint(folder: str | Path) -> Path:
    """Return where the checkpoint of a folder is: there, or aside if a kill interrupted its replacement."""
    folder = Path(folder).absolute()
    old = folder.with_name(folder.name + OLD)
    return old if old.is_dir() and not folder.is_dir() else folder


def saved_shapes(folder: str | Path) -> list[tuple[int, ...]]:
    """Return the shapes of the arrays of a checkpoint, sorted; the arrays themselves are not read.

    Raises:
        Damaged: the description of the arrays cannot be read.
    """
    import orbax.checkpoint as ocp

    try:
        tree = ocp.PyTreeCheckpointHandler().metadata(find_checkpoint(folder) / TREE).tree
        return sorted(array.shape for array in jax.tree.leaves(tree))
    except Exception as error:  # as in `load_checkpoint`
        raise Damaged(f"the checkpoint {folder} cannot be read: {error}") from error


def load_checkpoint(folder: str | Path, like: Any) -> Any:
    """Read what `save_checkpoint` wrote; `like` is a pytree of arrays or shapes with its structure.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        Damaged: its bytes differ from those written, or are of another tree. Checkpoints of versions before 0.3 have no
            fingerprint; of these only damage that orbax finds is an error.
    """
    import orbax.checkpoint as ocp

    folder = find_checkpoint(folder)
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
