"""A corpus of bytes: documents from text files, split into training and validation, in one file that is memory mapped.

    train, then validation; each is 0 document 0 document 0 document ...

The byte 0 begins a document. Documents are files, in the order of their paths; a file that several paths lead to is one. The
hash of a path below its folder decides the split, so that it is the same on every machine. The file is written once into a
cache, whole or not at all, under a name that changes with any document's path, size or time; a manifest next to it lists its
documents and has the hash of its bytes, which is compared when a process opens it first. A damaged cache is written anew.
`streams` reads it at positions that are functions of the generation alone.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from eggroll.files import PIECE, Damaged, read_object, replace_file, write_object

SEPARATOR = 0
_FORMAT = 1
_verified: set[tuple[Path, tuple[int, int]]] = set()  # files of this process whose bytes were compared, with size and time
_NOT_SOURCES = {"test", "tests", "idle_test", "site-packages", "dist-packages"}


class Document(NamedTuple):
    """A file: its name within the corpus, and its size and time when it was found."""

    name: str
    path: Path
    size: int
    mtime: int  # ns


@dataclasses.dataclass(frozen=True)
class Corpus:
    """An open corpus."""

    train: np.ndarray  # uint8 [bytes], memory mapped
    validation: np.ndarray  # uint8 [bytes], memory mapped
    documents: tuple[int, int]  # of both
    fingerprint: str  # SHA-256 of the bytes; part of the configuration of a run
    path: Path
    opened: tuple[int, int]  # size and time of the file

    def check(self) -> None:
        """Raise ValueError if the file vanished or changed since it was opened: reading on could end the process."""
        if _seen(self.path) != self.opened:
            raise ValueError(
                f"the corpus file {self.path} vanished or changed while it was read; start again to write it anew."
            )


def load(paths: Sequence[str | Path] = (), *, cache: str | Path, validation_fraction: float = 0.05) -> Corpus:
    """Open the corpus of some files, writing it first if it is not in the cache.

    Args:
        paths: text files, and folders, of which all files are read but hidden ones and `__pycache__`; any bytes will do.
            Without paths, the sources of Python's standard library on this machine, tests left out.
        cache: folder for the corpus files, made if missing.
        validation_fraction: about this part of the documents; at least one, and not all.

    Returns:
        The corpus.

    Raises:
        FileNotFoundError: a path that does not exist.
        ValueError: fewer than two documents with text, a file that vanishes or changes while it is read, a fraction outside
            (0, 1).
    """
    if not 0 < validation_fraction < 1:
        raise ValueError(f"validation_fraction must be between 0 and 1, got {validation_fraction}.")
    documents = find(paths)
    if len(documents) < 2:
        where = ", ".join(map(str, paths)) or "the standard library"
        raise ValueError(f"the corpus is too small: {len(documents)} files with text in {where}, expected at least 2.")
    split = _split(documents, validation_fraction)
    listing = [_FORMAT, [[*map(str, document), held] for document, held in zip(documents, split, strict=True)]]
    digest = hashlib.sha256(json.dumps(listing).encode()).hexdigest()[:16]
    path = Path(cache) / f"corpus-{digest}.bin"
    try:
        return _open(path)
    except FileNotFoundError:
        pass
    except Damaged as error:
        print(f"{error} It is written anew.", flush=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    _write(path, documents, split)
    return _open(path)


def find(paths: Sequence[str | Path] = ()) -> list[Document]:
    """Return the documents with text of `paths` as `load` takes them, in their order; the first name of a file counts."""
    documents = []
    for root in map(Path, paths):
        if not root.exists():
            raise FileNotFoundError(f"the path {root} of the corpus does not exist.")
        files = _files(root, set(), "") if root.is_dir() else [root]
        documents += [_document(file, file.relative_to(root).as_posix() if root.is_dir() else file.name) for file in files]
    if not paths:
        root = Path(os.__file__).parent
        documents = [_document(file, file.relative_to(root).as_posix()) for file in _files(root, _NOT_SOURCES, ".py")]
    found: dict[Path, Document] = {}
    for document in documents:
        found.setdefault(document.path, document)
    return [document for document in found.values() if document.size > 0]


def _files(root: Path, skipped: set[str], suffix: str) -> list[Path]:
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in {*skipped, "__pycache__"} and not name.startswith(".")]
        found += [Path(folder, name) for name in names if name.endswith(suffix) and not name.startswith(".")]
    return sorted((path for path in found if path.is_file()), key=lambda path: path.relative_to(root).as_posix())


def _document(path: Path, name: str) -> Document:
    seen = _seen(path)
    if seen is None:
        raise ValueError(f"the file {path} vanished while the corpus was read.")
    return Document(name, path.resolve(), *seen)


def _seen(path: Path) -> tuple[int, int] | None:
    """Size and time of a file, None if there is none."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_size, status.st_mtime_ns


