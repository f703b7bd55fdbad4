"""A population that continues prompts, against the unperturbed model that continues all of its prompts as one batch.

    ratio = time of unperturbed decoding / time of `es.ask(state).apply(complete, prompts)`

Greedy and without an ending token, so that both make the same number of tokens; the noise is drawn inside what is timed. Both
run in the same chunks of members, interleaved in one process. Memory is the compiler's own account of temporary values.
"""

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import eggroll
from eggroll.experiments.bench.timing import interleaved_ms, machine
from eggroll.experiments.common.run import print_summary
from eggroll.experiments.egg.models.byte_models import transformer_config
from eggroll.llm import hf
from eggroll.llm.decoding import Completions, Prompts, complete, pad_prompts
from eggroll.llm.models.families import family_of
from eggroll.llm.models.leaves import init
from eggroll.llm.models.rwkv7 import RWKV7Config

VOCABULARY = 257  # bytes, and a token that ends a text
SHORTEST, LONGEST = 4, 8  # tokens of a prompt
OF_EVERY_SIZE = ("members", "tokens_per_second", "unperturbed_tokens_per_second", "ratio", "temporary_bytes")
COLUMNS = (*OF_EVERY_SIZE, "memory_per_member", "dense_ratio")  # the last two of `members` only


@dataclasses.dataclass(frozen=True)
class Decode:
    """Time how fast a population continues prompts, as a ratio to the unperturbed model on the same prompts."""

    members: int = 256
    """Members of the population."""
    growth: tuple[int, ...] = (64, 1024)
    """Further populations, to see how speed and memory grow; their rounds are a third of the others."""
    prompts: int = 8
    """Prompts a member, of 4 to 8 tokens."""
    room: int = 24
    """Tokens that follow every prompt."""
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
    """Rounds of the dense form, which is slow; 0 leaves it out."""
    model: Path | None = None
    """A folder in the Hugging Face layout to time instead of the random models."""


class Work(NamedTuple):
    """What is timed: a model and what it continues."""

    params: Any
    function: Callable[[Any, Prompts], Completions]  # of one member
    prompts: Prompts  # [N, B, T], every member's own


def run(config: Decode) -> None:
    """Run the benchmark; the last line of standard output is JSON."""
    about = machine() | {"cores": len(os.sched_getaffinity(0)), "load": round(os.getloadavg()[0], 1)}
    about |= {"rounds": config.repeats, "rank": config.rank}
    print("  ".join(f"{key} {value}" for key, value in about.items()))
    print(f"{'model':<12}" + "".join(f"{column:>{len(column) + 2}}" for column in COLUMNS), flush=True)
    try:
        _check(config)
        results = {name: measure(name, *model, config) for name, model in _models(config).items()}
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
    print_summary(results | {"about": about})


def _check(config: Decode) -> None:
    for name in ("chunk_size", "prompts", "repeats", "layers"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name} must be an integer >= 1, got {getattr(config, name)}.")
    for members in (config.members, *config.growth):
        if members < 1 or members % (2 * config.chunk_size):
            raise ValueError(f"members must be a multiple of twice chunk_size {config.chunk_size}, got {members}.")


def measure(name: str, model: Any, params: Any, config: Decode) -> dict[str, Any]:
    """Time one model at all sizes of the population; numbers of `config.members`, and of every size under "growth"."""
    rows: list[dict[str, Any]] = []
    main: dict[str, Any] = {}
    for members in sorted({config.members, *config.growth}):
        work, is_main = _work(model, params, config, members=members), members == config.members
        row = _row(work, config, repeats=config.repeats if is_main else -(-config.repeats // 3))
        rows.append(row)
        more = _of_main(work, config, row["temporary_bytes"]) if is_main else {}
        main |= row | more if is_main else {}
        print(f"{name:<12}" + "".join(f"{_cell((row | more).get(c)):>{len(c) + 2}}" for c in COLUMNS), flush=True)
    return main | {"growth": rows}


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}" if value < 10 else f"{value:,.0f}"


def _row(work: Work, config: Decode, *, repeats: int) -> dict[str, Any]:
    """Speed of one population beside the unperturbed model's."""
    members, prompts, _ = work.prompts.tokens.shape
    tokens = members * prompts * config.room
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


def _of_main(work: Work, config: Decode, one_chunk: int) -> dict[str, float | None]:
    """What is measured of one population only: memory of a member, beside that of one chunk, and the dense form."""
    two_chunks = _temporary_bytes(work, *_strategy(work, eggroll.LowRank(config.rank), 2 * config.chunk_size))
    dense_ratio = None
    if config.dense_repeats:
        dense = _decoding(work, *_strategy(work, eggroll.Dense(), config.chunk_size))
        forms = {"unperturbed": _unperturbed(work, config.chunk_size), "dense": dense}
        ms = interleaved_ms(forms, repeats=config.dense_repeats)
        dense_ratio = ms["unperturbed"] / ms["dense"]
    return {"memory_per_member": (two_chunks - one_chunk) / config.chunk_size, "dense_ratio": dense_ratio}


def _models(config: Decode) -> dict[str, tuple[Any, Any]]:
    """Name -> configuration and parameters."""
    if config.model is not None:
        found, _, params = hf.load(config.model)
        return {found.model_type: (found, params)}
    transformer = transformer_config(layers=config.layers, width=config.width)
    sizes = (config.width, 4 * config.width, config.layers)
    configs: dict[str, Any] = {
        "transformer": dataclasses.replace(transformer, vocab_size=VOCABULARY, tie_word_embeddings=True),
        "rwkv7": RWKV7Config(VOCABULARY, *sizes, 8, 8, 8, 16, head_dim=16),
    }
    return {name: (own, init(family_of(own).leaves(own), jax.random.key(0))) for name, own in configs.items()}


def _work(model: Any, params: Any, config: Decode, *, members: int) -> Work:
    random = np.random.default_rng(0)
    lengths = random.integers(SHORTEST, LONGEST + 1, members * config.prompts)
    texts = [random.integers(0, min(VOCABULARY, model.vocab_size), length) for length in lengths]
    flat = pad_prompts(texts, length=LONGEST)
    prompts = Prompts(*(jnp.asarray(array).reshape(members, config.prompts, LONGEST) for array in flat))
    generator = hf.generator(model)

    def function(params: Any, prompts: Prompts) -> Completions:
        return complete(generator, params, prompts, room=config.room, ending=())

    return Work(params, function, prompts)


def _strategy(work: Work, perturbation: eggroll.LowRank | eggroll.Dense, chunk: int) -> tuple[Any, Any]:
    """The strategy, its plan made, and its state."""
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
    """The model itself, on the prompts of a chunk of members as one batch, chunk after chunk."""
    _, prompts, length = work.prompts.tokens.shape
    batches = jax.tree.map(lambda array: array.reshape(-1, chunk * prompts, length), work.prompts)
    every = jax.jit(lambda params, batches: jax.lax.map(lambda own: work.function(params, own), batches))
    return lambda: every(work.params, batches)


def _temporary_bytes(work: Work, es: eggroll.EvolutionStrategy, state: Any) -> int:
    """What the compiler sets aside for the population's evaluation beside its arguments and results."""
    es.ask(state).apply(work.function, work.prompts)
    evaluate = es._cache["apply", work.function]
    return evaluate.lower(state, work.prompts).compile().memory_analysis().temp_size_in_bytes
