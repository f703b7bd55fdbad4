"""Mend a damaged journal: what can be rebuilt stays in the file, and the damaged bytes are copied aside, never deleted.

    survey(path)                    what is in the file, over damaged records
    plan(...)                       what to do about it, given the checkpoint that the run continues from; changes nothing
    mend(...)                       do it

One flipped bit of a record is flipped back (`correction`). Other damage to generations before the checkpoint costs only their
replay. Generations after it cannot be rebuilt beyond the damage: a run refuses to open until `repair` cuts the journal there.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from eggroll.files import PIECE, parse_object, replace_file, unused_name
from eggroll.journal.correction import correct
from eggroll.journal.header import Header, JournalError, read_copy
from eggroll.journal.records import FRAME, GENERATION, HEADER, MAGIC, Gap, Reader, decode, encode_header

MAX_CORRECTED = 1 << 26  # bytes of a record


class Survey(NamedTuple):
    """What is in a journal."""

    header: Header | None  # None: it is damaged
    gaps: list[Gap]  # damage at the end of the file among them, unless it is a record that a kill truncated
    reached: int  # generations up to its end
    end: int  # bytes up to the end of the last sound record
    size: int
    adopted: list[Gap]  # where the state was changed by hand: only a checkpoint leads over it


class Plan(NamedTuple):
    """How to mend a journal."""

    survey: Survey
    copy: Header | None  # next to the journal
    corrected: dict[Gap, bytes]  # the records with a flipped bit, as they were
    aside: list[Gap]  # the other damaged bytes
    cut: Gap | None  # everything from here on is set aside
    lost: list[range]  # generations that cannot be replayed any more

    @property
    def header(self) -> Header | None:
        """The header, where it or its copy is sound, or it was corrected."""
        fixed = next((record for gap, record in self.corrected.items() if gap.start == 0), None)
        if fixed is None:
            return self.survey.header or self.copy
        return Header(**parse_object(fixed[FRAME.size :], "the header"))

    @property
    def is_header_damaged(self) -> bool:
        """Whether the file has no header that is sound or was corrected."""
        return self.survey.header is None and all(gap.start > 0 for gap in self.corrected)

    @property
    def writes(self) -> bool:
        """Whether the file changes."""
        return bool(self.corrected or self.aside or self.cut or self.survey.header is None)


def survey(path: Path) -> Survey:
    """Read a journal to its end, over damaged records."""
    reader, reached, adopted = Reader(path, tolerant=True), 0, list[Gap]()
    for entry in reader:
        reached = entry.generation + 1
        if entry.sums is not None and entry.sums.is_adopted:
            adopted.append(Gap(reader.end, reader.end, entry.generation, entry.generation))
    size, gaps = path.stat().st_size, list(reader.gaps)
    tail = Gap(reader.end, size, reached, None)
    is_kept = reader.end == 0 or not _is_truncated(path, reader.end, size) or _correct(path, tail) is not None
    if reader.end < size and is_kept:
        gaps.append(tail)
    return Survey(reader.header if reader.has_header else None, gaps, reached, reader.end, size, adopted)


def find_header(path: Path) -> Header | None:
    """The header of a journal, corrected or from its copy where it is damaged; None: the copy is damaged too."""
    reader = Reader(path, tolerant=True)
    return reader.header if reader.has_header else plan(path, covered=0, cut=True).header


def _is_truncated(path: Path, start: int, size: int) -> bool:
    """Whether the bytes from `start` are the beginning of a record that a kill interrupted."""
    with open(path, "rb") as file:
        file.seek(start)
        head = file.read(FRAME.size)
    if not MAGIC.startswith(head[: len(MAGIC)]):
        return False
    return len(head) < FRAME.size or start + FRAME.size + FRAME.unpack(head)[2] > size


def plan(path: Path, *, covered: int, cut: bool = False) -> Plan:
    """Decide what to do about a journal.

    Args:
        path: of the journal.
        covered: generation of the newest sound checkpoint; 0: there is none.
        cut: set aside what cannot be rebuilt, instead of raising.

    Raises:
        JournalError: generations after the checkpoint cannot be rebuilt, and `cut` is False.
    """
    found, copy = survey(path), read_copy(path)
    corrected: dict[Gap, bytes] = {}
    aside, lost, at = list[Gap](), list[range](), None
    if cut:
        at = next((place for place in found.adopted if place.first > covered), None)
    for gap in found.gaps:
        if at is not None and gap.start >= at.start:
            break
        fixed = _correct(path, gap)
        if fixed is not None:
            corrected[gap] = fixed
            continue
        header_lost = gap.start == 0 and copy is None and not covered and (gap.end > 0 or gap.first != gap.next)
        if header_lost or (gap.next is not None and gap.next > max(covered, gap.first)):
            if not cut:
                raise _refusal(path, gap, covered)
            if not (header_lost and gap.first == gap.next):  # behind a damaged header all generations are there
                at = gap
                break
        if gap.start < gap.end:
            aside.append(gap)
        if gap.next is not None and gap.first < gap.next and gap.start < gap.end:
            lost.append(range(gap.first, gap.next))
    is_rewritten = at is None and bool(corrected or aside or found.header is None)
    has_tail = found.size - found.end > FRAME.size and all(gap.end < found.size for gap in found.gaps)
    if is_rewritten and has_tail:
        aside.append(Gap(found.end, found.size, found.reached, None))  # a truncated record
    reached = found.reached if at is None else at.first
    if reached + (1 if _is_corrected_tail(found, corrected) else 0) < covered:
        lost.append(range(reached, covered))
    return Plan(found, copy, corrected, aside, at, lost)


def _is_corrected_tail(found: Survey, corrected: dict[Gap, bytes]) -> bool:
    return any(gap.next is None and gap.start > 0 for gap in corrected)


def _refusal(path: Path, gap: Gap, covered: int) -> JournalError:
    place = "in its header" if gap.start == 0 else f"at generation {gap.first} (byte {gap.start})"
    after = (
        f"after the last sound checkpoint, of generation {covered}" if covered else "and there is no sound checkpoint after it"
    )
    return JournalError(
        f"{path} is damaged {place}, {after}: `python -m eggroll.journal repair {path.parent}` says what is lost, and keeps "
        "the rest."
    )


def _correct(path: Path, gap: Gap) -> bytes | None:
    """The record of a gap as it was, if a single bit of it is flipped."""
    if not FRAME.size <= gap.end - gap.start <= MAX_CORRECTED:
        return None
    kind = HEADER if gap.start == 0 else GENERATION
    fixed = correct(b"".join(_read(path, gap.start, gap.end)), magic=MAGIC, kinds=(kind,))
    if fixed is None:
        return None
    try:
        if kind == HEADER:
            Header(**parse_object(fixed[FRAME.size :], path))
        elif decode(fixed[FRAME.size :], path).generation != gap.first or gap.next not in (None, gap.first + 1):
            return None
    except (ValueError, TypeError):
        return None
    return fixed


def mend(path: Path, chosen: Plan, header: Header | None) -> list[str]:
    """Carry out a plan: copy damaged bytes aside, then replace the journal.

    Args:
        path: of the journal.
        chosen: the plan.
        header: written where the stored one and its copy are damaged; None: the file is left without one, for the run to write.

    Returns:
        Sentences that say what was done and lost.
    """
    said = []
    for gap in [*chosen.aside, *([] if chosen.cut is None else [chosen.cut._replace(end=chosen.survey.size)])]:
        copy = unused_name(path.with_name("journal.damaged.bin"))
        replace_file(copy, _read(path, gap.start, gap.end))
        said.append(f"{gap.end - gap.start:,} damaged bytes of {path}, from byte {gap.start}, are in {copy.name}.")
    for gap in chosen.corrected:
        what = "the header" if gap.start == 0 else f"generation {gap.first}"
        said.append(f"one flipped bit of {what} in {path} was flipped back.")
    if chosen.is_header_damaged and chosen.copy is not None:
        said.append(f"the header of {path} was restored from its copy.")
    if chosen.writes:
        replace_file(path, _content(path, chosen, header))
    return [*said, *describe_lost(path, chosen.lost)]


def describe_lost(path: Path, lost: Sequence[range]) -> list[str]:
    """Name the generations that cannot be replayed."""
    names = [f"generation {part.start}" if len(part) == 1 else f"generations {part.start} to {part.stop - 1}" for part in lost]
    return [f"{name} of {path} cannot be replayed any more." for name in names]


def _content(path: Path, chosen: Plan, header: Header | None) -> Iterator[bytes]:
    """The mended journal in pieces."""
    start = 0
    known = chosen.header or header
    if chosen.is_header_damaged and known is not None:
        yield encode_header(known)
    for gap in sorted([*chosen.corrected, *chosen.aside]):
        yield from _read(path, start, gap.start)
        yield chosen.corrected.get(gap, b"")
        start = gap.end
    end = chosen.survey.end if chosen.cut is None else chosen.cut.start
    yield from _read(path, start, max(start, end))


def _read(path: Path, start: int, end: int) -> Iterator[bytes]:
    with open(path, "rb") as file:
        file.seek(start)
        while start < end and (piece := file.read(min(PIECE, end - start))):
            yield piece
            start += len(piece)
