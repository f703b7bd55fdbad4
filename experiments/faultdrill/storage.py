"""Faults in every file of a run and of what runs leave: the run resumes bit for bit, and nothing wrong is loaded.

    python -m eggroll.experiments.faultdrill.storage FOLDER SUBJECT FAULTS PAIRS SEED

Every copy of a folder gets one fault in one file: a flipped bit, a truncation, a deletion or garbage; or, a pair, one in the
arrays of the newest checkpoint and one in the journal. Outcomes:

    harmless      no file that matters, or no part of it
    recovered     a warning, or a refusal that `repair` resolves; then the run ends as an undisturbed one
    detected      a file of results is refused by an error
    silent        another result, or other numbers in metrics.jsonl, without an error
    unresumable   the run cannot be continued, even after `repair`
"""

import json
import logging
import os
import random
import shutil
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import jax

from eggroll.experiments.common.checkpoint import load_checkpoint, save_checkpoint
from eggroll.experiments.common.run import SUMMARY, use_compilation_cache, write_json
from eggroll.experiments.faultdrill.commands import LAST, RUNS, Train
from eggroll.files import read_object
from eggroll.journal import Entry, Reader
from eggroll.journal.fingerprint import fingerprint
from eggroll.journal.repair import repair
from eggroll.llm import hf
from eggroll.llm.models.families import init_params
from eggroll.llm.models.transformer import TransformerConfig
from eggroll.runs.metrics import read_metrics

KINDS = ("flip", "truncate", "delete", "garbage")
OUTCOMES = ("harmless", "recovered", "detected", "silent", "unresumable")
STOPPED = 14  # generations before the fault; the last checkpoint is older, so that the journal is needed too
MODEL = TransformerConfig(257, 16, 24, 2, 2, 2, 8)
RESULTS = "results"
SUBJECTS = (*RUNS, RESULTS)


class Subject(Protocol):
    """A folder without faults, and what its copies must give."""

    folder: Path
    lost: int  # generations whose record survived the fault, and is not in the journal of the resumed run

    def check(self, copy: Path) -> str:
        """Return the outcome of the faults in a copy."""


def make_subject(name: str, folder: Path) -> Subject:
    """Make a folder to damage, with what belongs to it in `folder`."""
    return Results(folder) if name == RESULTS else Run(folder, RUNS[name](folder / "scratch"))


def storage_drill(folder: Path, subject: str, *, faults: int, pairs: int, seed: int) -> dict[str, Any]:
    """Damage copies of a run, or of the results of one.

    Args:
        folder: emptied.
        subject: of `SUBJECTS`.
        faults: copies for every file and kind of fault.
        pairs: copies of a run with two faults.
        seed: of places and bits.

    Returns:
        "storage": outcomes by kind of fault; "lost_generations".
    """
    shutil.rmtree(folder, ignore_errors=True)
    chance, made = random.Random(f"{seed} {subject}"), make_subject(subject, folder)
    found: dict[str, Counter[str]] = {kind: Counter() for kind in (*KINDS, "pair")}
    for kind, chosen in _faults(made, chance, faults=faults, pairs=pairs):
        copy = folder / "damaged"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(made.folder, copy)
        if all([inflict(copy / name, what, chance) for name, what in chosen]):
            outcome = made.check(copy)
            found[kind][outcome] += 1
            if outcome in ("silent", "unresumable"):
                print(f"{outcome}: {subject}, " + ", ".join(f"{what} of {name}" for name, what in chosen), flush=True)
    shutil.rmtree(folder / "damaged", ignore_errors=True)
    outcomes = {kind: {outcome: counts[outcome] for outcome in OUTCOMES} for kind, counts in found.items()}
    return {"storage": outcomes, "lost_generations": made.lost}


def _faults(
    subject: Subject, chance: random.Random, *, faults: int, pairs: int
) -> Iterator[tuple[str, list[tuple[Path, str]]]]:
    """Yield the kind of a fault, and the files to damage, each with how."""
    for name in sorted(path.relative_to(subject.folder) for path in subject.folder.rglob("*") if path.is_file()):
        for kind in KINDS * faults:
            yield kind, [(name, kind)]
    if isinstance(subject, Run):
        for _ in range(pairs):
            arrays = (chance.choice(newest_arrays(subject.folder)), chance.choice(KINDS))
            yield "pair", [arrays, (Path("journal.bin"), chance.choice(KINDS))]


