"""The small model of `experiments.zo`: a byte-level Qwen3 trained briefly, by backprop, on Python's own library.

The text is what the standard library's sources say in words: their longer strings, most of them documentation, found beside
the interpreter, in the order of the files' names. A piece of it ends in ":" and the first letter of its module's name, which
makes the model gather what a piece is about. Nothing is downloaded, and nothing of a task is in it. A trained model is kept
in a folder that its settings and the version of Python name.
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
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from eggroll.devices.processes import is_first, wait_for_all
from eggroll.experiments.common.fitting import fit
from eggroll.experiments.common.run import run_folder
from eggroll.llm import hf
from eggroll.llm.decoder import Decoder, apply, token_log_likelihood
from eggroll.llm.models import transformer
from eggroll.llm.models.leaves import init
from eggroll.llm.shards import CONFIG
from eggroll.llm.tokenizers import ByteTokenizer

HEAD_DIM = 16
TESTS = ("test", "tests", "idlelib", "site-packages", "dist-packages")  # folders that are left out
SHORTEST = 60  # characters of a string that is taken


@dataclasses.dataclass(frozen=True)
class WarmStart:
    """The small model and its training."""

    layers: int = 2
    """Blocks."""
    width: int = 32
    """Width, a multiple of 16."""
    steps: int = 800
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
    def model(self) -> transformer.TransformerConfig:
        """The model's sizes."""
        heads = self.width // HEAD_DIM
        sizes: dict[str, Any] = dict(hidden_size=self.width, intermediate_size=3 * self.width, num_hidden_layers=self.layers)
        sizes |= dict(num_attention_heads=heads, num_key_value_heads=heads, head_dim=HEAD_DIM)
        return transformer.TransformerConfig(vocab_size=ByteTokenizer.vocab_size, tie_word_embeddings=True, **sizes)


class Text(NamedTuple):
    """What a small model learns from."""

    content: np.ndarray  # uint8 [n]
    modules: np.ndarray  # uint8 [n], first letter of the module that a byte is from


def library_text() -> Text:
    """The standard library's longer strings, without its tests."""
    folder = Path(sysconfig.get_path("stdlib"))
    content, modules = [], []
    with warnings.catch_warnings(action="ignore"):  # of old escapes in its strings
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).parts
            if not set(parts) & set(TESTS):
                content.append("\n".join([*_strings(path), ""]).encode())
                modules.append(parts[0].lstrip("_")[:1].encode() * len(content[-1]))
    return Text(*(np.frombuffer(b"".join(parts), np.uint8) for parts in (content, modules)))


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
    return init(transformer.leaves(settings.model), jax.random.key(0))


def trained(settings: WarmStart, text: Text) -> Any:
    """Train the small model.

    Args:
        settings: of model and training, at least one step.
        text: longer than a piece.

    Returns:
        Its parameters.
    """
    decoder = transformer.make_decoder(settings.model)
    return fit(
        drawn(settings),
        lambda params, tokens: _loss(decoder, params, tokens),
        lambda step: _pieces(settings, text, step),
        steps=settings.steps,
        learning_rate=settings.learning_rate,
    )


def _pieces(settings: WarmStart, text: Text, step: int) -> np.ndarray:
    """The pieces of a step, int32 [B, 1 + T + 2]: the token that starts a text, T bytes from anywhere, ":" and the module."""
    size = settings.batch_size
    starts = np.random.default_rng([0, step]).integers(text.content.size - settings.length, size=size)
    content = text.content[starts[:, None] + np.arange(settings.length)]
    begin, colon = (np.full((size, 1), token) for token in (ByteTokenizer.prefix[0], ord(":")))
    return np.concatenate([begin, content, colon, text.modules[starts[:, None]]], axis=1).astype(np.int32)


def _loss(decoder: Decoder, params: Any, tokens: Array) -> Array:
    """Of the text, and as much of the module."""
    everything = jnp.ones(tokens.shape, bool)
    known = token_log_likelihood(apply(decoder, params, tokens, everything), tokens, everything)
    return -known[:, 1:-1].mean() - known[:, -1].mean()
