"""The small model of a reasoning run: byte-level, trained briefly, by backprop, on the worked examples of the task.

    loss = -mean log p(byte of the worked text | the prompt in its template, the bytes before)

The mean is over all bytes of the worked texts of a batch; prompts are given. A trained model is kept in a folder that its
settings, the examples and the versions name.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jax import Array

from eggroll.devices.processes import is_first, wait_for_all
from eggroll.envs.tasks import Row, Task
from eggroll.experiments.common.fitting import fit
from eggroll.experiments.common.run import run_folder
from eggroll.llm import hf
from eggroll.llm.decoder import apply, token_log_likelihood
from eggroll.llm.decoding import pad_prompts
from eggroll.llm.models.families import family_of
from eggroll.llm.models.leaves import init
from eggroll.llm.models.rwkv7 import RWKV7Config
from eggroll.llm.models.transformer import TransformerConfig
from eggroll.llm.shards import CONFIG
from eggroll.llm.tokenizers import ByteTokenizer

HEAD_DIM = 16
LOW_RANK = 16  # inner sizes of RWKV-7's small maps


@dataclasses.dataclass(frozen=True)
class Start:
    """The small model and its training."""

    architecture: Literal["transformer", "rwkv7"] = "transformer"
    """A small Qwen3, or RWKV-7."""
    layers: int = 2
    """Blocks."""
    width: int = 64
    """Width, a multiple of 16."""
    steps: int = 600
    """Steps of Adam."""
    batch_size: int = 64
    """Worked examples in a step."""
    learning_rate: float = 5e-3
    """Peak step size, reached after a tenth of the steps; then it falls as a cosine."""
    noise: float = 0.3
    """Share of the worked examples that are wrong, for whoever makes a task that takes it."""

    def check(self) -> None:
        """Raise ValueError for settings that make no model."""
        if self.architecture not in ("transformer", "rwkv7"):
            raise ValueError(f"start.architecture must be transformer or rwkv7, got {self.architecture!r}.")
        for name in ("layers", "width", "steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"start.{name} must be an integer >= 1, got {getattr(self, name)}.")
        if self.width % HEAD_DIM:
            raise ValueError(f"start.width must be a multiple of {HEAD_DIM}, got {self.width}.")
        if not 0 < self.learning_rate < float("inf"):
            raise ValueError(f"start.learning_rate must be a finite number > 0, got {self.learning_rate}.")
        if not 0 <= self.noise <= 1:
            raise ValueError(f"start.noise must be between 0 and 1, got {self.noise}.")

    @property
    def model(self) -> TransformerConfig | RWKV7Config:
        """The model's sizes."""
        sizes: dict[str, Any] = dict(vocab_size=ByteTokenizer.vocab_size, hidden_size=self.width, head_dim=HEAD_DIM)
        sizes |= dict(intermediate_size=3 * self.width, num_hidden_layers=self.layers)
        if self.architecture == "rwkv7":
            sizes |= {f"{name}_low_rank_dim": LOW_RANK for name in ("decay", "a", "v", "gate")}
            return RWKV7Config(**sizes)
        heads = self.width // HEAD_DIM
        return TransformerConfig(**sizes, num_attention_heads=heads, num_key_value_heads=heads, tie_word_embeddings=True)


class Worked(NamedTuple):
    """B prompts, each with a worked text behind it, padded on the left."""

    tokens: Any  # int32 [B, T]
    mask: Any  # bool [B, T], False on padding
    targets: Any  # bool [B, T], True on the worked text


def warm_start(settings: Start, task: Task, *, template: str, cache: Path = Path("runs/reason-start")) -> Path:
    """Return the folder of the small model, in the Hugging Face layout; it is trained where it is not there yet.

    Args:
        settings: of model and training.
        task: its train split has the column `worked`.
        template: what the model reads, with "{prompt}" where the task's prompt goes.
        cache: where the folders of trained models are.

    Raises:
        ValueError: settings that make no model, or a task without worked examples.
    """
    settings.check()
    texts = _texts(task, template)
    known = json.dumps([dataclasses.asdict(settings), HEAD_DIM, LOW_RANK, texts, jax.__version__, sys.version])
    folder = run_folder(cache / hashlib.sha256(known.encode()).hexdigest()[:16])
    if is_first():
        with _alone(folder):
            if not (folder / CONFIG).is_file():  # it is written last
                print(f"a small model learns the worked examples of {task.name}; it stays in {folder}", flush=True)
                hf.save(folder, settings.model, trained(settings, worked_examples(texts)))
    wait_for_all("warm start")
    return folder


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Wait while another run that starts from the same model makes it."""
    with open(folder / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _texts(task: Task, template: str) -> list[tuple[str, str]]:
    """What the model reads, and what it learns to say."""
    rows: Sequence[Row] = task.split("train")
    for row in rows:
        if "worked" not in row.columns:
            raise ValueError(
                f"a task must have the column 'worked' for a warm start, '{task.name}' has {sorted(row.columns)}; give --model."
            )
    return [(template.replace("{prompt}", row.prompt), row.columns["worked"]) for row in rows]


def worked_examples(texts: Sequence[tuple[str, str]]) -> Worked:
    """Lay texts side by side, from pairs of what is read and what is learned."""
    tokenizer = ByteTokenizer()
    pairs = [([*tokenizer.prefix, *tokenizer.encode(given)], tokenizer.encode(worked)) for given, worked in texts]
    length = max(len(given) + len(worked) for given, worked in pairs)
    prompts = pad_prompts([given + worked for given, worked in pairs], length=length)
    sizes = np.array([[len(worked)] for _, worked in pairs])
    return Worked(*prompts, np.arange(length) >= length - sizes)


def trained(settings: Start, examples: Worked) -> Any:
    """Train the small model.

    Args:
        settings: of model and training.
        examples: that batches are drawn from.

    Returns:
        Its parameters.
    """
    config, number = settings.model, len(examples.tokens)
    decoder = hf.make_decoder(config)

    def loss(params: Any, batch: Worked) -> Array:
        known = token_log_likelihood(apply(decoder, params, batch.tokens, batch.mask), batch.tokens, batch.targets)
        return -known.sum() / batch.targets.sum().astype(known.dtype)

    def batch(step: int) -> Worked:
        chosen = np.random.default_rng([0, step]).integers(number, size=settings.batch_size)
        return Worked(*(array[chosen] for array in examples))

    return fit(
        init(family_of(config).leaves(config), jax.random.key(0)),
        loss,
        batch,
        steps=settings.steps,
        learning_rate=settings.learning_rate,
    )
