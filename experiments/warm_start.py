"""The small model of `experiments.zo`: a byte-level Qwen3 trained briefly, by backprop, on Python's own library.

The text is what the standard library's sources say in words: their longer strings, most of them documentation, found beside
the interpreter, in the order of the files' names. Nothing is downloaded, and nothing of a task is in it. A trained model is
kept in a folder that its settings and the version of Python name.
"""

import ast
import dataclasses
import hashlib
import inspect
import json
import sys
import sysconfig
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from eggroll.processes import is_first, wait_for_all
from eggroll.progress import progress_line
from experiments.common.run import run_folder
from experiments.data.scores import token_log_likelihood
from experiments.data.tokens import ByteTokenizer
from experiments.models import hf, qwen3
from experiments.models.decoder import Decoder, apply
from experiments.models.leaves import init
from experiments.models.shards import CONFIG

HEAD_DIM = 16
TESTS = ("test", "tests", "idlelib", "site-packages", "dist-packages")  # folders that are left out
SHORTEST = 60  # characters of a string that is taken
STEPS_AT_A_TIME = 20


@dataclasses.dataclass(frozen=True)
class WarmStart:
    """The small model and its training."""

    layers: int = 2
    """Blocks."""
    width: int = 32
    """Width, a multiple of 16."""
    steps: int = 600
    """Steps of Adam; 0: the model is drawn and not trained."""
    batch_size: int = 32
    """Texts in a step."""
    length: int = 96
    """Bytes of a text."""
    learning_rate: float = 4e-3
    """Peak step size, reached after a tenth of the steps; then it falls as a cosine."""

    def check(self) -> None:
        """Raise ValueError for settings that make no model."""
        for name in ("layers", "width", "batch_size", "length"):
            if getattr(self, name) < 1:
                raise ValueError(f"start.{name} must be an integer >= 1, got {getattr(self, name)}.")
        if self.width % HEAD_DIM:
            raise ValueError(f"start.width must be a multiple of {HEAD_DIM}, got {self.width}.")
        if self.steps < 0 or not 0 < self.learning_rate < float("inf"):
            raise ValueError(f"start needs steps >= 0 and a learning_rate > 0, got {self.steps} and {self.learning_rate}.")

    @property
    def model(self) -> qwen3.Qwen3Config:
        """The model's sizes."""
        heads = self.width // HEAD_DIM
        sizes: dict[str, Any] = dict(hidden_size=self.width, intermediate_size=3 * self.width, num_hidden_layers=self.layers)
        sizes |= dict(num_attention_heads=heads, num_key_value_heads=heads, head_dim=HEAD_DIM)
        return qwen3.Qwen3Config(vocab_size=ByteTokenizer.vocab_size, tie_word_embeddings=True, **sizes)


def library_text() -> np.ndarray:
    """Bytes of the standard library's longer strings, uint8, without its tests."""
    folder = Path(sysconfig.get_path("stdlib"))
    files = (path for path in sorted(folder.rglob("*.py")) if not set(path.relative_to(folder).parts) & set(TESTS))
    with warnings.catch_warnings(action="ignore"):  # of old escapes in its strings
        return np.frombuffer("\n".join(text for path in files for text in _strings(path)).encode(), np.uint8)


def _strings(path: Path) -> list[str]:
    nodes = ast.walk(ast.parse(path.read_bytes()))
    texts = (node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str))
    return [inspect.cleandoc(text) for text in texts if len(text) >= SHORTEST and " " in text]


def warm_start(settings: WarmStart, *, cache: Path = Path("runs/zo-start")) -> Path:
    """Return the folder of the small model, in the Hugging Face layout; it is trained where it is not there yet."""
    known = json.dumps(dataclasses.asdict(settings)) + sys.version
    folder = run_folder(cache / hashlib.sha256(known.encode()).hexdigest()[:16])
    if is_first() and not (folder / CONFIG).is_file():  # it is written last
        print(f"a small model is made of what Python's library says; it stays in {folder}", flush=True)
        hf.save(folder, settings.model, trained(settings, library_text()) if settings.steps else drawn(settings))
    wait_for_all("warm start")
    return folder


def drawn(settings: WarmStart) -> Any:
    """The first parameters of the small model."""
    return init(qwen3.leaves(settings.model), jax.random.key(0))


def trained(settings: WarmStart, text: np.ndarray) -> Any:
    """Train the small model.

    Args:
        settings: of model and training, at least one step.
        text: uint8 [n].

    Returns:
        Its parameters.
    """
    decoder, params = qwen3.decoder(settings.model), drawn(settings)
    peak, steps = settings.learning_rate, settings.steps
    optimizer = optax.adam(optax.warmup_cosine_decay_schedule(0.0, peak, -(-steps // 10), steps))

    def advance(run: Any, tokens: Array) -> Any:
        params, state = run
        loss, gradient = jax.value_and_grad(lambda params: _loss(decoder, params, tokens))(params)
        updates, state = optimizer.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), loss

    run, several = (params, optimizer.init(params)), jax.jit(lambda run, tokens: jax.lax.scan(advance, run, tokens))
    with progress_line("steps of the warm start", steps) as show:
        for first in range(0, steps, STEPS_AT_A_TIME):
            numbers = range(first, min(first + STEPS_AT_A_TIME, steps))
            run, losses = several(run, np.stack([_texts(settings, text, step) for step in numbers]))
            show(numbers.stop, f"{float(losses[-1]) / np.log(2):.3f} bits a byte")
    return run[0]


def _texts(settings: WarmStart, text: np.ndarray, step: int) -> np.ndarray:
    """The texts of a step, int32 [B, 1 + T]: pieces of the library that start anywhere, after the token that starts a text."""
    starts = np.random.default_rng([0, step]).integers(text.size - settings.length, size=settings.batch_size)
    pieces = text[starts[:, None] + np.arange(settings.length)].astype(np.int32)
    return np.concatenate([np.full((len(pieces), 1), ByteTokenizer.prefix[0], np.int32), pieces], axis=1)


def _loss(decoder: Decoder, params: Any, tokens: Array) -> Array:
    everything = jnp.ones(tokens.shape, bool)
    return -token_log_likelihood(apply(decoder, params, tokens, everything), tokens, everything)[:, 1:].mean()
