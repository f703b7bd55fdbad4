"""One fault in every file of a run and of an exported model: the run resumes bit for bit, and nothing wrong is loaded.

    python -m eggroll.experiments.faultdrill.storage FOLDER FAULTS SEED

Every copy of the folder gets one fault in one file: a flipped bit, a truncation, a deletion or garbage. Outcomes:

    harmless      no file that matters, or no part of it
    recovered     a warning, or a refusal that `repair` resolves; then the run ends with the parameters of an undisturbed one
    detected      an exported model is refused by an error
    silent        other parameters, or other numbers in metrics.jsonl, without an error
    unresumable   the run cannot be continued, even after `repair`
"""

import contextlib
import io
import json
import logging
import random
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import jax

from eggroll.experiments.common.run import use_compilation_cache
from eggroll.experiments.faultdrill.training import make, work
from eggroll.journal import Entry, Reader
from eggroll.journal.fingerprint import fingerprint
from eggroll.journal.repair import repair
from eggroll.llm import hf
from eggroll.llm.models.families import init_params
from eggroll.llm.models.transformer import TransformerConfig
from eggroll.runs.metrics import read_metrics
from eggroll.state import copy_state

KINDS = ("flip", "truncate", "delete", "garbage")
OUTCOMES = ("harmless", "recovered", "detected", "silent", "unresumable")
GENERATIONS, EVERY, MORE = 37, 10, 2  # of the run, between checkpoints, after the fault
MODEL = TransformerConfig(257, 16, 24, 2, 2, 2, 8)


def damage_storage(folder: Path, *, faults: int, seed: int) -> dict[str, Any]:
    """Run `storage_drill` in its own process, which isolates late errors of tasks that orbax abandons on damaged files."""
    command = [sys.executable, "-m", "eggroll.experiments.faultdrill.storage", str(folder), str(faults), str(seed)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the storage drill failed with {done.returncode}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


class Case(NamedTuple):
    """A folder without faults, and what its copies must give."""

    folder: Path
    expected: Any


def storage_drill(folder: Path, *, faults: int, seed: int) -> dict[str, Any]:
    """Damage copies of a run and of an export.

    Args:
        folder: emptied.
        faults: copies for every file and kind of fault.
        seed: of places and bits.

    Returns:
        "storage_faults": their number; "storage": outcomes by kind of fault; "silent", "unresumable", "lost_generations":
        totals. A generation is lost if its record survived the fault, and is not in the journal of the resumed run.
    """
    shutil.rmtree(folder, ignore_errors=True)
    drill = _Drill(folder, random.Random(seed))
    found: dict[str, Counter[str]] = {kind: Counter() for kind in KINDS}
    for case, check in ((drill.run, drill.resume), (drill.model, drill.load)):
        for name in sorted(path.relative_to(case.folder) for path in case.folder.rglob("*") if path.is_file()):
            for kind in KINDS * faults:
                copy = folder / "damaged"
                shutil.rmtree(copy, ignore_errors=True)
                shutil.copytree(case.folder, copy)
                if _inflict(copy / name, kind, drill.chance):
                    outcome = check(copy)
                    found[kind][outcome] += 1
                    if outcome in ("silent", "unresumable"):
                        print(f"{outcome}: {kind} of {name}", flush=True)
    shutil.rmtree(folder / "damaged", ignore_errors=True)
    return {
        "storage_faults": sum(counts.total() for counts in found.values()),
        "storage": {kind: {outcome: counts[outcome] for outcome in OUTCOMES} for kind, counts in found.items()},
        **{outcome: sum(counts[outcome] for counts in found.values()) for outcome in ("silent", "unresumable")},
        "lost_generations": drill.lost,
    }


def _inflict(path: Path, kind: str, chance: random.Random) -> bool:
    """Damage a file; return whether it could be damaged so."""
    data = bytearray(path.read_bytes())
    if kind == "delete":
        path.unlink()
        return True
    if not data:
        return False
    place = chance.randrange(len(data))
    if kind == "flip":
        data[place] ^= 1 << chance.randrange(8)
    elif kind == "truncate":
        del data[place:]
    else:
        data[place : place + 64] = chance.randbytes(min(64, len(data) - place))
    path.write_bytes(data)
    return True


class _Drill:
    """The two folders, and what is expected of their copies."""

    def __init__(self, folder: Path, chance: random.Random):
        self.chance, self.lost, self._made = chance, 0, make({})
        self._warnings = _Warnings()
        logging.getLogger("eggroll").addHandler(self._warnings)
        self._train(folder / "run", GENERATIONS)
        shutil.copytree(folder / "run", folder / "whole")
        state = self._train(folder / "whole", GENERATIONS + MORE)
        self.run = Case(folder / "run", (state, _entries(folder / "whole"), _numbers(folder / "whole")))
        params = init_params(MODEL, key=jax.random.key(0))
        self.model = Case(hf.save(folder / "model", MODEL, params, max_shard_bytes=20_000), fingerprint(params))

    def _train(self, folder: Path, generations: int) -> str:
        es, initial = self._made
        made = es, copy_state(initial)
        with contextlib.redirect_stdout(io.StringIO()):
            return work(folder, generations=generations, checkpoint_every=EVERY, made=made)

    def resume(self, folder: Path) -> str:
        """Resume a damaged run, after a repair if it is refused."""
        kept = _entries(folder)
        self._warnings.count, outcome = 0, "recovered"
        for _ in range(3):  # damage to several checkpoints and the journal may need one repair each
            try:
                state = self._train(folder, GENERATIONS + MORE)
                break
            except ValueError:
                try:
                    repair(folder / "journal.bin")
                except ValueError:
                    return "unresumable"
        else:
            return "unresumable"
        expected, entries, numbers = self.run.expected
        now = _entries(folder)
        self.lost += len(kept.keys() - now.keys())
        outcome = outcome if self._warnings.count or now.keys() != entries.keys() else "harmless"
        read = _numbers(folder)
        wrong = state != expected or any(not _equal(now[g], entries[g]) for g in now) or not read.items() <= numbers.items()
        return "silent" if wrong else outcome

    def load(self, folder: Path) -> str:
        """Load a damaged export."""
        try:
            params = hf.load(folder)[2]
        except (ValueError, OSError):
            return "detected"
        return "harmless" if fingerprint(params) == self.model.expected else "silent"


class _Warnings(logging.Handler):
    """Counts warnings."""

    count = 0

    def emit(self, record: logging.LogRecord) -> None:
        """Count."""
        self.count += 1


def _entries(folder: Path) -> dict[int, Entry]:
    """The generations in a journal, over damaged ones; none without a journal."""
    path = folder / "journal.bin"
    return {entry.generation: entry for entry in Reader(path, tolerant=True)} if path.exists() else {}


def _numbers(folder: Path) -> dict[int, tuple[Any, ...]]:
    """What metrics.jsonl says of every generation, without times."""
    rows = read_metrics(folder)
    return {row["generation"]: (row["mean_fitness"], row["gradient_norm"], *row["leaf_norms"]) for row in rows}


def _equal(one: Entry, other: Entry) -> bool:
    return one.coefficients.tobytes() == other.coefficients.tobytes() and one.extra == other.extra


if __name__ == "__main__":
    use_compilation_cache()
    print(json.dumps(storage_drill(Path(sys.argv[1]), faults=int(sys.argv[2]), seed=int(sys.argv[3]))))
