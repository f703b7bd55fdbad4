"""The small files of a checkpoint folder: whether they are sound, and where damaged checkpoints go.

    checkpoints/config.json        identifies the run; has its own checksum
    checkpoints/states/G/          a checkpoint; orbax reads its JSON files without checks, and fails in many ways
    checkpoints/damaged/G-n/       a damaged one, out of the way

The arrays of a checkpoint have a fingerprint, which is compared when they are read (`checkpoint`).
"""

import contextlib
import errno
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from eggroll.files import Damaged, parse_object, read_object, sync, unused_name, write_object

NO_SPACE = os.strerror(errno.ENOSPC)
JSON_FILES = ("_CHECKPOINT_METADATA", "metrics/metrics", "check/metadata", "state/_METADATA")


class DamagedConfig(Damaged):
    """checkpoints/config.json is damaged."""


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn an error of a checkpoint that is being written into an OSError of one line."""
    try:
        yield
    except Exception as error:  # orbax and tensorstore have no common error
        code = getattr(error, "errno", None) or (errno.ENOSPC if NO_SPACE in str(error) else errno.EIO)
        reason = NO_SPACE if code == errno.ENOSPC else (str(error).strip() or type(error).__name__).splitlines()[0][:300]
        raise OSError(code, f"a checkpoint cannot be written: {reason}", str(folder)) from error


def find_damage(step: Path) -> str | None:
    """Say what is wrong with the JSON files of a checkpoint; None: they are sound."""
    try:
        objects = {name: parse_object((step / name).read_bytes(), step / name) for name in JSON_FILES}
    except (Damaged, FileNotFoundError, NotADirectoryError) as error:
        return str(error)
    score, check = objects["metrics/metrics"].get("score"), objects["check/metadata"]
    if not isinstance(score, int | float) or isinstance(score, bool):
        return f"{step / 'metrics/metrics'} has no score."
    known = check.get("score", score)
    if score != known and not (math.isnan(score) and known != known):  # NaN is from earlier versions
        return f"{step / 'metrics/metrics'} has another score than {step / 'check/metadata'}."
    for name in ("all", "params"):
        if not isinstance(check.get(name), str):
            return f"{step / 'check/metadata'} has no fingerprint '{name}'."
    return None


def set_aside(folder: Path, generation: int) -> Path:
    """Move a damaged checkpoint out of the way; return where it is."""
    place = folder / "damaged"
    place.mkdir(exist_ok=True)
    target = unused_name(place / str(generation))
    (folder / "states" / str(generation)).rename(target)
    sync(place)
    sync(folder / "states")
    return target


def check_config(path: Path, config: Mapping[str, Any]) -> bool:
    """Compare a config with the stored one; return whether there is one.

    Raises:
        DamagedConfig: the stored one is damaged.
        ValueError: it is that of a run with other settings; the message names them.
    """
    given = json.loads(json.dumps(config))
    try:
        saved = read_object(path)
    except FileNotFoundError:
        return False
    except Damaged as error:
        raise DamagedConfig(str(error)) from None
    names = [name for name in {**saved, **given} if saved.get(name) != given.get(name)]
    if names:
        differing = ", ".join(f"{name} (was {saved.get(name)!r}, is {given.get(name)!r})" for name in names)
        remedy = "Continue it with its own settings, or choose another folder."
        raise ValueError(f"{path.parent} has a run with other settings: {differing}. {remedy}")
    return True


def write_config(path: Path, config: Mapping[str, Any]) -> None:
    """Write the config of a run."""
    write_object(path, config)
