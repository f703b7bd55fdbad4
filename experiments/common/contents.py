"""The contents of files that a run is made of, by SHA-256.

They are recorded in the recipe of the journal. A run whose files have changed is not resumed, unless the change is accepted.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from eggroll.journal.recovery import find_header

Contents = dict[str, str]  # path as given, name of a module or of a function -> SHA-256


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
