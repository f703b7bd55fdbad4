"""What `experiments.reason` starts from: the model and the task that the options name."""

import math
from pathlib import Path

from envs import tasks
from experiments.data.tokens import ByteTokenizer, FileTokenizer, Tokenizer
from experiments.models import hf
from experiments.models.shards import CONFIG, read_object
from experiments.reason.config import Config
from experiments.reason.problem import Problem, Sampling
from experiments.reason.start import warm_start

MARGIN = 1.25  # of training's prompts beside the longest held-out one


def load(config: Config) -> Problem:
    """Read the model and make the task.

    Raises:
        ValueError, OSError, ModuleNotFoundError: a file is missing, damaged or does not fit, a package is missing.
    """
    try:
        task = tasks.load(config.task, seed=0, **config.given())
    except TypeError as error:
        raise ValueError(f"task_options: {error}.") from error
    source = config.model or warm_start(config.start, task, template=config.template)
    if not source.is_dir():
        raise ValueError(f"model must be a folder with a checkpoint, got {source}.")
    known = hf.read_config(source)
    hf.generator(known)  # refuses a model that does not continue texts before its weights are read
    tokenizer = tokenizer_of(source, known.vocab_size)
    known, _, params = hf.load(source, config.dtype if config.model else "float32")
    scorer = tasks.Scorer(task.reward, workers=config.workers, timeout=config.timeout)
    problem = Problem(source, known, params, tokenizer, task, config.template, 1, scorer)
    length = config.prompt_length or _prompt_length(problem)
    context = getattr(known, "max_position_embeddings", None)  # RWKV-7 has no limit
    if context is not None and length + config.room > context:
        raise ValueError(f"prompt_length {length} and room {config.room} do not fit the model's context of {context} tokens.")
    return Problem(source, known, params, tokenizer, task, config.template, length, scorer)


def _prompt_length(problem: Problem) -> int:
    held_out = [row for split in ("validation", "test") for row in problem.task.split(split)]
    return math.ceil(MARGIN * max(len(problem.tokens(row.prompt)) for row in held_out))


def tokenizer_of(folder: Path, words: int) -> Tokenizer:
    """Return the tokenizer of a checkpoint; bytes where it has none and its vocabulary is theirs.

    Raises:
        FileNotFoundError, ValueError: there is none, it is damaged, or it has more tokens than the model.
    """
    if words == ByteTokenizer.vocab_size and not (folder / "tokenizer.json").exists():
        return ByteTokenizer()
    tokenizer = FileTokenizer(folder)
    if tokenizer.vocab_size > words:
        raise ValueError(f"the tokenizer in {folder} has {tokenizer.vocab_size} tokens, the model {words}.")
    return tokenizer


def sampling_of(config: Config, problem: Problem) -> Sampling:
    """How training's completions are drawn."""
    ending = config.ending if config.ending is not None else _ending(problem)
    return Sampling(config.room, config.known_temperature, config.top_p, ending)


def _ending(problem: Problem) -> tuple[int, ...]:
    if isinstance(problem.tokenizer, ByteTokenizer):
        return (ord("\n"),)
    for name in ("generation_config.json", CONFIG):
        path = problem.source / name
        found = read_object(path).get("eos_token_id") if path.is_file() else None
        if found is not None:
            return tuple(found) if isinstance(found, list) else (found,)
    raise ValueError(f"{problem.source} names no eos_token_id: give --ending, the tokens that end a completion.")
