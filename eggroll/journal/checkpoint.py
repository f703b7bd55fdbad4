"""Checkpoints of a run through orbax: asynchronous, atomic, the last few and the best kept.

With several processes, every process makes the same calls on the same folder.
"""

import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from eggroll.devices.processes import is_first, wait_for_all
from eggroll.journal.fingerprint import fingerprint
from eggroll.protocol import S
from eggroll.state import keys_to_words, words_to_keys

CHUNK, IN_FLIGHT = 1 << 26, 1 << 28  # bytes: encoded together; written or read at a time


class Checkpoints:
    """The checkpoints in a folder.

    Args:
        folder: created if missing.
        config: JSON values that identify the run; a folder with another config is refused. None: to read only, whatever the
            config; a run that writes to the folder meanwhile is not disturbed.
        keep: number of most recent checkpoints to keep, in addition to the one with the best score.

    Raises:
        ModuleNotFoundError: orbax-checkpoint is not installed.
        ValueError: the folder belongs to a run with another config; the message names the fields.
    """

    def __init__(self, folder: str | Path, *, config: Mapping[str, Any] | None, keep: int = 3):
        import orbax.checkpoint as ocp

        if not isinstance(keep, int) or keep < 1:
            raise ValueError(f"keep must be an integer >= 1, got {keep!r}.")
        logging.getLogger("absl").setLevel(logging.WARNING)  # orbax logs every step of every save
        self._folder = Path(folder).absolute()
        if config is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
            _check_config(self._folder / "config.json", dict(config))
        policies = ocp.checkpoint_managers
        score = {"best_fn": lambda metrics: metrics["score"], "best_mode": "max"}
        kept = [policies.LatestN(keep), policies.BestN(get_metric_fn=score["best_fn"], n=1)]
        if config is not None and is_first():
            for unfinished in self._folder.glob("states/*.orbax-checkpoint-tmp*"):  # left by a kill during a write
                shutil.rmtree(unfinished)
        wait_for_all("eggroll checkpoints")
        self._ocp = ocp
        self._options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy(kept),
            create=config is not None,
            read_only=config is None,
            **score,
        )
        self._in_flight = IN_FLIGHT
        self._manager = self._make_manager()

    def _make_manager(self) -> Any:
        """A manager that writes and reads arrays of less than `_in_flight` bytes at a time; a larger one would be refused."""
        limit = self._in_flight / 1e9
        state = self._ocp.StandardCheckpointHandler(save_concurrent_gb=limit, restore_concurrent_gb=limit)
        handlers = {"state": state, "check": self._ocp.JsonCheckpointHandler()}
        return self._ocp.CheckpointManager(self._folder / "states", options=self._options, item_handlers=handlers)

    def _make_room(self, stored: Any) -> None:
        """Raise the limit to the largest array."""
        largest = max((leaf.nbytes for leaf in jax.tree.leaves(stored)), default=0)
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
        """The generation with the best score; None without checkpoints."""
        return self._manager.best_step()

    def save(self, state: S, carried: Any = None, *, score: float | None = None) -> None:
        """Start to write a checkpoint; it is complete after `wait`, `close`, or the next `save`.

        Until then orbax keeps the arrays of this state, on an accelerator as a copy in host memory: one copy of the state that
        cannot be avoided if training continues meanwhile. In addition it encodes 256 MiB at a time, or the largest array.

        Args:
            state: of a generation without a checkpoint.
            carried: pytree of arrays stored with the state.
            score: higher is better; None: never the best.
        """
        metrics = {"score": float("-inf") if score is None else float(score)}
        stored, args = _storable(state, carried), self._ocp.args
        self._make_room(stored)
        chunks = jax.tree.map(lambda _: self._ocp.SaveArgs(chunk_byte_size=CHUNK), stored)
        check = args.JsonSave({"all": fingerprint(stored), "params": fingerprint(state.params)})
        saved = args.Composite(state=args.StandardSave(stored, save_args=chunks), check=check)
        self._manager.save(int(state.generation), args=saved, metrics=metrics)

    def restore(self, like: S, carried: Any = None, *, generation: int | None = None) -> tuple[S, Any] | None:
        """Read a checkpoint. Memory holds `like`, the result, and at most 256 MiB or the largest array while it is decoded.

        Args:
            like: a state with the structure, dtypes and shardings to restore, such as the initial one.
            carried: the same for the carried arrays.
            generation: which one; None: the last complete one.

        Returns:
            `(state, carried)`, or None when there is no checkpoint.

        Raises:
            ValueError: the checkpoint is damaged or of another model.
        """
        if generation is None and not self.generations:
            return None
        chosen = self.generations[-1] if generation is None else generation
        args, target = self._ocp.args, _storable(like, carried)
        self._make_room(target)
        target = args.StandardRestore(jax.tree.map(_abstract, target))
        try:
            restored = self._manager.restore(chosen, args=args.Composite(state=target, check=args.JsonRestore()))
            stored = restored["state"]
            if fingerprint(stored) != restored["check"]["all"]:
                raise ValueError("its bytes differ from those written")
            stored = jax.tree.map(_refill, {"state": like._asdict(), "carried": carried}, stored)
        except Exception as error:  # orbax and tensorstore have no common error for damaged files
            reason = str(error).strip().splitlines()[0]
            raise ValueError(f"the checkpoint of generation {chosen} in {self._folder} cannot be read: {reason}") from error
        return like._replace(**words_to_keys(stored["state"], like._asdict())), words_to_keys(stored["carried"], carried)

    def fingerprints(self, generation: int) -> dict[str, str]:
        """Return the saved fingerprints: of everything ("all") and of the parameters ("params")."""
        args = self._ocp.args
        return self._manager.restore(generation, args=args.Composite(check=args.JsonRestore()))["check"]

    def wait(self) -> None:
        """Wait until the last `save` is complete."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Wait and close."""
        self._manager.close()


def _storable(state: S, carried: Any) -> dict[str, Any]:
    stored = keys_to_words({"state": state._asdict(), "carried": carried})
    # orbax refuses empty arrays
    stored = jax.tree.map(lambda leaf: leaf if np.size(leaf) else np.asarray(np.shape(leaf)), stored)
    if jax.process_count() == 1:
        return stored
    # orbax takes global arrays or NumPy arrays, but not arrays local to one process.
    return jax.tree.map(lambda x: np.asarray(x) if getattr(x, "is_fully_addressable", True) else x, stored)


def _refill(like: Any, stored: Any) -> Any:
    """What was read, or the empty array whose shape was stored in its place."""
    if jnp.size(like):
        return stored
    if tuple(stored) != like.shape:
        raise ValueError(f"it has an empty array of shape {tuple(stored)}, expected {like.shape}")
    return like.copy()


def _abstract(leaf: Any) -> Any:
    """Target of a restore: with the sharding of `leaf`, or a NumPy array."""
    if isinstance(leaf, jax.Array):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
    return np.empty_like(leaf)


def _check_config(path: Path, config: dict[str, Any]) -> None:
    """Write the config, or compare it with the stored one."""
    given = json.loads(json.dumps(config))
    if path.exists():
        saved = json.loads(path.read_text())
        names = [name for name in {**saved, **given} if saved.get(name) != given.get(name)]
        if names:
            differing = ", ".join(f"{name} (was {saved.get(name)!r}, is {given.get(name)!r})" for name in names)
            raise ValueError(f"{path.parent} has a run with other settings: {differing}.")
        return
    if not is_first():
        return
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(given, indent=1) + "\n")
    partial.replace(path)
