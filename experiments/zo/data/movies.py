"""Sentences of movie reviews with the mean of some twenty ratings, from -4 to 4; SST-2 was made of the same sentences.

They are data of VADER (Hutto and Gilbert, ICWSM 2014), MIT licence, in the sources of the package vaderSentiment 0.5.
"""

import tarfile
from typing import Any

from eggroll.llm.fetch import Package, fetch_file

PACKAGE = Package(
    "vaderSentiment==0.5",
    "vaderSentiment-0.5/additional_resources/hutto_ICWSM_2014.tar.gz",
    "d5bb07d87474b3eb8d30b4deccbc23f19d742a6c5718fbacc65485b70b95c5fa",
    sources=True,
)
_FILE = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
CLEAR = 1.0  # least rating, up or down, of a sentence whose label is not in doubt
MOST_WORDS = 12


def read_movies() -> list[dict[str, Any]]:
    """Return the 2,340 different short clear sentences, {"text": ..., "label": 0 or 1}, downloaded once.

    Raises:
        ValueError, RuntimeError: as of `fetch_file`.
    """
    with tarfile.open(fetch_file(PACKAGE)) as archive:
        file: Any = archive.extractfile(_FILE)
        return parse(file.read().decode("utf-8"))


def parse(content: str) -> list[dict[str, Any]]:
    """Return the short clear sentences of lines of number, rating and text, apart by tabs; the first of equal ones."""
    rows = (line.rstrip("\r").split("\t") for line in content.split("\n") if line.strip())
    found = [(float(rating), text.strip()) for _, rating, text in rows]
    short = [(rating, text) for rating, text in found if len(text.split()) <= MOST_WORDS]
    labels = dict[str, int]()
    for rating, text in short:
        if abs(rating) >= CLEAR:
            labels.setdefault(text, int(rating > 0))
    return [{"text": text, "label": label} for text, label in labels.items()]
