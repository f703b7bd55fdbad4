"""A reasoning problem: a model that continues texts, and a task whose answers can be checked.

    rows -> prompts in tokens -> completions (`eggroll.llm.decoding`) -> texts -> scores of the task's reward

Owns the way from rows to tokens and back to scores, which evolution and GRPO share, and the accuracy on held-out rows.
"""

import bisect
import dataclasses
import functools
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from eggroll.envs import tasks
from eggroll.experiments.reason.prompt_lengths import Lengths
from eggroll.llm import hf
from eggroll.llm.decoder import Decoder
from eggroll.llm.decoding import Completions, Prompts, complete, pad_prompts
from eggroll.llm.generator import Generator
from eggroll.llm.tokenizers import Tokenizer
from eggroll.population.moves import move_as_integers

Template = str | Callable[[str], str]  # a text with "{prompt}", or a function from a prompt to what the model reads
SPECIAL = re.compile(r"<\|[^|<>]+\|>")  # such as <|im_end|>, in a template
BATCH_SIZE = 128  # held-out problems completed at a time


class Sampling(NamedTuple):
    """How completions are drawn."""

    max_new_tokens: int
    temperature: float  # 0: greedy
    top_p: float
    stop_token_ids: tuple[int, ...]


class Scored(NamedTuple):
    """Texts and their scores."""

    texts: list[str]
    scores: tasks.Scores


@dataclasses.dataclass(frozen=True, eq=False)
class Problem:
    """A model and a task.

    Args:
        source: folder of the model's checkpoint.
        config: of the model.
        read: reads the parameters that a run starts with.
        tokenizer: of the model.
        task: with its splits and reward.
        template: turns the task's prompt into what the model reads.
        lengths: that prompts are padded to.
        scorer: of the task's reward.
        stop: texts that completions are cut off at, in addition to stop tokens.
    """

    source: Path
    config: hf.Config
    read: Callable[[], Any]
    tokenizer: Tokenizer
    task: tasks.Task
    template: Template
    lengths: Lengths
    scorer: tasks.Scorer
    stop: tuple[str, ...] = ()

    @property
    def params(self) -> Any:
        """The parameters that a run starts with, read again at every use: nothing keeps them while they are trained."""
        return self.read()

    @functools.cached_property
    def generator(self) -> Generator:
        """The functions that continue texts."""
        return hf.make_generator(self.config)

    @functools.cached_property
    def decoder(self) -> Decoder:
        """The functions of whole texts."""
        return hf.make_decoder(self.config)

    def prompts(self, rows: Sequence[tasks.Row], *, samples: int = 1, held_out: bool = False) -> Prompts:
        """Encode the prompts of rows into a batch, each `samples` times in a row.

        Args:
            rows: of a batch.
            samples: of a prompt.
            held_out: pad as held-out rows are padded, not as those of training.

        Raises:
            ValueError: one is longer than `lengths.most`; the message names the prompt.
        """
        texts = [encode_prompt(self.tokenizer, self.template, row.prompt) for row in rows]
        longest, row = max(zip(map(len, texts), rows, strict=True), key=lambda pair: pair[0])
        length = self.lengths.of_batch(longest, held_out=held_out, prompt=row.prompt)
        return pad_prompts([text for text in texts for _ in range(samples)], length=length)

    def complete(self, params: Any, prompts: Prompts, key: Any, *, sampling: Sampling) -> Completions:
        """Continue prompts; `key` is key data (uint32 [2]), so that it can be part of a batch."""
        return complete(
            self.generator,
            params,
            prompts,
            max_new_tokens=sampling.max_new_tokens,
            stop_token_ids=sampling.stop_token_ids,
            key=jax.random.wrap_key_data(key, impl="threefry2x32") if sampling.temperature else None,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
        )

    def texts(self, completions: Completions) -> list[str]:
        """Decode completions to texts without their stop token or text, in the order of the flattened leading axes."""
        tokens = np.asarray(completions.tokens).reshape(-1, completions.tokens.shape[-1])
        ends = np.asarray(completions.length).reshape(-1) - np.asarray(completions.ended).reshape(-1)
        return [read_until(self.tokenizer, row[:end].tolist(), self.stop) for row, end in zip(tokens, ends, strict=True)]

    def count_tokens(self, completions: Completions) -> np.ndarray:
        """Return the tokens of B completions that their texts depend on, stop token or text included: int32 [B]."""
        rows = zip(np.asarray(completions.tokens), np.asarray(completions.length), strict=True)
        return np.array([count_until(self.tokenizer, row[:end].tolist(), self.stop) for row, end in rows], np.int32)

    def score(self, rows: Sequence[tasks.Row], completions: Completions) -> Scored:
        """Score completions; `rows` has the problem of each, in the order of the flattened leading axes."""
        texts = self.texts(completions)
        prompts, columns = tasks.collate(rows)
        return Scored(texts, self.scorer(prompts, texts, **columns))

    def score_beside(
        self, rows: Sequence[tasks.Row], completions: Completions, *, count: int
    ) -> tuple[list[str], tasks.Scores, tasks.Scores]:
        """Score `count` completions and, in the same call, others that change nothing of their scores.

        Returns:
            All texts, the scores of the first and those of the others.
        """
        texts = self.texts(completions)
        prompts, columns = tasks.collate(rows)
        return texts, *self.scorer.score_beside(prompts, texts, columns, count=count)


