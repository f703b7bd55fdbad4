"""A checkpoint that another one of its generation replaces, because its state was changed by hand (`DurableRun.adopt`).

    checkpoints/replaced/G       the older one, until the newer one is complete
    checkpoints/best/states/G    the older one afterwards, if it has the best score; otherwise it is deleted

A kill in between leaves the older one, which comes back when the run is opened or repaired.
"""

import json
import math
import shutil
from pathlib import Path

from eggroll.files import sync
from eggroll.journal.integrity import find_damage


def put_aside(folder: Path, generation: int) -> None:
    """Move a checkpoint, if there is one, out of the way of another one of its generation; `settle` follows that one."""
    settle(folder)
    step = folder / "states" / str(generation)
    if step.exists():
        _move(step, folder / "replaced" / step.name)


def settle(folder: Path) -> None:
    """Bring a replaced checkpoint back if there is no newer one of its generation; otherwise keep it only as the best."""
    for step in [*folder.glob("replaced/*")]:
        if not (folder / "states" / step.name).exists():
            _move(step, folder / "states" / step.name)
        elif _score(step) > max(map(_score, _steps(folder) + _steps(folder / "best"))):
            shutil.rmtree(folder / "best", ignore_errors=True)
            _move(step, folder / "best" / "states" / step.name)
        else:
            shutil.rmtree(step)
    if find_best(folder) is None:
        shutil.rmtree(folder / "best", ignore_errors=True)


def find_best(folder: Path) -> int | None:
    """The generation of a replaced checkpoint that was kept and has a better score than all others; None: there is none."""
    most = max(map(_score, _steps(folder)), default=-math.inf)
    return next((int(step.name) for step in _steps(folder / "best") if _score(step) > most), None)


def _steps(folder: Path) -> list[Path]:
    return [step for step in folder.glob("states/*") if step.name.isdecimal()]


def _score(step: Path) -> float:
    """The score of a checkpoint; minus infinity without one."""
    if find_damage(step) is not None:
        return -math.inf
    score = json.loads((step / "metrics/metrics").read_bytes())["score"]
    return -math.inf if math.isnan(score) else score


def _move(step: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    step.rename(target)
    sync(step.parent)
    sync(target.parent)
