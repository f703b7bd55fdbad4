"""Checkpoints of a run through orbax: asynchronous, atomic, the last few and the best kept.

With several processes, every process makes the same calls on the same folder.
"""

import contextlib
import logging
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from eggroll.devices.processes import first_does
from eggroll.journal.fingerprint import fingerprint, fingerprint_of_leaves
from eggroll.journal.integrity import DamagedConfig, check_config, find_damage, set_aside, write_config, writing
from eggroll.journal.replaced import find_best, put_aside, settle
from eggroll.journal.stored import abstract, name_of, put_like, refill, shapes_of, storable
from eggroll.protocol import S
from eggroll.state import keys_to_words, words_to_keys

logger = logging.getLogger(__name__)
CHUNK, IN_FLIGHT = 1 << 26, 1 << 28  # bytes: encoded together; written or read at a time


class OtherModel(ValueError):
    """A sound checkpoint has other arrays than the run."""


class Checkpoints:
    """The checkpoints in a folder.

    Args:
        folder: created if missing.
        config: JSON values that identify the run; a folder with another config is refused. None: to read only, whatever the
            config; a run that writes to the folder meanwhile is not disturbed.
        identified: whether it is known that the folder belongs to this run; then a damaged config.json is written again.
        keep: number of most recent checkpoints to keep, in addition to the one with the best score.

    Raises:
        ModuleNotFoundError: orbax-checkpoint is not installed.
        ValueError: the folder belongs to a run with another config, and the message names the fields; or a file is damaged.
            A damaged checkpoint is not among these: it is moved to `damaged/`, with a warning, or refused when only reading.
    """

    def __init__(self, folder: str | Path, *, config: Mapping[str, Any] | None, keep: int = 3, identified: bool = False):
        try:
            import orbax.checkpoint as ocp
        except ModuleNotFoundError as error:
            if not str(error.name).startswith("orbax"):
                raise
            message = "checkpoints need orbax, of the extra experiments: pip install orbax-checkpoint installs it."
            raise ModuleNotFoundError(message, name=error.name) from None
        if not isinstance(keep, int) or keep < 1:
            raise ValueError(f"keep must be an integer >= 1, got {keep!r}.")
        logging.getLogger("absl").setLevel(logging.CRITICAL)  # orbax logs every step of every save, and raises what it logs
        self._folder = Path(folder).absolute()
        first_does(lambda: self._prepare(config, identified=identified))
        policies = ocp.checkpoint_managers
        score = {"best_fn": lambda metrics: metrics["score"], "best_mode": "max"}
        kept = [policies.LatestN(keep), policies.BestN(get_metric_fn=score["best_fn"], n=1)]
        self._ocp = ocp
        self._options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy(kept),
            create=config is not None,
            read_only=config is None,
            **score,
        )
        self._in_flight = IN_FLIGHT
        self._manager = self._make_manager()

    def _prepare(self, config: Mapping[str, Any] | None, *, identified: bool) -> None:
        """Check what is in the folder; unless it is only read, remove what a kill left and set damaged checkpoints aside."""
        if config is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._check_config(config, identified=identified)
            for unfinished in self._folder.glob("states/*.orbax-checkpoint-tmp*"):  # left by a kill during a write
                shutil.rmtree(unfinished)
            settle(self._folder)
        self._skip_damaged(move=config is not None)

    def _check_config(self, config: Mapping[str, Any], *, identified: bool) -> None:
        path = self._folder / "config.json"
        try:
            stored = check_config(path, config)
        except DamagedConfig as error:
            if not identified:
                raise
            logger.warning("%s It was written again.", error)
            stored = False
        if not stored:
            write_config(path, config)

    def _skip_damaged(self, *, move: bool) -> None:
        """Set checkpoints with damaged JSON files aside; orbax could not even list the others."""
        for step in sorted(self._folder.glob("states/*")):
            if not step.name.isdecimal() or (damage := find_damage(step)) is None:
                continue
            if not move and step.exists():  # the run that writes it may have removed it meanwhile
                raise ValueError(f"the checkpoint of generation {step.name} is damaged: {damage}")
            if move:
                moved = set_aside(self._folder, int(step.name))
                words = f"the checkpoint of generation {step.name}, now in {moved}, is damaged; an earlier one is used"
                logger.warning("%s: %s", words, damage)

    def set_aside(self, generations: Sequence[int]) -> None:
        """Move damaged checkpoints to the folder `damaged`; all processes call this."""
        if not generations:
            return
        self._manager.close()
        first_does(lambda: self._set_aside(generations))
        self._manager = self._make_manager()

    def _set_aside(self, generations: Sequence[int]) -> None:
        for generation in generations:
            logger.warning("the damaged checkpoint is now in %s.", set_aside(self._folder, generation))

    def _make_manager(self) -> Any:
        """A manager that writes and reads arrays of less than `_in_flight` bytes at a time; a larger one would be refused."""
        limit = self._in_flight / 1e9
        state = self._ocp.StandardCheckpointHandler(save_concurrent_gb=limit, restore_concurrent_gb=limit)
        handlers = {"state": state, "check": self._ocp.JsonCheckpointHandler()}
        return self._ocp.CheckpointManager(self._folder / "states", options=self._options, item_handlers=handlers)

    def _make_room(self, stored: Any) -> None:
        """Raise the limit to the largest array."""
        largest = max((leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(stored)), default=0)
        if largest >= self._in_flight:
            self._manager.close()
            self._in_flight = largest + 1
            self._manager = self._make_manager()

    @property
    def generations(self) -> list[int]:
        """Generations with a complete checkpoint, in order."""
        return sorted(self._manager.all_steps())

    @property
    def best(self) -> int | None:
        """The generation of the checkpoint with the best score, which `restore_best` reads; None without checkpoints."""
        kept = find_best(self._folder)
        return self._manager.best_step() if kept is None else kept

    def save(self, state: S, carried: Any = None, *, score: float | None = None, replace: bool = False) -> None:
        """Start to write a checkpoint; it is complete after `wait`, `close`, or the next `save`.

        Until then orbax keeps the arrays of this state, on an accelerator as a copy in host memory: one copy of the state that
        cannot be avoided if training continues meanwhile. In addition it encodes 256 MiB at a time, or the largest array.

        Args:
            state: of a generation without a checkpoint.
            carried: pytree of arrays stored with the state.
            score: higher is better; None or NaN: never the best.
            replace: a checkpoint of the same generation, which would be an error otherwise: it stays until this one, which is
                waited for, is complete, and longer if it has the best score.

        Raises:
            OSError: this checkpoint or the last one cannot be written.
        """
        metrics = {"score": float("-inf") if score is None or math.isnan(score) else float(score)}
        stored, args = storable(state, carried), self._ocp.args
        self._make_room(stored)
        chunks = jax.tree.map(lambda _: self._ocp.SaveArgs(chunk_byte_size=CHUNK), stored)
        named = {
            "leaves": [[name_of(path), jax.tree_util.keystr(path)] for path, _ in jax.tree_util.tree_leaves_with_path(stored)]
        }
        check = args.JsonSave({"all": fingerprint(stored), "params": fingerprint(state.params), **metrics, **named})
        saved = args.Composite(state=args.StandardSave(stored, save_args=chunks), check=check)
        with writing(self._folder):
            if replace:
                self._manager.wait_until_finished()
                first_does(lambda: put_aside(self._folder, int(state.generation)))
                self._manager.reload()
            self._manager.save(int(state.generation), args=saved, metrics=metrics)
            if replace:
                self._manager.wait_until_finished()
                first_does(lambda: settle(self._folder))

    def restore(self, like: S, carried: Any = None, *, generation: int | None = None) -> tuple[S, Any] | None:
        """Read a checkpoint. Memory holds `like`, the result, and at most 256 MiB or the largest array while it is decoded.

        Args:
            like: a state with the structure, dtypes and shardings to restore, such as the initial one, or its description.
            carried: the same for the carried arrays.
            generation: which one; None: the last complete one.

        Returns:
            `(state, carried)`, or None when there is no checkpoint.

        Raises:
            OtherModel: the checkpoint is sound, and of another model or optimizer.
            ValueError: the checkpoint is damaged.
        """
        if generation is None and not self.generations:
            return None
        chosen = self.generations[-1] if generation is None else generation
        args, target = self._ocp.args, storable(like, carried)
        self._make_room(target)
        target = jax.tree.map(abstract, target)
        try:
            restored = self._manager.restore(
                chosen, args=args.Composite(state=args.StandardRestore(target), check=args.JsonRestore())
            )
            stored = restored["state"]
            if fingerprint(stored) != restored["check"]["all"]:
                raise ValueError("its bytes differ from those written")
            if shapes_of(stored) != shapes_of(target):  # orbax reads NumPy arrays of any shape
                raise ValueError("its arrays have other shapes or dtypes")
            stored = jax.tree.map(refill, {"state": like._asdict(), "carried": carried}, stored)
        except MemoryError:
            raise
        except Exception as error:  # orbax and tensorstore have no common error for damaged files
            if "RESOURCE_EXHAUSTED" in str(error):
                raise
            place = f"the checkpoint of generation {chosen} in {self._folder}"
            if self._is_of_another_model(chosen, target):
                raise OtherModel(
                    f"{place} is of another model or optimizer, with other arrays: restore them, or choose another folder."
                ) from error
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ValueError(f"{place} cannot be read: {reason}") from error
        return like._replace(**words_to_keys(stored["state"], like._asdict())), words_to_keys(stored["carried"], carried)

    def restore_best(self, like: S, carried: Any = None) -> tuple[S, Any] | None:
        """Read the checkpoint with the best score, as `restore` does, even if one with an adopted state has replaced it."""
        if find_best(self._folder) is None:
            return self.restore(like, carried, generation=self.best)
        with contextlib.closing(Checkpoints(self._folder / "best", config=None)) as kept:
            return kept.restore(like, carried)

    def read_state(self, like: S, generation: int) -> S:
        """Read the state of a checkpoint, placed as `like`, whatever is carried with it; ValueError if it is damaged."""
        found, check = self._read_arrays(generation)
        if fingerprint_of_leaves((path, found[name]) for name, path in check["leaves"]) != check["all"]:
            raise ValueError(f"the checkpoint of generation {generation} in {self._folder} is damaged.")
        wanted, tree = jax.tree_util.tree_flatten_with_path({"state": keys_to_words(like._asdict())})
        leaves = [put_like(leaf, refill(leaf, found[name_of(path)])) for path, leaf in wanted]
        return like._replace(**words_to_keys(jax.tree.unflatten(tree, leaves)["state"], like._asdict()))

    def _read_arrays(self, generation: int) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Read all arrays of a checkpoint by name, and what is known of them."""
        args = self._ocp.args
        tree = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), self._manager.item_metadata(generation)["state"])
        parts = args.Composite(state=args.StandardRestore(tree), check=args.JsonRestore())
        restored = self._manager.restore(generation, args=parts)
        found = {name_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(restored["state"])}
        return found, restored["check"]

    def _is_of_another_model(self, generation: int, target: Any) -> bool:
        """Whether a checkpoint has other arrays than `target`, and all of its bytes are those written.

        Earlier versions wrote no names of leaves: then it is one that can be read.
        """
        try:
            found, check = self._read_arrays(generation)
            if {name: (leaf.shape, leaf.dtype) for name, leaf in found.items()} == shapes_of(target):
                return False
            if (leaves := check.get("leaves")) is None:
                return True
            paths = [(path, found.pop(name)) for name, path in leaves]
            return not found and fingerprint_of_leaves(paths) == check["all"]
        except MemoryError:
            raise
        except Exception as error:  # orbax and tensorstore have no common error for damaged files
            if "RESOURCE_EXHAUSTED" in str(error):
                raise
            return False

    def fingerprints(self, generation: int) -> dict[str, str]:
        """Return the saved fingerprints: of everything ("all") and of the parameters ("params")."""
        args = self._ocp.args
        return self._manager.restore(generation, args=args.Composite(check=args.JsonRestore()))["check"]

    def wait(self) -> None:
        """Wait until the last `save` is complete."""
        with writing(self._folder):
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Wait and close."""
        with writing(self._folder):
            self._manager.close()
