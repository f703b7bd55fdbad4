"""Files that are read back: written whole or not at all, and flushed with their folder, so that a loss of power keeps them.

    replace_file(path, pieces)     written next to the older file, flushed, renamed over it
    write_object, read_object      JSON objects with a checksum of their own, in the field `file_sha256`
    user_cache, locked             the folder of what is made once for a user, and one maker at a time

A checksum finds damage, not intent: it does not authenticate.
"""

import contextlib
import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

CHECKSUM = "file_sha256"
PIECE = 1 << 20


class Damaged(ValueError):
    """A file does not have the content that was written."""


def sync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to disk; a no-op for folders where they cannot be opened (Windows)."""
    with contextlib.suppress(PermissionError):
        opened = os.open(path, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)


def replace_file(path: Path, pieces: bytes | Iterable[bytes], *, partial: Path | None = None) -> None:
    """Write a file that has its name once all of its bytes are on disk.

    Args:
        path: may exist.
        pieces: the content.
        partial: the name until then; None: that of the file with the suffix .partial.

    Raises:
        OSError: it cannot be written; the older file is unchanged, and nothing is left of the new one.
    """
    partial = partial or path.with_suffix(".partial")
    try:
        with naming(path), open(partial, "wb") as file:
            file.writelines([pieces] if isinstance(pieces, bytes) else pieces)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync(path.parent)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Add the name of a file to an OSError that has none, such as that of a full disk."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def user_cache() -> Path:
    """Return the folder of this project in the user's cache; it may not exist."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "eggroll"


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Wait while another process holds the lock of an existing folder, then hold it."""
    import fcntl  # not on Windows

    with open(folder / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def unused_name(path: Path) -> Path:
    """Return the first path that does not exist among `path` with -1, -2, ... before its suffix."""
    names = (path.with_name(f"{path.stem}-{number}{path.suffix}") for number in itertools.count(1))
    return next(name for name in names if not name.exists())


def parse_object(content: bytes, place: str | Path) -> dict[str, Any]:
    """Parse a JSON object.

    Raises:
        Damaged: it is anything else, or nested too deeply; the message begins with `place`.
    """
    try:
        value = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:  # no JSON, or no UTF-8
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise Damaged(f"{place} is not valid JSON: {reason}.") from None
    if not isinstance(value, dict):
        raise Damaged(f"{place} must contain a JSON object, got a {type(value).__name__}.")
    return value


def digest_of(fields: Mapping[str, Any]) -> str:
    """The SHA-256 of JSON values, whatever their order and layout in a file."""
    return hashlib.sha256(json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def write_object(path: Path, fields: Mapping[str, Any], *, partial: Path | None = None) -> None:
    """Write JSON values with their checksum, as `replace_file` does."""
    stored = json.loads(json.dumps(fields))
    replace_file(path, (json.dumps(stored | {CHECKSUM: digest_of(stored)}, indent=1) + "\n").encode(), partial=partial)


def read_object(path: Path) -> dict[str, Any]:
    """Read what `write_object` wrote, without the checksum; files of earlier versions have none.

    Raises:
        FileNotFoundError: there is no such file.
        Damaged: its content differs from what was written.
    """
    fields = parse_object(path.read_bytes(), path)
    written = fields.pop(CHECKSUM, None)
    if written is not None and written != digest_of(fields):
        raise Damaged(f"{path} is damaged: its content differs from its {CHECKSUM}.")
    return fields
