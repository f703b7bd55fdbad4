"""The small model of `experiments.zo`: a byte-level Qwen3, briefly trained by backprop on Python's own library.

The text is the longer strings of the standard library's sources, most of them documentation, in the order of the file names. It
comes with the interpreter, so nothing is downloaded, and it contains nothing of a task. Every piece of text ends in ":" and the
first letter of its module's name, which teaches the model to gather the topic of a piece.
"""

import ast
import dataclasses
import inspect
import sysconfig
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from eggroll.experiments.common.options import unless
from eggroll.experiments.common.warm_start import byte_transformer, cached_model, check_settings, fit
from eggroll.llm.decoder import Decoder, apply, token_log_likelihood
from eggroll.llm.models.families import init_params, make_decoder
from eggroll.llm.models.transformer import TransformerConfig
from eggroll.llm.tokenizers import ByteTokenizer

EXCLUDED = ("test", "tests", "idlelib", "site-packages", "dist-packages")  # folders
MIN_CHARACTERS = 60  # of a string


@dataclasses.dataclass(frozen=True)
class WarmStart:
    """The small model and its training."""

    layers: int = 2
    """Blocks."""
    width: int = 32
    """Width, a multiple of 16."""
    steps: int = 800
    """Steps of Adam; 0: random parameters."""
    batch_size: int = 32
    """Pieces of text in a step."""
    length: int = 96
    """Bytes of a piece."""
    learning_rate: float = 4e-3
    """Peak step size, reached after a tenth of the steps; then it falls as a cosine."""

    def check(self) -> None:
        """Raise ValueError for settings out of range."""
        counts = {"layers": self.layers, "batch_size": self.batch_size, "length": self.length}
        check_settings(counts, width=self.width, learning_rate=self.learning_rate)
        if self.steps < 0:
            raise ValueError(f"start.steps must be an integer >= 0, got {self.steps}.")

    @property
    def model(self) -> TransformerConfig:
        """The model's sizes."""
        return byte_transformer(layers=self.layers, width=self.width)


RULE = unless(  # of `experiments.zo`
    lambda config: config.start.steps == 0,
    "with --start.steps 0, which leaves the small model untrained",
    "start.batch_size",
    "start.length",
    "start.learning_rate",
)


class Text(NamedTuple):
    """What the small model learns."""

    content: np.ndarray  # uint8 [n]
    modules: np.ndarray  # uint8 [n], first letter of the module of every byte


def read_library() -> Text:
    """Read the longer strings of the standard library, without its tests."""
    folder = Path(sysconfig.get_path("stdlib"))
    content, modules = [], []
    with warnings.catch_warnings(action="ignore"):  # old escapes in its strings
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).parts
            if not set(parts) & set(EXCLUDED):
                content.append("\n".join([*_read_strings(path), ""]).encode())
                modules.append(parts[0].lstrip("_")[:1].encode() * len(content[-1]))
    return Text(*(np.frombuffer(b"".join(parts), np.uint8) for parts in (content, modules)))


def _read_strings(path: Path) -> list[str]:
    nodes = ast.walk(ast.parse(path.read_bytes()))
    texts = (node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str))
    return [inspect.cleandoc(text) for text in texts if len(text) >= MIN_CHARACTERS and " " in text]


def warm_start(settings: WarmStart, *, cache: Path = Path("runs/zo-start")) -> Path:
    """Return the folder of the small model, in the Hugging Face layout; it is trained once."""
    return cached_model(
        cache,
        settings.model,
        lambda: train(settings, read_library()) if settings.steps else init(settings),
        settings=dataclasses.asdict(settings),
        task="the text of Python's library",
    )


def init(settings: WarmStart) -> Any:
    """Draw the initial parameters of the small model."""
    return init_params(settings.model, key=jax.random.key(0))


def train(settings: WarmStart, text: Text) -> Any:
    """Train the small model.

    Args:
        settings: of model and training, at least one step.
        text: longer than a piece.

    Returns:
        Its parameters.
    """
    decoder = make_decoder(settings.model)
    return fit(
        init(settings),
        lambda params, tokens: _loss(decoder, params, tokens),
        lambda step: _draw_pieces(settings, text, step),
        steps=settings.steps,
        learning_rate=settings.learning_rate,
    )


def _draw_pieces(settings: WarmStart, text: Text, step: int) -> np.ndarray:
    """Draw the pieces of a step, int32 [B, 1 + T + 2]: the start token, T bytes from anywhere, ":" and the module."""
    size = settings.batch_size
    starts = np.random.default_rng([0, step]).integers(text.content.size - settings.length, size=size)
    content = text.content[starts[:, None] + np.arange(settings.length)]
    begin, colon = (np.full((size, 1), token) for token in (ByteTokenizer.prefix[0], ord(":")))
    return np.concatenate([begin, content, colon, text.modules[starts[:, None]]], axis=1).astype(np.int32)


def _loss(decoder: Decoder, params: Any, tokens: Array) -> Array:
    """Mean over the text, plus the mean over the modules."""
    everything = jnp.ones(tokens.shape, bool)
    log_likelihood = token_log_likelihood(apply(decoder, params, tokens, everything), tokens, everything)
    return -log_likelihood[:, 1:-1].mean() - log_likelihood[:, -1].mean()