def newest_arrays(folder: Path) -> list[Path]:
    """The files with the arrays of the newest checkpoint of a run."""
    newest = max((folder / "checkpoints" / "states").iterdir(), key=lambda path: int(path.name))
    return sorted(path.relative_to(folder) for path in newest.rglob("d/*") if path.stat().st_size)


def inflict(path: Path, kind: str, chance: random.Random) -> bool:
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


class Run:
    """A run in the middle, and what its continuation must give."""

    def __init__(self, folder: Path, train: Train):
        self.folder, self.lost, self._train = folder / "run", 0, train
        self._warnings = _Warnings()
        logging.getLogger("eggroll").addHandler(self._warnings)
        train(self.folder, STOPPED)
        checkpoints = {path.name for path in (self.folder / "checkpoints/states").iterdir()}
        if not {"8", "12"} <= checkpoints or str(STOPPED) in checkpoints:
            raise RuntimeError(f"the drill needs checkpoints of generations 8 and 12, not of {STOPPED}; got {checkpoints}.")
        whole = shutil.copytree(self.folder, folder / "whole")
        self.expected = train(whole, LAST), _entries(whole), _numbers(whole)

    def check(self, copy: Path) -> str:
        """Resume a damaged run, after a repair if it is refused."""
        kept = _entries(copy)
        self._warnings.count, outcome = 0, "recovered"
        for _ in range(3):  # damage to several checkpoints and the journal may need one repair each
            try:
                state = self._train(copy, LAST)
                break
            except ValueError:
                try:
                    repair(copy / "journal.bin")
                except ValueError:
                    return "unresumable"
        else:
            return "unresumable"
        expected, entries, numbers = self.expected
        now = _entries(copy)
        self.lost += len(kept.keys() - now.keys())
        outcome = outcome if self._warnings.count or now.keys() != entries.keys() else "harmless"
        read = _numbers(copy)
        wrong = state != expected or any(not _equal(now[g], entries[g]) for g in now) or not read.items() <= numbers.items()
        return "silent" if wrong else outcome


class Results:
    """What finished runs leave: an exported model, a small checkpoint and a summary."""

    def __init__(self, folder: Path):
        self.folder, self.lost = folder / "results", 0
        self._params = init_params(MODEL, key=jax.random.key(0))
        hf.save(self.folder / "model", MODEL, self._params, max_shard_bytes=20_000)
        save_checkpoint(self.folder / "checkpoint", self._params)
        write_json(self.folder / SUMMARY, {"options": {"sigma": 0.1}, "seed": 0, "mean_return": 12.5})
        self._expected = [read() for read in self._readers(self.folder)]

    def _readers(self, folder: Path) -> list[Callable[[], str]]:
        like = jax.device_get(self._params)
        return [
            lambda: fingerprint(hf.load(folder / "model")[2]),
            lambda: fingerprint(load_checkpoint(folder / "checkpoint", like)),
            lambda: json.dumps(read_object(folder / SUMMARY), sort_keys=True),
        ]

    def check(self, copy: Path) -> str:
        """Read everything."""
        outcome = "harmless"
        for read, expected in zip(self._readers(copy), self._expected, strict=True):
            try:
                if read() != expected:
                    return "silent"
            except (ValueError, OSError):
                outcome = "detected"
        return outcome


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


def _numbers(folder: Path) -> dict[int, str]:
    """What metrics.jsonl says of every generation, without times."""
    rows = read_metrics(folder)
    return {row["generation"]: json.dumps({name: value for name, value in row.items() if "second" not in name}) for row in rows}


def _equal(one: Entry, other: Entry) -> bool:
    return one.coefficients.tobytes() == other.coefficients.tobytes() and one.extra == other.extra


def main(folder: str, subject: str, faults: str, pairs: str, seed: str) -> None:
    """Run a drill in this process."""
    use_compilation_cache()
    warnings.simplefilter("ignore")  # of models that learn nothing
    place = Path(folder).absolute()
    place.mkdir(parents=True, exist_ok=True)
    os.chdir(place.parent)  # where small models are kept
    print(json.dumps(storage_drill(place, subject, faults=int(faults), pairs=int(pairs), seed=int(seed))))


if __name__ == "__main__":
    main(*sys.argv[1:])
