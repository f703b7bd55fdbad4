"""Repair a damaged journal: keep what can be rebuilt, set the rest aside, and say what is lost. Runs no code of the run."""

from pathlib import Path

from eggroll.files import replace_file
from eggroll.journal.header import JournalError
from eggroll.journal.integrity import find_damage
from eggroll.journal.lock import RunLock
from eggroll.journal.recovery import describe_lost, mend, plan
from eggroll.journal.replaced import settle


def repair(path: Path) -> list[str]:
    """Repair a journal so that its run resumes; nothing is deleted.

    Everything up to the last generation that can be rebuilt, from the newest checkpoint or from the start, stays in the file.

    Args:
        path: of the journal.

    Returns:
        Sentences that say what was done; one that says so if the journal is sound.

    Raises:
        JournalError: there is neither a journal nor a checkpoint.
        RunInUse: a process has the run open.
    """
    if not path.parent.is_dir():
        raise JournalError(f"there is no run {path.parent}.")
    lock = RunLock(path.parent)
    try:
        settle(path.parent / "checkpoints")
        covered = _newest_checkpoint(path.parent / "checkpoints" / "states")
        if not path.exists():
            return _begin(path, covered)
        chosen = plan(path, covered=covered, cut=True)
        said = mend(path, chosen, chosen.header)
    finally:
        lock.release()
    if chosen.cut is not None:
        begin = max(chosen.cut.first, covered)
        said.append(f"generations from {begin} on cannot be rebuilt: the run evaluates them again when it is resumed.")
    if chosen.header is None:
        said.append("the run writes the header again when it is resumed with accept_change=True (--accept-change).")
    sound = f"{path} has {chosen.survey.reached} generations, and no damage that can be repaired"
    return said if chosen.writes else [*said, f"{sound}: nothing was changed."]


def _newest_checkpoint(folder: Path) -> int:
    """The generation of the newest checkpoint whose JSON files are sound; 0 without one."""
    steps = [step for step in folder.glob("*") if step.name.isdecimal() and find_damage(step) is None]
    return max((int(step.name) for step in steps), default=0)


def _begin(path: Path, covered: int) -> list[str]:
    """Create an empty journal, which tells the run that it may continue from its checkpoint."""
    if not covered:
        raise JournalError(f"{path.parent} has neither a journal nor a sound checkpoint.")
    replace_file(path, b"")
    return [f"{path} was missing and is now empty.", *describe_lost(path, [range(covered)])]
