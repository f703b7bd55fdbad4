"""Checkpoints as the options of experiments name them."""

import functools
from pathlib import Path

from eggroll.llm.fetch import MODELS, fetch


@functools.cache
def model_folder(model: Path | None) -> Path | None:
    """Return the folder of a checkpoint, which is fetched if `model` names one of `fetch.MODELS` and no folder."""
    return fetch(str(model)) if model is not None and str(model) in MODELS and not model.exists() else model
