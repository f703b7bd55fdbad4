"""Warm starts: small models that read bytes, trained once by backprop and kept for every run that begins with them.

Owns the cache (`cached_model`), the training (`fit`: Adam, whose step size rises, then falls as a cosine) and the sizes of the
small transformer. The settings, the text and the loss belong to the front ends.
"""

import hashlib
import inspect
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from jax import Array

from eggroll.devices.processes import first_does
from eggroll.experiments.common.run import run_folder
from eggroll.files import locked
from eggroll.llm import decoder, hf, models, tokenizers
from eggroll.llm.models.transformer import TransformerConfig
from eggroll.llm.shards import CONFIG
from eggroll.llm.sums import find_differing
from eggroll.llm.tokenizers import ByteTokenizer
from eggroll.runs.progress import progress_line

HEAD_DIM = 16
STEPS_PER_CALL = 20


def byte_transformer(*, layers: int, width: int) -> TransformerConfig:
    """Return the sizes of a small Qwen3 that reads bytes; `width` is a multiple of HEAD_DIM."""
    return TransformerConfig(
        vocab_size=ByteTokenizer.vocab_size,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // HEAD_DIM,
        num_key_value_heads=width // HEAD_DIM,
        head_dim=HEAD_DIM,
        tie_word_embeddings=True,
    )


def check_settings(counts: Mapping[str, int], *, width: int, learning_rate: float) -> None:
    """Raise ValueError for settings of a warm start that are out of range; the named `counts` must be integers >= 1."""
    for name, value in {**counts, "width": width}.items():
        if value < 1:
            raise ValueError(f"start.{name} must be an integer >= 1, got {value}.")
    if width % HEAD_DIM:
        raise ValueError(f"start.width must be a multiple of {HEAD_DIM}, got {width}.")
    if not 0 < learning_rate < float("inf"):
        raise ValueError(f"start.learning_rate must be a finite number > 0, got {learning_rate}.")


def cached_model(cache: Path, config: hf.Config, train: Callable[[], Any], *, settings: Any, task: str) -> Path:
    """Return the folder of a trained model, in the Hugging Face layout; train it if there is none yet, or a damaged one.

    Args:
        cache: holds a folder for every model.
        config: of the model.
        train: returns the parameters; called in the first process only.
        settings: JSON values that decide the parameters; they, the code of training and models, jax and Python name the folder.
        task: what the model learns, for the message.
    """
    known = json.dumps([settings, _digest_of_code(train), jax.__version__, sys.version])
    folder = run_folder(cache / hashlib.sha256(known.encode()).hexdigest()[:16])

    def make() -> None:
        with locked(folder):
            if not _is_sound(folder):
                print(f"warm start: training a small model on {task}; it is kept in {folder}", flush=True)
                hf.save(folder, config, train())

    first_does(make)
    return folder


def _digest_of_code(train: Callable[[], Any]) -> str:
    """SHA-256 of the files that decide the parameters: of `train`, of this module, of the models and their tokenizers."""
    files = [inspect.getfile(train), __file__, decoder.__file__, tokenizers.__file__]
    files += sorted(map(str, Path(models.__path__[0]).glob("*.py")))
    return hashlib.sha256(b"".join(Path(file).read_bytes() for file in files)).hexdigest()


def _is_sound(folder: Path) -> bool:
    """Whether the folder has a trained model, whose files are those that were written."""
    if not (folder / CONFIG).is_file():  # it is written last
        return False
    try:
        differing = find_differing(folder)
    except ValueError as error:
        differing = [str(error)]
    if differing:
        print(f"warm start: the model in {folder} is damaged ({', '.join(differing)})", flush=True)
    return not differing


def fit(
    params: Any, loss: Callable[[Any, Any], Array], batches: Callable[[int], Any], *, steps: int, learning_rate: float
) -> Any:
    """Minimise a loss by Adam, with a progress line.

    Args:
        params: initial parameters.
        loss: (params, batch) -> scalar.
        batches: step -> a pytree of NumPy arrays, of the same shapes at every step.
        steps: at least one.
        learning_rate: peak step size, reached after a tenth of the steps.

    Returns:
        The parameters.
    """
    warmup = -(-steps // 10)
    optimizer = optax.adam(optax.warmup_cosine_decay_schedule(0.0, learning_rate, warmup, max(steps, warmup + 1)))

    def advance(run: Any, batch: Any) -> Any:
        params, opt_state = run
        value, gradient = jax.value_and_grad(loss)(params, batch)
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), value

    run, advance_all = (params, optimizer.init(params)), jax.jit(lambda run, stacked: jax.lax.scan(advance, run, stacked))
    with progress_line("steps of the warm start", steps) as show:
        for first in range(0, steps, STEPS_PER_CALL):
            numbers = range(first, min(first + STEPS_PER_CALL, steps))
            run, losses = advance_all(run, jax.tree.map(lambda *leaves: np.stack(leaves), *map(batches, numbers)))
            show(numbers.stop, f"loss {float(losses[-1]):.3f}")
    return run[0]
