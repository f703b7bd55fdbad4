"""The journal of a run from the command line.

    python -m eggroll.journal inspect RUN                  show the contents
    python -m eggroll.journal replay RUN --generation G    rebuild the parameters after G generations, as an .npz file
    python -m eggroll.journal verify RUN                   rebuild the parameters of every checkpoint and compare
    python -m eggroll.journal repair RUN                   set damaged records aside, so that the run resumes

RUN is a run folder or a journal.bin. `replay` and `verify` import and call the recipe in the header, a function that makes the
strategy and the initial parameters. A recipe outside of eggroll is called only if you name its module with --import, or with
--trust, whatever it is: use these on runs that you trust as you trust a program.
"""

import argparse
import contextlib
import importlib
import itertools
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from eggroll.files import sync
from eggroll.journal import JournalError, Reader, make_header, replay
from eggroll.journal.checkpoint import Checkpoints
from eggroll.journal.environment import environment_id
from eggroll.journal.fingerprint import fingerprint
from eggroll.journal.header import UPDATE
from eggroll.journal.repair import repair
from eggroll.protocol import Strategy
from eggroll.state import copy_state, keys_to_words

OWN, RECIPES = ("eggroll", "experiments"), ("remake", "make")  # packages and names of functions that are called unasked
ROUNDED = 0.01  # of how far a parameter moved: rounding alone stays below
STORED = 4  # roundings of its stored values, besides
SHOWN = 10  # rows of the table: the first and the last five


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line; exit with a clear error."""
    parser = argparse.ArgumentParser(
        prog="python -m eggroll.journal", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=tuple(COMMANDS))
    parser.add_argument("run", type=Path, help="run folder, or the journal itself")
    parser.add_argument("--generation", type=int, help="replay: generations to apply; all by default")
    parser.add_argument("--out", type=Path, help="replay: the file; RUN/replayed-G.npz by default")
    parser.add_argument("--import", dest="imports", action="append", metavar="MODULE", help="replay, verify: may be imported")
    parser.add_argument("--trust", action="store_true", default=None, help="replay, verify: import what the journal names")
    options = parser.parse_args(arguments)
    for name, given, commands in (
        ("generation", options.generation, ("replay",)),
        ("out", options.out, ("replay",)),
        ("import", options.imports, ("replay", "verify")),
        ("trust", options.trust, ("replay", "verify")),
    ):
        if options.command not in commands and given is not None:
            sys.exit(f"error: --{name} has no effect with {options.command}: it belongs to {' and '.join(commands)}.")
    path = options.run / "journal.bin" if options.run.is_dir() else options.run
    try:
        COMMANDS[options.command](path, options)
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")


def _inspect(path: Path, options: argparse.Namespace) -> None:
    reader = Reader(path, tolerant=True)
    header = reader.header
    print(f"{path}, format {header.version}, key {header.key}, initial parameters {header.fingerprint[:16]}")
    for name, value in (header.config | header.versions | {"version of the update": header.update}).items():
        print(f"  {name}: {value}")
    for name in header.environments or ():
        print(f"  ran on {name}")
    for row in header.plan:
        print(f"  {row}")
    rows, adopted = [], []
    for entry in reader:
        adopted += [entry.generation] if entry.sums is not None and entry.sums.is_adopted else []
        zero = np.mean(entry.coefficients == 0)
        norm = np.linalg.norm(entry.coefficients)
        rows.append(f"{entry.generation:>10}  {entry.sigma:<10.4g}  {entry.coefficients.size:>8}  {norm:<10.4g}  {zero:.0%}")
    print("generation  sigma          pairs  norm        zero")
    hidden = len(rows) - SHOWN
    shown = rows if hidden <= 0 else [*rows[: SHOWN // 2], f"       ...  {hidden} more", *rows[-SHOWN // 2 :]]
    print("\n".join(shown))
    print(f"{len(rows)} generations, {path.stat().st_size:,} bytes")
    for generation in adopted:
        print(f"the state was changed by hand before generation {generation}")
    for gap in reader.gaps:
        print(f"generations {gap.first} to {(gap.next or 0) - 1} are missing or damaged (byte {gap.start})")
    if reader.note:
        print(reader.note)


def _remake(reader: Reader, options: argparse.Namespace) -> tuple[Strategy, Any]:
    """Make the strategy and the initial state by the recipe, and compare them with the header."""
    recipe = reader.header.recipe
    if recipe is None:
        raise JournalError(f"{reader.path} has no recipe; rebuild it in Python with eggroll.journal.replay.")
    module = str(recipe["function"]).partition(":")[0]
    if options.trust or module in (options.imports or ()):
        make = _find(recipe["function"])
    elif module.split(".")[0] in OWN:
        make = _find(recipe["function"])
        if getattr(make, "__name__", None) not in RECIPES or make.__module__.split(".")[0] not in OWN:
            raise JournalError(f"{reader.path} names {recipe['function']}, which is no recipe: --trust calls it anyway.")
    else:
        raise JournalError(
            f"{reader.path} would import {module} and call {recipe['function']}: repeat the command with --import {module} if "
            "the run is yours, or one that you trust as a program."
        )
    es, initial = make(recipe["options"])
    reader.header.check(make_header(es, initial), replay=True)
    return es, initial


def _find(function: str) -> Any:
    """Find `module:name`; version 0.1 wrote `experiments.rl:remake` for `eggroll.experiments.rl.__main__:remake`."""
    module, _, name = function.partition(":")
    found = importlib.import_module(f"eggroll.{module}" if module.startswith("experiments.") else module)
    return getattr(found if hasattr(found, name) else importlib.import_module(f"{found.__name__}.__main__"), name)


def _replay(path: Path, options: argparse.Namespace) -> None:
    reader = Reader(path)
    es, initial = _remake(reader, options)
    state = replay(es, _start(path, reader, initial, options.generation), iter(reader), until=options.generation)
    out = options.out or path.parent / f"replayed-{int(state.generation)}.npz"
    parameters = es.parameters(state)
    leaves = jax.tree_util.tree_leaves_with_path(parameters)
    partial = out.with_suffix(".partial")
    arrays: Any = {jax.tree_util.keystr(name, simple=True, separator="/"): _to_numpy(leaf) for name, leaf in leaves}
    with open(partial, "wb") as file:
        np.savez(file, **arrays)
    partial.replace(out)
    sync(out)
    sync(out.parent)
    print(f"{out}: parameters after {int(state.generation)} generations, SHA-256 {fingerprint(parameters)}")


def _start(path: Path, reader: Reader, initial: Any, generation: int | None) -> Any:
    """The state that a replay begins with: the initial one or, after a change by hand, that of a checkpoint."""
    changes = [before for before in _adopted(reader) if generation is None or before < generation]
    if not changes:
        return initial
    with contextlib.closing(Checkpoints(path.parent / "checkpoints", config=None)) as checkpoints:
        fitting = [own for own in checkpoints.generations if own >= changes[-1] and (generation is None or own <= generation)]
        if not fitting:
            return initial  # the replay says where it has to stop
        print(f"the state was changed by hand before generation {changes[-1]}: the replay begins at checkpoint {fitting[0]}")
        return checkpoints.read_state(initial, fitting[0])


def _adopted(reader: Reader) -> list[int]:
    """Generations before which the state was changed by hand."""
    return [entry.generation for entry in reader if entry.sums is not None and entry.sums.is_adopted]


def _repair(path: Path, options: argparse.Namespace) -> None:
    print("\n".join(repair(path)))


def _to_numpy(leaf: Any) -> np.ndarray:
    """A leaf as .npz stores it: short floats, which NumPy cannot name, as float32, typed keys as their words."""
    array = np.asarray(keys_to_words(leaf))
    return array if array.dtype.kind in "fiub" else array.astype(np.float32)


def _verify(path: Path, options: argparse.Namespace) -> None:
    reader = Reader(path)
    if reader.header.update != UPDATE:
        raise JournalError(
            f"{path} was written with version {reader.header.update} of the update, whose parameters this library (version "
            f"{UPDATE}) rebuilds up to rounding, not bit for bit."
        )
    es, state = _remake(reader, options)
    like, changes, said = copy_state(state), _adopted(reader), dict[int, str]()
    with contextlib.closing(Checkpoints(path.parent / "checkpoints", config=None)) as checkpoints:
        if not checkpoints.generations:
            raise JournalError(f"{path.parent} has no checkpoint to compare with.")
        for generation in checkpoints.generations:
            changed = [before for before in changes if int(state.generation) < before <= generation]
            if changed:
                print(f"generation {generation}: not compared, the state was changed by hand before generation {changed[-1]}")
                state = checkpoints.read_state(like, generation)
                continue
            here = _is_here(reader, state, generation)
            before = None if here else jax.device_get(keys_to_words(state.params))
            state = replay(es, state, iter(reader), until=generation)
            if checkpoints.fingerprints(generation)["params"] == fingerprint(state.params):
                said[generation] = "equal"
            elif here:
                said[generation] = "DIFFERENT"
            else:
                replayed, state = state, checkpoints.read_state(like, generation)
                distance, is_near = _compare_rounded(before, replayed.params, state.params)
                words = "equal up to rounding" if is_near else "DIFFERENT"
                said[generation] = f"{words}, {distance:.1e} of how far a parameter moved"
            print(f"generation {generation}: {said[generation]}")
    if different := [generation for generation, words in said.items() if words.startswith("DIFFERENT")]:
        raise JournalError(f"the journal does not rebuild the checkpoints of generations {different}.")
    how = "bit for bit" if {*said.values()} <= {"equal"} else "bit for bit or up to rounding"
    print(f"{len(said)} checkpoints are rebuilt {how}")


def _is_here(reader: Reader, state: Any, generation: int) -> bool:
    """Whether all generations before one ran in this environment, or in one that is not known."""
    here = environment_id(state)
    entries = itertools.takewhile(lambda entry: entry.generation < generation, reader)
    return all(entry.sums is None or entry.sums.environment == here for entry in entries)


def _compare_rounded(before: Any, replayed: Any, stored: Any) -> tuple[float, bool]:
    """Compare parameters that were replayed from `before` with those of a checkpoint.

    Returns:
        The largest distance of a parameter, in units of how far it moved, and whether all are near: within `ROUNDED` of that,
        and `STORED` roundings of the stored values.
    """
    distances, near = [0.0], []
    for old, own, other in zip(*map(jax.tree.leaves, (before, replayed, stored)), strict=True):
        stored_dtype = other.dtype
        start, one, two = (np.asarray(keys_to_words(leaf)).astype(np.float64) for leaf in (old, own, other))
        apart, moved, size = (float(np.linalg.norm(x)) for x in (one - two, two - start, two))
        is_floating = jnp.issubdtype(stored_dtype, jnp.floating)
        near.append(apart <= ROUNDED * moved + (STORED * float(jnp.finfo(stored_dtype).eps) * size if is_floating else 0.0))
        distances.append(apart / moved if moved else math.inf if apart else 0.0)
    return max(distances), all(near)


COMMANDS = {"inspect": _inspect, "replay": _replay, "verify": _verify, "repair": _repair}

if __name__ == "__main__":
    main()
