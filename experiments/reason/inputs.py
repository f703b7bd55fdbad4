"""What `experiments.reason` starts from: the model and the task that the options name."""

import math
from pathlib import Path
from typing import NamedTuple

from eggroll.devices.chunking import free_bytes
from eggroll.envs import tasks
from eggroll.experiments.reason.config import Config
from eggroll.experiments.reason.problem import Problem, Sampling, Template, check_template, read_by_model
from eggroll.experiments.reason.warm_start import warm_start
from eggroll.llm import hf
from eggroll.llm.chat import ChatTemplate
from eggroll.llm.int8 import quantise
from eggroll.llm.memory import MemoryPlan, memory_plan
from eggroll.llm.models.families import family_of
from eggroll.llm.shards import CONFIG, read_object
from eggroll.llm.tokenizers import ByteTokenizer, Tokenizer, load_tokenizer

CHAT = "chat"  # the template that is in the checkpoint
MARGIN = 1.25  # of training's prompts beside the longest held-out one


class Inputs(NamedTuple):
    """All but the weights."""

    model: hf.Config
    tokenizer: Tokenizer
    task: tasks.Task
    template: Template
    prompt_length: int  # tokens that prompts are padded to


def prepare(config: Config) -> Inputs:
    """Make the task and read what the options name, but for the weights.

    Raises:
        ValueError, OSError, ModuleNotFoundError: a file is missing, damaged or does not fit, a package is missing.
    """
    try:
        task = tasks.load(config.task, seed=0, **config.given())
    except TypeError as error:
        raise ValueError(f"task_options: {error}.") from error
    if config.model is None:
        model: hf.Config = config.start.model
        tokenizer: Tokenizer = ByteTokenizer()
    else:
        if not config.model.is_dir():
            raise ValueError(f"model must be a folder with a checkpoint, got {config.model}.")
        model = hf.read_config(config.model)
        hf.make_generator(model)  # refuses a model that does not continue texts
        tokenizer = load_tokenizer(config.model, vocab_size=model.vocab_size)
    template = _template(config)
    check_template(template, tokenizer)
    length = config.prompt_length or _prompt_length(template, tokenizer, task)
    context = getattr(model, "max_position_embeddings", None)  # RWKV-7 has no limit
    if context is not None and length + config.max_new_tokens > context:
        raise ValueError(
            f"prompt_length {length} and room {config.max_new_tokens} do not fit the model's context of {context} tokens."
        )
    return Inputs(model, tokenizer, task, template, length)


def _template(config: Config) -> Template:
    if config.template != CHAT:
        return config.template.replace("\\n", "\n")  # as a shell hands it over
    if config.model is None:
        raise ValueError("template chat needs --model, a checkpoint whose tokenizer has a chat template.")
    return ChatTemplate(config.model)


def _prompt_length(template: Template, tokenizer: Tokenizer, task: tasks.Task) -> int:
    def longest(*rows: tasks.Row) -> int:
        return max(len(read_by_model(tokenizer, template, row.prompt)) for row in rows)

    margin, train = math.ceil(MARGIN * longest(*task.split("validation"), *task.split("test"))), task.split("train")
    return max(margin, longest(*train)) if isinstance(train, tuple) else margin  # others are made when they are read


def load(config: Config, inputs: Inputs) -> Problem:
    """Read the weights; the small model is warm-started where it is not there yet.

    Raises:
        ValueError, OSError, ModuleNotFoundError: as `prepare`.
    """
    source = config.model or warm_start(config.start, inputs.task, template=str(inputs.template))
    model, _, params = hf.load(source, config.dtype if config.model else "float32")
    if config.weights == "int8":
        params = quantise(family_of(model).leaves(model), params)
    scorer = tasks.Scorer(inputs.task.reward, workers=config.workers, timeout=config.timeout)
    return Problem(source, model, params, inputs.tokenizer, inputs.task, inputs.template, inputs.prompt_length, scorer)


def plan(config: Config, inputs: Inputs) -> MemoryPlan:
    """Return what a population of the options needs of memory."""
    budget = config.memory_budget or free_bytes()
    texts = {"prompts": config.prompts * config.samples, "prompt_length": inputs.prompt_length, "room": config.max_new_tokens}
    dtype = config.dtype if config.model else "float32"
    return memory_plan(inputs.model, dtype=dtype, weights=config.weights, rank=config.rank, budget=budget, **texts)


def sampling_of(config: Config, problem: Problem) -> Sampling:
    """How training's completions are drawn."""
    stop_token_ids = config.stop_token_ids if config.stop_token_ids is not None else _ending(problem)
    return Sampling(config.max_new_tokens, config.known_temperature, config.top_p, stop_token_ids)


def _ending(problem: Problem) -> tuple[int, ...]:
    if isinstance(problem.tokenizer, ByteTokenizer):
        return (ord("\n"),)
    for name in ("generation_config.json", CONFIG):
        path: Path = problem.source / name
        found = read_object(path).get("eos_token_id") if path.is_file() else None
        if found is not None:
            return tuple(found) if isinstance(found, list) else (found,)
    raise ValueError(f"{problem.source} names no eos_token_id: give --stop, the tokens that end a completion.")