class Check(NamedTuple):
    """The result of held-out problems."""

    accuracy: float  # mean of the scores, 0 without any; the share of right answers where scores are 0 and 1
    ended: float  # share of completions that a stop token ended
    tokens: float  # mean length of a completion
    examples: list[tuple[str, str, float]]  # prompt, completion, score
    scores: np.ndarray  # float32 [problems], NaN where a completion has none


class Validation:
    """Accuracy of unperturbed parameters on the first problems of a split, by greedy completions; compiled once.

    Args:
        problem: the model and the task.
        split: of the task.
        size: most problems.
        sampling: of training; its temperature and top_p are not used.
    """

    def __init__(self, problem: Problem, split: str, *, size: int, sampling: Sampling):
        rows = problem.task.split(split)
        self._rows = [rows[index] for index in range(min(size, len(rows)))]
        self._problem, self._sampling = problem, sampling._replace(temperature=0.0, top_p=1.0)
        self._decode = jax.jit(move_as_integers(self._complete_greedily))

    @property
    def prompts(self) -> list[str]:
        """Those of the problems."""
        return [row.prompt for row in self._rows]

    def _complete_greedily(self, params: Any, prompts: Any) -> Any:
        return self._problem.complete(params, prompts, key_data(0), sampling=self._sampling)

    def complete(self, params: Any) -> Completions:
        """Complete the problems greedily."""
        firsts = range(0, len(self._rows), BATCH_SIZE)
        parts = [self._complete(params, self._rows[first : first + BATCH_SIZE]) for first in firsts]
        return Completions(*map(np.concatenate, zip(*parts, strict=True)))

    def score(self, completions: Completions) -> Scored:
        """Score completions of the problems, all batches together: a failure is compared with all of them."""
        return self._problem.score(self._rows, completions)

    def __call__(self, params: Any, *, examples: int = 0) -> Check:
        """Check parameters; return `examples` completions with the result."""
        completions = self.complete(params)
        texts, scores = self.score(completions)
        given = scores.values[scores.has_score]
        accuracy = float(given.mean()) if given.size else 0.0
        shown = [(self._rows[i].prompt, texts[i], float(scores.values[i])) for i in range(min(examples, len(texts)))]
        each = np.where(scores.has_score, scores.values, np.float32(np.nan))
        return Check(accuracy, float(completions.ended.mean()), float(completions.length.mean()), shown, each)

    def compile(self, params: Any) -> Any:
        """Compile the completions for parameters, of which shapes count."""
        return self._decode.lower(params, self._pad(self._rows[:BATCH_SIZE])).compile()

    def _pad(self, rows: Sequence[tasks.Row]) -> Prompts:
        """Encode a batch; the last one has the shape of the others."""
        padding = [rows[0]] * (min(BATCH_SIZE, len(self._rows)) - len(rows))
        return self._problem.prompts([*rows, *padding], held_out=True)

    def _complete(self, params: Any, rows: Sequence[tasks.Row]) -> Completions:
        padded = jax.device_get(self._decode(params, self._pad(rows)))
        return Completions(*(array[: len(rows)] for array in padded))


def count_until(tokenizer: Tokenizer, tokens: list[int], stop: Sequence[str]) -> int:
    """Return how many tokens it takes until their text, special ones included, contains a stop text; all if it has none."""

    def contains(count: int) -> bool:
        text = tokenizer.decode(tokens[:count], special=True)
        return any(one in text for one in stop)

    whole = len(tokens)
    return bisect.bisect_left(range(whole), True, key=contains) if stop and contains(whole) else whole


def read_until(tokenizer: Tokenizer, tokens: list[int], stop: Sequence[str]) -> str:
    """Return the text of tokens up to the first stop text, which may contain special tokens; the text itself has none."""
    tokens = tokens[: count_until(tokenizer, tokens, stop)]
    text = tokenizer.decode(tokens)
    if not stop:
        return text
    whole = tokenizer.decode(tokens, special=True)
    end = min((found for found in map(whole.find, stop) if found >= 0), default=None)
    if end is None or text == whole:
        return text[:end]
    widths = [len(tokenizer.decode(tokens[:count], special=True)) for count in range(len(tokens))]
    before = bisect.bisect_right(widths, end) - 1  # whole tokens before the stop text
    return tokenizer.decode(tokens[:before]) + whole[widths[before] : end]


def encode_prompt(tokenizer: Tokenizer, template: Template, prompt: str) -> list[int]:
    """Encode what a model reads for a task's prompt; the text of a template function contains the start tokens itself."""
    if isinstance(template, str):
        return [*tokenizer.prefix, *tokenizer.encode(template.replace("{prompt}", prompt))]
    return tokenizer.encode(template(prompt))


def check_template(template: Template, tokenizer: Tokenizer) -> None:
    """Raise ValueError if a template has no {prompt}, or a special token such as <|im_end|> that the tokenizer lacks."""
    text = template if isinstance(template, str) else template("{prompt}")
    if "{prompt}" not in text:
        raise ValueError(f"template must contain {{prompt}}, the place of the task's prompt, got {text!r}.")
    for token in SPECIAL.findall(text):
        if len(tokenizer.encode(token)) != 1:
            raise ValueError(f"the model's tokenizer has no special token {token!r}, which the template needs.")


def key_data(seed: int, *numbers: int) -> np.ndarray:
    """Return the key data of a seed and numbers such as a generation and a group: uint32 [2]."""
    return np.random.SeedSequence([seed, *numbers]).generate_state(2)
