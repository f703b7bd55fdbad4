"""Examples of a task as padded arrays, and batches of them."""

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from eggroll.envs.tasks.records import Record
from eggroll.experiments.zo.data.tasks import Task
from eggroll.llm.tokenizers import Tokenizer


class Examples(NamedTuple):
    """N questions with C candidates each (1 for generation) as arrays of T tokens, padded on the right with 0."""

    tokens: Any  # int32 [N, C, T]: prompt and candidate
    mask: Any  # bool [N, C, T], False on padding
    targets: Any  # bool [N, C, T], True on the candidate's tokens
    labels: Any  # int32 [N], index of the right candidate


def encode(records: Sequence[Record], task: Task, tokenizer: Tokenizer, *, max_length: int) -> Examples:
    """Encode records as arrays.

    Args:
        records: at least one.
        task: turns records into text.
        tokenizer: turns text into tokens.
        max_length: most tokens of an example; longer prompts lose their beginning, the same for all candidates, and a warning
            says how many.

    Returns:
        The examples, padded to the longest.

    Raises:
        ValueError: a record that does not fit the task, a prompt or candidate without tokens, two candidates of the same
            tokens, a candidate that fills max_length.
    """
    rows, labels, lengths = [], [], []
    for record in records:
        question = task.question(record)
        targets = [tokenizer.encode(candidate) for candidate in question.candidates]
        for candidate, target in zip(question.candidates, targets, strict=True):
            if not target:
                raise ValueError(f"{record.place}: the tokenizer turns {candidate!r}, a text to be predicted, into no tokens.")
        if len({*map(tuple, targets)}) < len(targets):
            raise ValueError(f"{record.place}: two of the candidates {question.candidates} have the same tokens.")
        context, length = _context(record, question.prompt, targets, tokenizer, max_length)
        rows.append([(context, target) for target in targets])
        labels.append(question.label)
        lengths.append(length)
    if cut := sum(length > max_length for length in lengths):
        lost = f"{cut} of {len(lengths)} prompts lose their beginning at max_length {max_length}"
        warnings.warn(f"{lost}; {max(lengths)} leaves all whole.", stacklevel=2)
    length = max(len(context) + len(target) for row in rows for context, target in row)
    tokens = np.zeros((len(rows), len(rows[0]), length), np.int32)
    mask, targets_mask = np.zeros(tokens.shape, bool), np.zeros(tokens.shape, bool)
    for n, row in enumerate(rows):
        for c, (context, target) in enumerate(row):
            end = len(context) + len(target)
            tokens[n, c, :end] = context + target
            mask[n, c, :end] = True
            targets_mask[n, c, len(context) : end] = True
    return Examples(tokens, mask, targets_mask, np.array(labels, np.int32))


def _context(
    record: Record, prompt: str, targets: list[list[int]], tokenizer: Tokenizer, max_length: int
) -> tuple[list[int], int]:
    """Return the tokens before every candidate, the tokenizer's prefix and the end of the prompt; and the length of all."""
    longest = max(map(len, targets))
    limit = max_length - len(tokenizer.prefix) - longest
    if limit < 1:
        raise ValueError(
            f"{record.place}: a text to be predicted has {longest} tokens, which leaves no place for a prompt in {max_length}."
        )
    tokens = tokenizer.encode(prompt)
    context = [*tokenizer.prefix, *tokens[-limit:]]
    if not context:
        raise ValueError(f"{record.place}: the tokenizer turns the prompt {prompt!r} into no tokens.")
    return context, len(tokenizer.prefix) + len(tokens) + longest


def batch_of(examples: Examples, step: int, *, size: int, seed: int = 0) -> Examples:
    """Return the batch of a step, a pure function of its arguments; every epoch has a new order and drops its remainder.

    Args:
        examples: the whole split.
        step: from 0.
        size: examples in a batch.
        seed: of the order.

    Raises:
        ValueError: size is not between 1 and the number of examples.
    """
    number = len(examples.labels)
    if not 1 <= size <= number:
        raise ValueError(f"the batch size must be between 1 and the number of examples, {number}, got {size}.")
    epoch, batch = divmod(int(step), number // size)
    order = np.random.default_rng([seed, epoch]).permutation(number)[batch * size : (batch + 1) * size]
    return Examples(*(array[order] for array in examples))
