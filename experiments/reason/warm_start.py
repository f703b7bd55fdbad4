"""The small model of a reasoning run: byte-level, briefly trained by backprop on the worked examples of the task.

    loss = -mean log p(byte of the worked text | the prompt in its template, the bytes before)

The mean is over all bytes of the worked texts in a batch, not over those of prompts.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jax import Array

from eggroll.envs.tasks import Row, Task
from eggroll.experiments.common.warm_start import HEAD_DIM, byte_transformer, cached_model, check_settings, fit
from eggroll.llm.decoder import apply, token_log_likelihood
from eggroll.llm.decoding import pad_prompts
from eggroll.llm.models.families import init_params, make_decoder
from eggroll.llm.models.rwkv7 import RWKV7Config
from eggroll.llm.models.transformer import TransformerConfig
from eggroll.llm.tokenizers import ByteTokenizer

LOW_RANK = 16  # inner sizes of RWKV-7's small maps


@dataclasses.dataclass(frozen=True)
class WarmStart:
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
    """Share of wrong worked examples, for tasks that have such an option."""

    def check(self) -> None:
        """Raise ValueError for settings out of range."""
        if self.architecture not in ("transformer", "rwkv7"):
            raise ValueError(f"start.architecture must be transformer or rwkv7, got {self.architecture!r}.")
        counts = {"layers": self.layers, "steps": self.steps, "batch_size": self.batch_size}
        check_settings(counts, width=self.width, learning_rate=self.learning_rate)
        if not 0 <= self.noise <= 1:
            raise ValueError(f"start.noise must be between 0 and 1, got {self.noise}.")

    @property
    def model(self) -> TransformerConfig | RWKV7Config:
        """The model's sizes."""
        if self.architecture == "transformer":
            return byte_transformer(layers=self.layers, width=self.width)
        return RWKV7Config(
            vocab_size=ByteTokenizer.vocab_size,
            hidden_size=self.width,
            intermediate_size=3 * self.width,
            num_hidden_layers=self.layers,
            decay_low_rank_dim=LOW_RANK,
            a_low_rank_dim=LOW_RANK,
            v_low_rank_dim=LOW_RANK,
            gate_low_rank_dim=LOW_RANK,
            head_dim=HEAD_DIM,
        )


class WorkedExamples(NamedTuple):
    """B prompts, each followed by its worked text, padded on the left."""

    tokens: Any  # int32 [B, T]
    mask: Any  # bool [B, T], False on padding
    targets: Any  # bool [B, T], True on the worked text


def warm_start(settings: WarmStart, task: Task, *, template: str, cache: Path = Path("runs/reason-start")) -> Path:
    """Return the folder of the small model, in the Hugging Face layout; it is trained once.

    Args:
        settings: of model and training.
        task: its train split has the column `worked`.
        template: what the model reads, with "{prompt}" for the task's prompt.
        cache: holds the folders of trained models.

    Raises:
        ValueError: settings out of range, or a task without worked examples.
    """
    settings.check()
    texts = _worked_texts(task, template)
    return cached_model(
        cache,
        settings.model,
        lambda: train(settings, encode_examples(texts)),
        settings=[dataclasses.asdict(settings), texts],
        task=f"the worked examples of {task.name}",
    )


def _worked_texts(task: Task, template: str) -> list[tuple[str, str]]:
    """Return pairs of what the model reads and what it learns to say."""
    rows: Sequence[Row] = task.split("train")
    for row in rows:
        if "worked" not in row.columns:
            raise ValueError(
                f"a task must have the column 'worked' for a warm start, '{task.name}' has {sorted(row.columns)}; give --model."
            )
        if not isinstance(row.columns["worked"], str):
            raise ValueError(f"the column 'worked' must be text for a warm start, got {row.columns['worked']!r}; give --model.")
    return [(template.replace("{prompt}", row.prompt), row.columns["worked"]) for row in rows]


def encode_examples(texts: Sequence[tuple[str, str]]) -> WorkedExamples:
    """Encode pairs of a prompt and its worked text into one batch."""
    tokenizer = ByteTokenizer()
    pairs = [([*tokenizer.prefix, *tokenizer.encode(prompt)], tokenizer.encode(worked)) for prompt, worked in texts]
    length = max(len(prompt) + len(worked) for prompt, worked in pairs)
    prompts = pad_prompts([prompt + worked for prompt, worked in pairs], length=length)
    sizes = np.array([[len(worked)] for _, worked in pairs])
    return WorkedExamples(*prompts, np.arange(length) >= length - sizes)


def train(settings: WarmStart, examples: WorkedExamples) -> Any:
    """Train the small model.

    Args:
        settings: of model and training.
        examples: that batches are drawn from.

    Returns:
        Its parameters.
    """
    config, number = settings.model, len(examples.tokens)
    decoder = make_decoder(config)

    def loss(params: Any, batch: WorkedExamples) -> Array:
        logits = apply(decoder, params, batch.tokens, batch.mask)
        log_likelihood = token_log_likelihood(logits, batch.tokens, batch.targets)
        return -log_likelihood.sum() / batch.targets.sum().astype(log_likelihood.dtype)

    def draw(step: int) -> WorkedExamples:
        chosen = np.random.default_rng([0, step]).integers(number, size=settings.batch_size)
        return WorkedExamples(*(array[chosen] for array in examples))

    params = init_params(config, key=jax.random.key(0))
    return fit(params, loss, draw, steps=settings.steps, learning_rate=settings.learning_rate)
