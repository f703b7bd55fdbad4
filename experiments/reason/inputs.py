"""Inputs of `experiments.reason`: the model and the task that the options name."""

import dataclasses
import math
from pathlib import Path
from typing import Any, NamedTuple

import optax

from eggroll.devices.chunking import free_bytes
from eggroll.envs import tasks
from eggroll.experiments.common.models import model_folder
from eggroll.experiments.reason.config import Config
from eggroll.experiments.reason.problem import Problem, Sampling, Template, check_template, encode_prompt
from eggroll.experiments.reason.prompt_lengths import SAMPLE, Lengths
from eggroll.experiments.reason.warm_start import warm_start
from eggroll.llm import hf
from eggroll.llm.chat import ChatTemplate
from eggroll.llm.memory import MemoryPlan, memory_plan
from eggroll.llm.shards import CONFIG, read_object
from eggroll.llm.tokenizers import ByteTokenizer, Tokenizer, load_tokenizer

CHAT = "chat"  # names the template of the checkpoint


class Inputs(NamedTuple):
    """Everything but the weights."""

    model: hf.Config
    tokenizer: Tokenizer
    task: tasks.Task
    template: Template
    lengths: Lengths  # that prompts are padded to


def prepare(config: Config, *, reward: tasks.Reward | None = None, lengths: Lengths | None = None) -> Inputs:
    """Make the task, and read what the options name except for the weights, of which only the headers are.

    Args:
        config: the options.
        reward: a function instead of the reward that they name, which is then not imported.
        lengths: what to pad prompts to; None: what the prompts of the run need.

    Raises:
        ValueError, OSError, ImportError: a file is missing, damaged or does not fit; a package is missing.
    """
    task = _make_task(config, reward)
    asked = config.prompts * config.groups if config.algorithm == "eggroll" else config.grpo.prompts
    if asked > len(task.split("train")):
        option = "prompts times groups" if config.groups > 1 else "prompts" if config.algorithm == "eggroll" else "grpo.prompts"
        raise ValueError(f"{option} must be at most {len(task.split('train'))}, the problems of the train split, got {asked}.")
    folder = model_folder(config.model)
    if folder is None:
        model: hf.Config = config.start.model
        tokenizer: Tokenizer = ByteTokenizer()
    else:
        model = hf.check(folder)
        hf.make_generator(model)  # raises for a model that cannot continue texts
        tokenizer = load_tokenizer(folder, vocab_size=model.vocab_size)
    template = _make_template(config)
    check_template(template, tokenizer)
    context = getattr(model, "max_position_embeddings", None)  # RWKV-7 has no limit
    if lengths is None:
        most = math.inf if context is None else context - config.max_new_tokens
        lengths = _lengths(config, template, tokenizer, task, most=most)
    if context is not None and lengths.longest + config.max_new_tokens > context:
        given = f"prompt_length {lengths.longest} and max_new_tokens {config.max_new_tokens}"
        raise ValueError(f"{given} do not fit the model's context of {context} tokens.")
    return Inputs(model, tokenizer, task, template, lengths)


def _make_task(config: Config, reward: tasks.Reward | None) -> tasks.Task:
    if reward is None and config.reward is not None:
        reward = tasks.named_reward(config.reward)
    if config.data is not None:
        if reward is None:
            raise ValueError(f"data needs a --reward: {tasks.FORMS}.")
        rows = tasks.read_rows(config.data, prompt=config.prompt_column or "prompt", key=config.key_column)
        print(f"{config.data}: {rows.describe()}", flush=True)
        return tasks.Task(config.data.stem, reward=reward, splits=rows.splits)
    try:
        task = tasks.load(config.task, seed=0, **config.parsed_task_options())
    except TypeError as error:
        raise ValueError(f"--task-options: {error}.") from error
    return task if reward is None else dataclasses.replace(task, reward=reward)


def _make_template(config: Config) -> Template:
    if config.template != CHAT:
        return _unescape(config.template)
    folder = model_folder(config.model)
    if folder is None:
        raise ValueError("template chat needs --model, a checkpoint whose tokenizer has a chat template.")
    return ChatTemplate(folder)


def _unescape(text: str) -> str:
    """Turn the two characters backslash and n, as a shell passes them, into the end of a line."""
    return text.replace("\\n", "\n")


