"""The contents that a run is made of, the user's rows and the code of the reward, by SHA-256.

They are recorded in the recipe of the journal. A run whose files have changed is not resumed, unless the change is accepted; a
replay needs the rows, of which the small model may be trained, and never the reward.
"""

import contextlib
import hashlib
import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eggroll.envs.tasks import Reward, reward_file
from eggroll.envs.tasks.calls import name_of
from eggroll.journal.recovery import find_header
from eggroll.llm.sums import digest_file

Contents = dict[str, str]  # path as given, name of a module or of a function -> SHA-256


def read_contents(data: Path | None, rewards: Sequence[str] | None, *, function: Reward | None = None) -> Contents | None:
    """Return the digests of the file with rows and of those with rewards, not of what these import; None without any.

    Args:
        data: the file with rows.
        rewards: names of rewards.
        function: a reward that was passed as a function; its source is digested where Python has it.

    Raises:
        OSError: a file cannot be read.
    """
    files = {str(data): data} | {name.rpartition(":")[0]: reward_file(name) for name in rewards or ()}
    found = {name: digest_file(file) for name, file in files.items() if file is not None}
    with contextlib.suppress(TypeError, OSError):  # an object, or typed into a prompt
        found |= {} if function is None else {f"reward {name_of(function)}": _digest_source(function)}
    return found or None


def _digest_source(function: Any) -> str:
    return hashlib.sha256(inspect.getsource(function).encode()).hexdigest()


def check_contents(recorded: Mapping[str, str] | None, now: Mapping[str, str] | None, *, advice: str) -> None:
    """Raise ValueError if a file of both has changed; the message names it and ends with the advice."""
    for file, digest in (now or {}).items():
        was = (recorded or {}).get(file, digest)
        if was != digest:
            raise ValueError(f"{file} has changed since the run began: its SHA-256 is {digest[:12]}, not {was[:12]}; {advice}.")


def recorded_contents(folder: Path) -> Any:
    """Return the contents that the journal of a run folder records; None without a sound journal."""
    path = folder / "journal.bin"
    header = find_header(path) if path.exists() else None
    return ((header and header.recipe) or {"options": {}})["options"].get("contents")
