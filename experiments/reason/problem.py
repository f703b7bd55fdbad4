"""What a reasoning run improves: a model that continues texts, and a task whose answers can be checked.

    rows -> prompts in tokens -> completions (`experiments.decoding`) -> texts -> scores of the task's reward

Owns the way from problems to tokens and from tokens back to scores; evolution, GRPO and validation share it.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from eggroll.envs import tasks
from eggroll.llm import hf
from eggroll.llm.decoder import Decoder
from eggroll.llm.decoding import Completions, Prompts, complete, pad_prompts
from eggroll.llm.generator import Generator
from eggroll.llm.tokenizers import Tokenizer

Template = str | Callable[[str], str]  # a text with "{prompt}", or the function that makes of a prompt what the model reads
SPECIAL = re.compile(r"<\|[^|<>]+\|>")  # such as <|im_end|>, in a template


class Sampling(NamedTuple):
    """How completions are drawn."""

    max_new_tokens: int  # tokens of a completion at most
    temperature: float  # 0: greedy
    top_p: float
    stop_token_ids: tuple[int, ...]  # tokens that end a completion


class Judged(NamedTuple):
    """Texts and what they scored."""

    texts: list[str]
    scores: tasks.Scores


@dataclasses.dataclass(frozen=True, eq=False)
class Problem:
    """A model and a task.

    Args:
        source: folder of the model's checkpoint.
        config: of the model.
        params: of the model, where a run begins.
        tokenizer: of the model.
        task: with its splits and reward.
        template: what the model reads of the task's prompt.
        prompt_length: tokens that prompts are padded to.
        scorer: of the task's reward.
    """

    source: Path
    config: hf.Config
    params: Any
    tokenizer: Tokenizer
    task: tasks.Task
    template: Template
    prompt_length: int
    scorer: tasks.Scorer

    @functools.cached_property
    def generator(self) -> Generator:
        """The functions that continue texts."""
        return hf.make_generator(self.config)

    @functools.cached_property
    def decoder(self) -> Decoder:
        """The functions of whole texts."""
        return hf.make_decoder(self.config)

    def prompts(self, rows: Sequence[tasks.Row], *, samples: int = 1) -> Prompts:
        """Lay prompts side by side, each so many times in a row.

        Raises:
            ValueError: one is longer than `prompt_length`.
        """
        texts = [read_by_model(self.tokenizer, self.template, row.prompt) for row in rows]
        for row, text in zip(rows, texts, strict=True):
            if len(text) > self.prompt_length:
                raise ValueError(
                    f"prompt_length must be at least {len(text)}, the tokens of the prompt {row.prompt[:60]!r}, "
                    f"got {self.prompt_length}."
                )
        return pad_prompts([text for text in texts for _ in range(samples)], length=self.prompt_length)

    def complete(self, params: Any, prompts: Prompts, key: Any, *, sampling: Sampling) -> Completions:
        """Continue prompts under some parameters; `key` is key data (uint32), so that it travels with a batch."""
        options = sampling._asdict()
        drawn = jax.random.wrap_key_data(key, impl="threefry2x32") if sampling.temperature else None
        return complete(self.generator, params, prompts, key=drawn, **options)

    def texts(self, completions: Completions) -> list[str]:
        """Decode completions to texts without their stop token, in the order of the flattened leading axes."""
        tokens = np.asarray(completions.tokens).reshape(-1, completions.tokens.shape[-1])
        ends = np.asarray(completions.length).reshape(-1) - np.asarray(completions.ended).reshape(-1)
        return [self.tokenizer.decode(row[:end].tolist()) for row, end in zip(tokens, ends, strict=True)]

    def judge(self, rows: Sequence[tasks.Row], completions: Completions) -> Judged:
        """Score completions; `rows` has the problem of every one, in the order of the flattened axes."""
        texts = self.texts(completions)
        prompts, columns = tasks.collate(rows)
        return Judged(texts, self.scorer(prompts, texts, **columns))


def read_by_model(tokenizer: Tokenizer, template: Template, prompt: str) -> list[int]:
    """Return the tokens that a model reads of a task's prompt; a function's text has the tokens that start it."""
    if isinstance(template, str):
        return [*tokenizer.prefix, *tokenizer.encode(template.replace("{prompt}", prompt))]
    return tokenizer.encode(template(prompt))


def check_template(template: Template, tokenizer: Tokenizer) -> None:
    """Raise ValueError where a template has no prompt, or a special token such as <|im_end|> that the tokenizer lacks."""
    text = template if isinstance(template, str) else template("{prompt}")
    if "{prompt}" not in text:
        raise ValueError(f"template must have {{prompt}}, where the task's prompt goes, got {text!r}.")
    for token in SPECIAL.findall(text):
        if len(tokenizer.encode(token)) != 1:
            raise ValueError(f"the model's tokenizer has no special token {token!r}, which the template needs.")


def key_data(seed: int, *numbers: int) -> np.ndarray:
    """Return the data of a key for a seed and numbers such as a generation and a group: uint32 [2]."""
    return np.random.SeedSequence([seed, *numbers]).generate_state(2)
