"""SHA256SUMS of a checkpoint folder: the format of `sha256sum`, so that `sha256sum -c SHA256SUMS` checks it too.

`hf.save` writes it; what loads a file of the folder compares it with its line first. Folders without the file, and files
without a line, load as they are.
"""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path

from eggroll.files import PIECE, Damaged

NAME = "SHA256SUMS"
_LINE = re.compile(r"([0-9a-f]{64}) [ *]([^/\\]+)")


def write_sums(digests: Mapping[str, str]) -> bytes:
    """Return the content of the file, from hexadecimal digests by file name."""
    return "".join(f"{digests[name]}  {name}\n" for name in sorted(digests)).encode()


def read_sums(folder: Path) -> dict[str, str]:
    """Read the digests by file name; none where there is no such file.

    Raises:
        Damaged: a line is not of the format.
    """
    try:
        lines = (folder / NAME).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return {}
    except UnicodeDecodeError:
        lines = ["not text"]
    found = [_LINE.fullmatch(line) for line in lines if line]
    if None in found:
        raise Damaged(f"{folder / NAME} is damaged: line {1 + found.index(None)} is not a checksum. Remove it to load anyway.")
    return {match[2]: match[1] for match in found if match is not None}


def digest_file(path: Path) -> str:
    """The SHA-256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while piece := file.read(PIECE):
            digest.update(piece)
    return digest.hexdigest()


def verify(path: Path) -> None:
    """Compare a file with its line in the SHA256SUMS of its folder, if there is one.

    Raises:
        Damaged: they differ; the message names the file.
    """
    expected = read_sums(path.parent).get(path.name)
    if expected is not None and path.is_file() and digest_file(path) != expected:
        raise Damaged(f"{path} is damaged: it differs from its line in {NAME}. If it was edited on purpose, remove that line.")


def find_differing(folder: Path) -> list[str]:
    """Return the files that differ from their lines, or are missing."""
    sums = read_sums(folder)
    return [name for name in sums if not (folder / name).is_file() or digest_file(folder / name) != sums[name]]
