"""The journal: an append-only file of a run's scalars, enough to rebuild its parameters.

The command line: `python -m eggroll.journal --help`.
"""

from eggroll.journal.header import Header, JournalError, make_header
from eggroll.journal.records import Entry, Reader, Writer
from eggroll.journal.replay import replay

__all__ = ["Entry", "Header", "JournalError", "Reader", "Writer", "make_header", "replay"]
