"""Decoding with a population, compared with the unperturbed model that decodes all prompts of the population in one batch.

    ratio = time of unperturbed decoding / time of `es.ask(state).apply(complete, prompts)`

Decoding is greedy and without stop tokens, so that both produce the same number of tokens; the time includes drawing the noise.
Both run in the same chunks of members, interleaved in one process. Memory is what the compiler reports for temporary values.

Of a checkpoint, `--model`, `TEXTS` texts are decoded in one batch, and the time is split into the prefill, which also draws the
noise, and the steps: that of the whole minus that of completions of one token, which need no step.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import eggroll
from eggroll.experiments.bench.timing import interleaved_ms, machine
from eggroll.experiments.common.options import ignored_options, refuse, unless
from eggroll.experiments.common.run import print_summary
from eggroll.experiments.egg.models.byte_models import transformer_config
from eggroll.llm import hf
from eggroll.llm.decoding import Completions, Prompts, complete, pad_prompts
from eggroll.llm.models.families import init_params
from eggroll.llm.models.rwkv7 import RWKV7Config

VOCABULARY = 257  # bytes, and a token that starts a text
SHORTEST, LONGEST = 4, 8  # tokens of a prompt
OF_EVERY_SIZE = ("members", "tokens_per_second", "unperturbed_tokens_per_second", "ratio", "temporary_bytes")
COLUMNS = (*OF_EVERY_SIZE, "memory_per_member", "dense_ratio")  # the last two only for the main size
TEXTS = 64  # of a checkpoint: members times prompts
MODEL_COLUMNS = ("members", "tokens_per_second", "unperturbed_tokens_per_second", "prefill_ratio", "step_ratio", "ratio")


@dataclasses.dataclass(frozen=True)
class Decode:
    """Time decoding with a population, as a ratio to the unperturbed model on the same prompts."""

    members: int = 256
    """Members of the population."""
    growth: tuple[int, ...] = (64, 1024)
    """Further population sizes, which show how speed and memory grow; they get a third of the rounds."""
    prompts: int = 8
    """Prompts per member, of 4 to 8 tokens."""
    max_new_tokens: int = 24
    """Tokens of every completion."""
    chunk_size: int = 32
    """Members evaluated at a time."""
    layers: int = 2
    """Layers of the two random models."""
    width: int = 64
    """Their width, a multiple of 16."""
    rank: int = 1
    """Rank of the perturbation."""
    repeats: int = 12
    """Rounds; the medians are reported."""
    dense_repeats: int = 3
    """Rounds with dense noise, which is slow; 0 leaves them out."""
    model: Path | None = None
    """Checkpoint in the Hugging Face layout to time instead of the random models: prefill, steps and whole of 64 texts."""


_OF_RANDOM_MODELS = ("members", "growth", "chunk_size", "layers", "width", "dense_repeats")
RULES = (unless(lambda config: config.model is not None, "with --model: it is of the random models", *_OF_RANDOM_MODELS),)


class Work(NamedTuple):
    """A model and the prompts that it continues."""

    params: Any
    function: Callable[[Any, Prompts], Completions]  # of one member
    prompts: Prompts  # [N, B, T], different for every member


def run(config: Decode) -> None:
    """Run the benchmark; the last line of standard output is JSON."""
    about = machine()
    about |= {"rounds": config.repeats, "rank": config.rank}
    print("  ".join(f"{key} {value}" for key, value in about.items()))
    columns = COLUMNS if config.model is None else MODEL_COLUMNS
    print(f"{'model':<12}" + "".join(f"{column:>{len(column) + 2}}" for column in columns), flush=True)
    try:
        _check(config)
        if config.model is None:
            results = {name: measure(name, *model, config) for name, model in _models(config).items()}
        else:
            results = {"model": measure_checkpoint(config.model, config)}
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
    print_summary(results | {"about": about})


def _check(config: Decode) -> None:
    refuse(ignored_options(config, RULES, Decode()))
    for name in ("chunk_size", "prompts", "repeats", "layers"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name} must be an integer >= 1, got {getattr(config, name)}.")
    if config.model is not None:
        if TEXTS % config.prompts:
            raise ValueError(f"prompts must divide the {TEXTS} texts of a checkpoint, got {config.prompts}.")
        if config.max_new_tokens < 2:
            raise ValueError(f"max_new_tokens must be at least 2 to time a step, got {config.max_new_tokens}.")
        return
    for members in (config.members, *config.growth):
        if members < 1 or members % (2 * config.chunk_size):
            raise ValueError(f"members must be a multiple of twice chunk_size {config.chunk_size}, got {members}.")


def measure_checkpoint(folder: Path, config: Decode) -> dict[str, float]:
    """Time a checkpoint: the ratios of the prefill, of a step and of the whole."""
    model, _, params = hf.load(folder)
    members, forms = TEXTS // config.prompts, dict[str, Callable[[], Any]]()
    for tokens in (1, config.max_new_tokens):
        work = _work(model, params, dataclasses.replace(config, max_new_tokens=tokens), members=members)
        forms[f"unperturbed {tokens}"] = _unperturbed(work, members)
        forms[f"population {tokens}"] = _decoding(work, *_strategy(work, eggroll.LowRank(config.rank), members))
    ms = interleaved_ms(forms, repeats=config.repeats)
    (plain, population), (plain_whole, whole) = zip(*[iter(ms.values())] * 2, strict=True)
    tokens = TEXTS * config.max_new_tokens
    row = {
        "members": members,
        "tokens_per_second": 1e3 * tokens / whole,
        "unperturbed_tokens_per_second": 1e3 * tokens / plain_whole,
        "prefill_ratio": plain / population,
        "step_ratio": (plain_whole - plain) / (whole - population),
        "ratio": plain_whole / whole,
    }
    print(f"{model.model_type:<12}" + "".join(f"{_format(row[c]):>{len(c) + 2}}" for c in MODEL_COLUMNS), flush=True)
    return row


def measure(name: str, model: Any, params: Any, config: Decode) -> dict[str, Any]:
    """Time one model at all population sizes; the row of `config.members`, with the rows of all sizes under "growth"."""
    rows: list[dict[str, Any]] = []
    main: dict[str, Any] = {}
    for members in sorted({config.members, *config.growth}):
        work, is_main = _work(model, params, config, members=members), members == config.members
        row = _measure_size(work, config, repeats=config.repeats if is_main else -(-config.repeats // 3))
        rows.append(row)
        whole: dict[str, float | None] = {**row}
        if is_main:
            main = whole = row | _measure_main(work, config, row["temporary_bytes"])
        print(f"{name:<12}" + "".join(f"{_format(whole.get(c)):>{len(c) + 2}}" for c in COLUMNS), flush=True)
    return main | {"growth": rows}


def _format(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}" if value < 10 else f"{value:,.0f}"


def _measure_size(work: Work, config: Decode, *, repeats: int) -> dict[str, Any]:
    """Measure the speed of one population and of the unperturbed model."""
    members, prompts, _ = work.prompts.tokens.shape
    tokens = members * prompts * config.max_new_tokens
    es, state = _strategy(work, eggroll.LowRank(config.rank), config.chunk_size)
    forms = {"unperturbed": _unperturbed(work, config.chunk_size), "population": _decoding(work, es, state)}
    ms = interleaved_ms(forms, repeats=repeats)
    return {
        "members": members,
        "tokens_per_second": 1e3 * tokens / ms["population"],
        "unperturbed_tokens_per_second": 1e3 * tokens / ms["unperturbed"],
        "ratio": ms["unperturbed"] / ms["population"],
        "temporary_bytes": _temporary_bytes(work, es, state),
    }


def _measure_main(work: Work, config: Decode, one_chunk: int) -> dict[str, float | None]:
    """Measure the memory of a member, from the temporary bytes of one and of two chunks, and the ratio of dense noise."""
    two_chunks = _temporary_bytes(work, *_strategy(work, eggroll.LowRank(config.rank), 2 * config.chunk_size))
    dense_ratio = None
    if config.dense_repeats:
        dense = _decoding(work, *_strategy(work, eggroll.Dense(), config.chunk_size))
        forms = {"unperturbed": _unperturbed(work, config.chunk_size), "dense": dense}
        ms = interleaved_ms(forms, repeats=config.dense_repeats)
        dense_ratio = ms["unperturbed"] / ms["dense"]
    return {"memory_per_member": (two_chunks - one_chunk) / config.chunk_size, "dense_ratio": dense_ratio}


def _models(config: Decode) -> dict[str, tuple[Any, Any]]:
    """Return name -> configuration and parameters."""
    transformer = transformer_config(layers=config.layers, width=config.width)
    configs: dict[str, hf.Config] = {
        "transformer": dataclasses.replace(transformer, vocab_size=VOCABULARY, tie_word_embeddings=True),
        "rwkv7": RWKV7Config(VOCABULARY, config.width, 4 * config.width, config.layers, 8, 8, 8, 16, head_dim=16),
    }
    return {name: (model, init_params(model, key=jax.random.key(0))) for name, model in configs.items()}


def _work(model: Any, params: Any, config: Decode, *, members: int) -> Work:
    random = np.random.default_rng(0)
    lengths = random.integers(SHORTEST, LONGEST + 1, members * config.prompts)
    texts = [random.integers(0, min(VOCABULARY, model.vocab_size), length) for length in lengths]
    flat = pad_prompts(texts, length=LONGEST)
    prompts = Prompts(*(jnp.asarray(array).reshape(members, config.prompts, LONGEST) for array in flat))
    generator = hf.make_generator(model)

    def function(params: Any, prompts: Prompts) -> Completions:
        return complete(generator, params, prompts, max_new_tokens=config.max_new_tokens, stop_token_ids=())

    return Work(params, function, prompts)


def _strategy(work: Work, perturbation: eggroll.LowRank | eggroll.Dense, chunk: int) -> tuple[Any, Any]:
    """Return the strategy, with its plan, and its state."""
    es = eggroll.EvolutionStrategy(
        None,
        population_size=len(work.prompts.tokens),
        sigma=0.02,
        optimizer=optax.sgd(1.0),
        perturbation=perturbation,
        members_per_batch=1,
        chunk_size=chunk,
    )
    state = es.init(work.params, key=jax.random.key(1))
    es.plan(state, work.prompts, function=work.function)
    return es, state


def _decoding(work: Work, es: eggroll.EvolutionStrategy, state: Any) -> Callable[[], Any]:
    return lambda: es.ask(state).apply(work.function, work.prompts)


def _unperturbed(work: Work, chunk: int) -> Callable[[], Any]:
    """Return the unperturbed decoding of the prompts of a chunk of members as one batch, chunk after chunk."""
    _, prompts, length = work.prompts.tokens.shape
    batches = jax.tree.map(lambda array: array.reshape(-1, chunk * prompts, length), work.prompts)
    decode = jax.jit(lambda params, batches: jax.lax.map(lambda prompts: work.function(params, prompts), batches))
    return lambda: decode(work.params, batches)


def _temporary_bytes(work: Work, es: eggroll.EvolutionStrategy, state: Any) -> int:
    """Return the bytes that the compiler reserves for temporary values of the population's decoding."""
    decode = jax.jit(lambda state, prompts: es.ask(state).apply(work.function, prompts))
    used: Any = decode.lower(state, work.prompts).compile().memory_analysis()
    return used.temp_size_in_bytes