def _split(documents: Sequence[Document], fraction: float) -> list[bool]:
    """Whether each document is held out: by the hash of its name, but neither all nor none."""
    places = [int.from_bytes(hashlib.sha256(os.fsencode(document.name)).digest()[:8], "big") for document in documents]
    held = [place < fraction * 2**64 for place in places]
    if len(set(held)) == 1:
        held[places.index(max(places) if held[0] else min(places))] = not held[0]
    return held


def _write(path: Path, documents: Sequence[Document], split: Sequence[bool]) -> None:
    """Write the corpus and, last, its manifest; several processes may do so at once."""
    digest, sizes = hashlib.sha256(), [0, 0]

    def texts() -> Iterator[bytes]:
        for part in (False, True):
            for document in (document for document, held in zip(documents, split, strict=True) if held is part):
                text = bytes([SEPARATOR]) + _read(document)
                digest.update(text)
                sizes[part] += len(text)
                yield text

    replace_file(path, texts(), partial=_partial(path))
    manifest = {
        "train_bytes": sizes[0],
        "validation_bytes": sizes[1],
        "train_documents": split.count(False),
        "validation_documents": split.count(True),
        "sha256": digest.hexdigest(),
        "documents": [
            {"name": d.name, "path": str(d.path), "size": d.size, "mtime_ns": d.mtime, "validation": held}
            for d, held in zip(documents, split, strict=True)
        ],
    }
    write_object(path.with_suffix(".json"), manifest, partial=_partial(path.with_suffix(".json")))


def _partial(path: Path) -> Path:
    """The name of a file until it is whole, of this process alone."""
    return path.with_name(f".{path.name}-{os.getpid()}")


def _read(document: Document) -> bytes:
    try:
        text = document.path.read_bytes()
    except FileNotFoundError:
        raise ValueError(f"the file {document.path} vanished while the corpus was read.") from None
    if _seen(document.path) != (document.size, document.mtime) or len(text) != document.size:
        raise ValueError(f"the file {document.path} changed while the corpus was read; start again.")
    return text


def _open(path: Path) -> Corpus:
    """Open a written corpus; FileNotFoundError if there is none, Damaged if a byte of it differs."""
    manifest = read_object(path.with_suffix(".json"))
    try:
        train, validation = manifest["train_bytes"], manifest["validation_bytes"]
        documents, sha256 = (manifest["train_documents"], manifest["validation_documents"]), manifest["sha256"]
    except KeyError as error:
        raise Damaged(f"{path.with_suffix('.json')} is damaged: it has no {error}.") from None
    seen = _seen(path)
    if seen is None or seen[0] != train + validation:
        state = "is missing" if seen is None else f"has {seen[0]} bytes, expected {train + validation}"
        raise Damaged(f"the corpus file {path} {state}.")
    mapped = np.memmap(path, np.uint8, mode="r")
    if (path, seen) not in _verified:
        if _digest(mapped) != sha256:
            raise Damaged(f"the corpus file {path} is damaged: its bytes differ from those written.")
        _verified.add((path, seen))
    return Corpus(mapped[:train], mapped[train:], documents, sha256, path, seen)


def _digest(content: np.ndarray) -> str:
    digest = hashlib.sha256()
    for start in range(0, len(content), PIECE):
        digest.update(content[start : start + PIECE].data)
    return digest.hexdigest()


def streams(
    corpus: Corpus, generation: int, *, groups: int, length: int, part: Literal["train", "validation"] = "train"
) -> np.ndarray:
    """Return the next piece of every group's stream, a pure function of the arguments.

    The streams begin at evenly spaced places and go on, generation after generation, round the end of the text.

    Args:
        corpus: as `load` returns it.
        generation: from 0.
        groups: G streams.
        length: T bytes a generation.
        part: which text.

    Returns:
        uint8 [G, T + 1]; the last byte is the next piece's first.

    Raises:
        ValueError: an argument below its least value, more groups than bytes, or `Corpus.check`.
    """
    text = {"train": corpus.train, "validation": corpus.validation}[part]
    if generation < 0 or length < 1:
        raise ValueError(f"expected generation >= 0 and length >= 1, got {generation} and {length}.")
    if not 1 <= groups <= len(text):
        raise ValueError(f"groups must be between 1 and the bytes of the text, {len(text)}, got {groups}.")
    corpus.check()
    starts = np.arange(groups) * (len(text) // groups) + (generation * length) % len(text)
    return np.asarray(text[(starts[:, None] + np.arange(length + 1)) % len(text)])
