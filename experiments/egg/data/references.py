"""Bits per byte that simple models and compressors need for a text: references for a language model.

unigram   entropy of the text's own byte frequencies: what knowing them, and no context, gives at best
bigram    a byte given the one before, counted on the training text, scored on the text
gzip, xz  the compressed size of the text, nothing learned from the training text
"""

import gzip
import lzma
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

_PIECE = 1 << 20  # bytes counted at a time


class Reference(NamedTuple):
    """Bits per byte, and their cost."""

    name: str
    bits_per_byte: float
    seconds: float  # measured, training included
    cost: str


def references(train: np.ndarray, validation: np.ndarray) -> list[Reference]:
    """Return all references for the text `validation`, uint8 [bytes]; only the bigram reads `train`.

    Raises:
        ValueError: an empty text.
    """
    if not len(train) or not len(validation):
        raise ValueError(f"expected two texts with bytes, got {len(train)} and {len(validation)}.")
    size = len(validation)
    return [
        _timed("unigram", lambda: unigram(validation), "256 counts of the text itself"),
        _timed("bigram", lambda: bigram(train, validation), "65,536 counts of the training text"),
        _timed("gzip", lambda: 8 * len(gzip.compress(validation.tobytes(), 9)) / size, "looks 32 KiB back, level 9"),
        _timed("xz", lambda: 8 * len(lzma.compress(validation.tobytes(), preset=6)) / size, "looks 8 MiB back, preset 6"),
    ]


def unigram(text: np.ndarray) -> float:
    """Entropy of the byte frequencies of `text`."""
    counts = sum((np.bincount(piece, minlength=256) for piece in _pieces(text, 0)), np.zeros(256, np.int64))
    p = counts[counts > 0] / len(text)
    return float(-(p * np.log2(p)).sum())


def bigram(train: np.ndarray, text: np.ndarray) -> float:
    """Cross-entropy of `text` under p(b | a) = (n_ab + p(b)) / (n_a + 1), p(b) = (n_b + 1) / (n + 256), counts of `train`.

    The first byte counts with p(b).
    """
    pairs = _pairs(train)
    followed, singles = pairs.sum(1, keepdims=True), np.bincount(train[:1], minlength=256) + pairs.sum(0)
    p = (singles + 1) / (len(train) + 256)
    bits = -np.log2((pairs + p) / (followed + 1))
    return float(((_pairs(text) * bits).sum() - np.log2(p[text[0]])) / len(text))


def _pairs(text: np.ndarray) -> np.ndarray:
    """How often byte b follows byte a, int64 [a, b]."""
    counts = np.zeros(65536, np.int64)
    for piece in _pieces(text, 1):
        counts += np.bincount(piece[:-1].astype(np.int64) * 256 + piece[1:], minlength=65536)
    return counts.reshape(256, 256)


def _pieces(text: np.ndarray, overlap: int) -> Iterator[np.ndarray]:
    for start in range(0, len(text) - overlap, _PIECE):
        yield np.asarray(text[start : start + _PIECE + overlap])


def _timed(name: str, measure: Callable[[], float], cost: str) -> Reference:
    start = time.perf_counter()
    bits = measure()
    return Reference(name, bits, time.perf_counter() - start, cost)
