"""Damage copies of a run's files: every damage must be detected or harmless.

python -m eggroll.experiments.faultdrill.damages FOLDER DAMAGES SEED
"""

import contextlib
import json
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from eggroll.experiments.faultdrill.training import Statistics, make
from eggroll.journal import JournalError, Reader
from eggroll.journal.checkpoint import Checkpoints
from eggroll.journal.fingerprint import fingerprint


def damage_apart(folder: Path, *, damages: int, seed: int) -> dict[str, int]:
    """Run `damage` in its own process, which isolates late errors of tasks that orbax abandons on damaged files."""
    command = [sys.executable, "-m", "eggroll.experiments.faultdrill.damages", str(folder), str(damages), str(seed)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"damaging the files failed with {done.returncode}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def damage(folder: Path, *, damages: int, seed: int) -> dict[str, int]:
    """Damage copies of the journal and of the last checkpoint.

    Returns:
        Counts: "found"; "harmless": the checkpoint is intact, because the damaged file is not read; "silent": wrong data was
        restored without an error.
    """
    chance, counts = random.Random(seed + 1), {"found": 0, "harmless": 0, "silent": 0}
    initial = make({})[1]
    expected = _restore(folder, initial)
    assert expected is not None, "the undamaged checkpoint cannot be read"
    for index in range(damages):
        copy = folder.parent / f"{folder.name}-damaged"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(folder, copy)
        which = ("journal", "checkpoint")[index % 2]
        last = max((copy / "checkpoints" / "states").iterdir(), key=lambda path: int(path.name))
        arrays = [path for path in last.rglob("d/*") if path.stat().st_size]
        files = [copy / "journal.bin"] if which == "journal" else arrays
        file = chance.choice(files)
        data = bytearray(file.read_bytes())
        place = chance.randrange(len(data))
        if index // 2 % 2:
            data[place] ^= 1 << chance.randrange(8)
        else:
            del data[place:]
        file.write_bytes(data)
        found = _restore(copy, initial) if which == "checkpoint" else None if _journal_damaged(copy) else "unnoticed"
        counts["found" if found is None else "harmless" if found == expected else "silent"] += 1
        shutil.rmtree(copy)
    return counts


def _journal_damaged(folder: Path) -> bool:
    try:
        reader = Reader(folder / "journal.bin")
        generations = sum(1 for _ in reader)
    except JournalError:
        return True
    expected = sum(1 for _ in Reader(folder.parent / folder.name.removesuffix("-damaged") / "journal.bin"))
    return reader.note is not None or generations < expected


def _restore(folder: Path, initial: Any) -> str | None:
    """Fingerprint of the last checkpoint as restored; None where it is refused."""
    checkpoints = Checkpoints(folder / "checkpoints", config=None)
    with contextlib.suppress(ValueError):
        restored = checkpoints.restore(initial, Statistics().save())
        checkpoints.close()
        assert restored is not None
        state, carried = restored
        return fingerprint((state.params, state.opt_state, state.generation, carried))
    return None


if __name__ == "__main__":
    print(json.dumps(damage(Path(sys.argv[1]), damages=int(sys.argv[2]), seed=int(sys.argv[3]))))