def _lengths(config: Config, template: Template, tokenizer: Tokenizer, task: tasks.Task, *, most: float) -> Lengths:
    """Return what to pad prompts to; ValueError for a row whose prompt has no tokens, which no model can continue."""

    def longest(split: str, size: int) -> int:
        rows, found = task.split(split), 0
        for index in range(min(size, len(rows))):
            count = len(encode_prompt(tokenizer, template, rows[index].prompt))
            if not count:
                raise ValueError(f"prompts must have tokens, got {rows[index].prompt!r} in {_name_row(split, rows[index])}.")
            found = max(found, count)
        return found

    train = task.split("train")  # splits that are no tuple make their rows when they are read
    of_train = longest("train", len(train) if isinstance(train, tuple) else SAMPLE)
    held_out = max(longest("validation", config.validation_size), longest("test", config.test_size))
    if config.prompt_length is not None:
        return Lengths(config.prompt_length, config.prompt_length, config.prompt_length)
    return Lengths(of_train, held_out, most)


def _name_row(split: str, row: tasks.Row) -> str:
    columns = ", ".join(f"{name} {value!r}" for name, value in row.columns.items())
    return f"the row of the {split} split with {columns[:60] or 'no other column'}"


def load(config: Config, inputs: Inputs) -> Problem:
    """Read the weights, of the warm-started small model if the options name no checkpoint.

    The problem hands them out once, and later reads them again: whoever uses them decides how long they are in memory.

    Raises:
        ValueError, OSError, ImportError: as `prepare`.
    """
    dtype, timeout = config.dtype if config.model else "float32", config.timeout if config.workers else None
    scorer = tasks.Scorer(inputs.task.reward, workers=config.workers, timeout=timeout, minimum=config.reward_minimum)
    try:
        if config.reward is not None:
            tasks.try_reward(scorer, inputs.task.split("train")[:3])
        source = model_folder(config.model) or warm_start(config.start, inputs.task, template=str(inputs.template))
        model, _, params = hf.load(source, dtype, weights=config.weights)
    except BaseException:
        scorer.close()
        raise
    unused = [params]

    def read() -> Any:
        return unused.pop() if unused else hf.load(source, dtype, weights=config.weights)[2]

    stop = tuple(_unescape(text) for text in config.stop or ())
    return Problem(source, model, read, inputs.tokenizer, inputs.task, inputs.template, inputs.lengths, scorer, stop)


def plan(config: Config, inputs: Inputs, *, optimizer: optax.GradientTransformation) -> MemoryPlan:
    """Return the memory that a population of the options needs, and the state of a run with the optimizer."""
    return memory_plan(
        inputs.model,
        dtype=config.dtype if config.model else "float32",
        prompts=config.prompts * config.samples,
        prompt_length=inputs.lengths.train,
        max_new_tokens=config.max_new_tokens,
        rank=config.rank,
        budget=config.memory_budget or free_bytes(),
        weights=config.weights,
        optimizer=optimizer,
        precision=config.precision,
    )


def make_sampling(config: Config, tokenizer: Tokenizer) -> Sampling:
    """Return how the completions in training are drawn.

    Raises:
        ValueError: an empty stop text, a stop token that there is not, or a checkpoint that names no end of a text.
    """
    stop_token_ids = _stop_token_ids(config, tokenizer)
    return Sampling(config.max_new_tokens, config.sampling_temperature, config.top_p, stop_token_ids)


def _stop_token_ids(config: Config, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Return the ids that are given, or those that end a text in the checkpoint and stop texts of one token."""
    if config.stop_token_ids is not None:
        outside = [token for token in config.stop_token_ids if not 0 <= token < tokenizer.vocab_size]
        if outside:
            raise ValueError(f"stop_token_ids must be tokens, from 0 to {tokenizer.vocab_size - 1}, got {outside[0]}.")
        return config.stop_token_ids
    folder = model_folder(config.model)
    ends, stop = () if folder is None else _eos_token_ids(folder), config.stop
    if isinstance(tokenizer, ByteTokenizer):  # whose texts end with a line
        ends, stop = (), ("\n",) if stop is None else stop
    if not ends and stop is None:
        raise ValueError(f"{config.model} names no eos_token_id: give --stop, the texts that end a completion.")
    encoded = {text: tokenizer.encode(_unescape(text)) for text in stop or ()}
    for text, tokens in encoded.items():
        if not tokens:
            raise ValueError(f"stop must be texts, got {text!r}, which has 0 tokens here.")
    single = (tokens[0] for tokens in encoded.values() if len(tokens) == 1)  # the others cut texts: `Problem.texts`
    return tuple(dict.fromkeys((*ends, *single)))


def _eos_token_ids(folder: Path) -> tuple[int, ...]:
    """Return the tokens that end a text, as the files of a checkpoint name them; none if they do not."""
    for path in (folder / "generation_config.json", folder / CONFIG):
        ids = read_object(path).get("eos_token_id") if path.is_file() else None
        if ids is not None:
            return tuple(ids) if isinstance(ids, list) else (ids,)
    return ()
