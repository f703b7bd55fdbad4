"""The text that the options of `experiments.egg` name, and the references it is compared with."""

from typing import NamedTuple

from eggroll.experiments.egg.config import Config
from eggroll.experiments.egg.data import corpus
from eggroll.experiments.egg.data.references import Reference, references


class Inputs(NamedTuple):
    """A text, split for training and validation."""

    corpus: corpus.Corpus
    references: list[Reference]


def load(config: Config) -> Inputs:
    """Read the text; print its size and the references.

    Raises:
        ValueError, OSError: a file is missing, or the text is too short.
    """
    texts = corpus.load(config.data, cache=config.cache)
    known = references(texts.train, texts.validation)
    sizes = f"{len(texts.train):,} bytes of text to train on, {len(texts.validation):,} held out"
    print(f"{sizes}, bits per byte: " + ", ".join(f"{row.name} {row.bits_per_byte:.3f}" for row in known), flush=True)
    return Inputs(texts, known)
