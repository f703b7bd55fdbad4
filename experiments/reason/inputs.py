"""Inputs of `experiments.reason`: the model and the task that the options name."""

import math
from typing import Any, NamedTuple

import optax

from eggroll.devices.chunking import free_bytes
from eggroll.envs import tasks
from eggroll.experiments.reason.config import Config
from eggroll.experiments.reason.problem import Problem, Sampling, Template, check_template, encode_prompt
from eggroll.experiments.reason.warm_start import warm_start
from eggroll.llm import hf
from eggroll.llm.chat import ChatTemplate
from eggroll.llm.memory import MemoryPlan, memory_plan
from eggroll.llm.shards import CONFIG, read_object
from eggroll.llm.tokenizers import ByteTokenizer, Tokenizer, load_tokenizer

CHAT = "chat"  # names the template of the checkpoint
MARGIN = 1.25  # prompts of training may be so much longer than the longest held-out one


class Inputs(NamedTuple):
    """Everything but the weights."""

    model: hf.Config
    tokenizer: Tokenizer
    task: tasks.Task
    template: Template
    prompt_length: int  # tokens that prompts are padded to


def prepare(config: Config) -> Inputs:
    """Make the task, and read what the options name except for the weights.

    Raises:
        ValueError, OSError, ImportError: a file is missing, damaged or does not fit; a package is missing.
    """
    try:
        task = tasks.load(config.task, seed=0, **config.parsed_task_options())
    except TypeError as error:
        raise ValueError(f"task_options: {error}.") from error
    if config.model is None:
        model: hf.Config = config.start.model
        tokenizer: Tokenizer = ByteTokenizer()
    else:
        if not config.model.is_dir():
            raise ValueError(f"model must be a folder with a checkpoint, got {config.model}.")
        model = hf.read_config(config.model)
        hf.make_generator(model)  # raises for a model that cannot continue texts
        tokenizer = load_tokenizer(config.model, vocab_size=model.vocab_size)
    template = _make_template(config)
    check_template(template, tokenizer)
    length = config.prompt_length or _prompt_length(template, tokenizer, task)
    context = getattr(model, "max_position_embeddings", None)  # RWKV-7 has no limit
    if context is not None and length + config.max_new_tokens > context:
        lengths = f"prompt_length {length} and max_new_tokens {config.max_new_tokens}"
        raise ValueError(f"{lengths} do not fit the model's context of {context} tokens.")
    return Inputs(model, tokenizer, task, template, length)


def _make_template(config: Config) -> Template:
    if config.template != CHAT:
        return _unescape(config.template)
    if config.model is None:
        raise ValueError("template chat needs --model, a checkpoint whose tokenizer has a chat template.")
    return ChatTemplate(config.model)


def _unescape(text: str) -> str:
    """Turn the two characters backslash and n, as a shell passes them, into the end of a line."""
    return text.replace("\\n", "\n")


def _prompt_length(template: Template, tokenizer: Tokenizer, task: tasks.Task) -> int:
    def longest(*rows: tasks.Row) -> int:
        return max(len(encode_prompt(tokenizer, template, row.prompt)) for row in rows)

    margin, train = math.ceil(MARGIN * longest(*task.split("validation"), *task.split("test"))), task.split("train")
    return max(margin, longest(*train)) if isinstance(train, tuple) else margin  # other splits are made while they are read


def load(config: Config, inputs: Inputs) -> Problem:
    """Read the weights, of the warm-started small model if the options name no checkpoint.

    The problem hands them out once, and later reads them again: whoever uses them decides how long they are in memory.

    Raises:
        ValueError, OSError, ImportError: as `prepare`.
    """
    source = config.model or warm_start(config.start, inputs.task, template=str(inputs.template))
    dtype = config.dtype if config.model else "float32"
    model, _, params = hf.load(source, dtype, weights=config.weights)
    unused = [params]
    timeout = config.timeout if config.workers else None
    scorer = tasks.Scorer(inputs.task.reward, workers=config.workers, timeout=timeout, minimum=config.reward_minimum)

    def read() -> Any:
        return unused.pop() if unused else hf.load(source, dtype, weights=config.weights)[2]

    return Problem(source, model, read, inputs.tokenizer, inputs.task, inputs.template, inputs.prompt_length, scorer)


def plan(config: Config, inputs: Inputs, *, optimizer: optax.GradientTransformation) -> MemoryPlan:
    """Return the memory that a population of the options needs, and the state of a run with the optimizer."""
    return memory_plan(
        inputs.model,
        dtype=config.dtype if config.model else "float32",
        prompts=config.prompts * config.samples,
        prompt_length=inputs.prompt_length,
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
        ValueError: a stop text that is not a single token, or a checkpoint that names no end of a text.
    """
    stop_token_ids = _stop_token_ids(config, tokenizer)
    return Sampling(config.max_new_tokens, config.sampling_temperature, config.top_p, stop_token_ids)


def _stop_token_ids(config: Config, tokenizer: Tokenizer) -> tuple[int, ...]:
    if config.stop is not None:
        return tuple(_encode_stop(text, tokenizer) for text in config.stop)
    if config.stop_token_ids is not None:
        return config.stop_token_ids
    if config.model is None or isinstance(tokenizer, ByteTokenizer):
        return (ord("\n"),)
    for path in (config.model / "generation_config.json", config.model / CONFIG):
        ids = read_object(path).get("eos_token_id") if path.is_file() else None
        if ids is not None:
            return tuple(ids) if isinstance(ids, list) else (ids,)
    raise ValueError(f"{config.model} names no eos_token_id: give --stop, the texts that end a completion.")


def _encode_stop(text: str, tokenizer: Tokenizer) -> int:
    tokens = tokenizer.encode(_unescape(text))
    if len(tokens) != 1:
        raise ValueError(f"stop must be texts of a single token, got {text!r}, which has {len(tokens)} tokens here.")
    return tokens[0]
