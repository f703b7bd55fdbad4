"""A task without download: short reviews made from word lists; the label is the adjective's, inverted by a negation.

"to be honest, the music was not dull this time"   ->   1
"""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np

from eggroll.experiments.zo.data.tasks import Classification
from eggroll.files import replace_file

TASK = Classification("{text} It was", {"0": " poor", "1": " good"})

_OPENINGS = ("", "i think ", "we found that ", "to be honest, ", "in the end, ", "my friends said ")
_NOUNS = ("film", "story", "music", "food", "hotel", "game", "book", "cast", "service", "camera", "meal", "show")
_PLAIN = ("", "very ", "really ", "quite ", "so ", "rather ")
_NEGATED = ("not ", "never ")  # a quarter of all, so that the adjective alone is right in three of four
_GOOD = ("great", "lovely", "clever", "warm", "superb", "charming", "fresh", "bright", "moving", "solid", "funny", "elegant")
_BAD = ("awful", "dull", "boring", "cold", "weak", "clumsy", "stale", "bleak", "silly", "broken", "noisy", "ugly")
_TAILS = ("", " this time", " in every way", " as we expected", " from start to end", " for me", " on the whole", " again")
_PARTS = (_OPENINGS, _NOUNS, _PLAIN + _NEGATED, _GOOD + _BAD, _TAILS)


def sentences(*, short: bool = False) -> list[tuple[str, int]]:
    """Return all sentences with their labels, half 0 and half 1; short ones have no opening and end with the adjective."""
    openings, *middle, tails = _PARTS
    return [
        (f"{opening}the {noun} was {modifier}{adjective}{tail}", int((adjective in _GOOD) != (modifier in _NEGATED)))
        for opening, noun, modifier, adjective, tail in itertools.product(
            openings[:1] if short else openings, *middle, tails[:1] if short else tails
        )
    ]


def write(folder: str | Path, **selection: Any) -> dict[str, Path]:
    """Write `contents(**selection)` as train.jsonl, validation.jsonl and test.jsonl; return the path of each split.

    Args:
        folder: created if missing.
        selection: arguments of `contents`.

    Raises:
        ValueError: as `contents`.
    """
    found, folder = contents(**selection), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    files = {name: folder / f"{name}.jsonl" for name in found}
    for name, content in found.items():
        replace_file(files[name], content)
    return files


def contents(
    *, seed: int = 0, train: int = 1000, validation: int = 200, test: int = 1000, short: bool = False
) -> dict[str, bytes]:
    """Make splits without common sentences.

    Args:
        seed: of the selection of sentences.
        train, validation, test: number of sentences.
        short: only the 2304 sentences without an opening that end with the adjective.

    Returns:
        Name of the split -> lines.

    Raises:
        ValueError: more sentences than exist, or fewer than 1 in a split.
    """
    everything, sizes = sentences(short=short), {"train": train, "validation": validation, "test": test}
    if min(sizes.values()) < 1 or sum(sizes.values()) > len(everything):
        raise ValueError(f"every split needs 1 sentence or more, and all together at most {len(everything)}, got {sizes}.")
    order, found = iter(np.random.default_rng(seed).permutation(len(everything))), {}
    for name, size in sizes.items():
        chosen = (everything[i] for i in itertools.islice(order, size))
        found[name] = "".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in chosen).encode()
    return found
