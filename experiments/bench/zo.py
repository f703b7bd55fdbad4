"""Zeroth-order steps: planned memory, plain torch loops, offloaded against resident, forwards per second, many directions.

    memory                   temporaries of a step beyond plain inference, over the parameters (`zeroth_order`)
    torch_ratio              seconds of a step of a real model / those of the same step in torch (`torch_loop`)
    offload_ratio            resident step / offloaded step, for every number of directions: one upload serves all of them
    transfer_ratio           offloaded step with blocks transferred as bfloat16 / as float32, by noise; 64 rows
    forwards_per_second      of every recipe, on the resident model
    lowrank_batched_speedup  16 directions, one after another / all in one pass over a matrix that no cache holds

Compared forms are interleaved in one process. On CPU an "upload" is a copy in memory.
"""

import dataclasses
import importlib.util
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

import eggroll
from eggroll import zo
from eggroll.experiments.bench.memory.zeroth_order import BATCH, SIZES, TOKENS, decoder_pieces, memory_summary
from eggroll.experiments.bench.timing import advancing, interleaved_ms, machine
from eggroll.experiments.common.run import print_summary
from eggroll.experiments.zo.evolution import forwards_of
from eggroll.experiments.zo.torch_loop import SIGMA, TorchLoop
from eggroll.llm.models.leaves import init
from eggroll.llm.models.transformer import leaves
from eggroll.population.evaluate import evaluate
from eggroll.population.layout import PopulationLayout

NOISES: tuple[Literal["normal", "rademacher"], ...] = ("normal", "rademacher")
DIRECTIONS = {"fzoo": 8, "spsa15": 8, "grzo": 8}  # of a step; 1 of the other recipes


@dataclasses.dataclass(frozen=True)
class ZO:
    """Time zeroth-order steps of a stack of blocks x + tanh(x W) V, and 16 low-rank directions of one large matrix."""

    blocks: int = 8
    """Blocks of the stack."""
    width: int = 256
    """Width D; a block has 8 D^2 parameters."""
    tokens: int = 512
    """Rows of x: the compute per upload."""
    directions: tuple[int, ...] = (1, 4, 16)
    """Directions per step; the last gives offload_ratio."""
    matrix: int = 8192
    """Rows and columns of the large matrix; 8192: 256 MiB."""
    rows: int = 1
    """Inputs of every direction to the large matrix."""
    repeats: int = 10
    """Rounds; medians are reported."""
    models: tuple[str, ...] = ("smollm2", "1b")
    """Models whose memory is planned, from shapes: smollm2, 1b, tiny; the first is also timed against torch. None: neither."""


def run(config: ZO) -> None:
    """Run the benchmark; the last line of standard output is JSON."""
    if unknown := sorted({*config.models} - {*SIZES}):
        raise SystemExit(f"error: models must be among {', '.join(SIZES)}, got {', '.join(unknown)}.")
    about = machine()
    print("  ".join(f"{key} {value}" for key, value in about.items()))
    model_parts = {}
    if config.models:
        model_parts = {"memory": memory_summary(config.models), "torch_ratio": _torch_ratios(config)}
    print(f"{'directions':>10}{'resident ms':>13}{'offloaded ms':>14}{'ratio':>8}")
    ratios = {}
    for count in config.directions:
        times = interleaved_ms(_make_both_steps(config, count), repeats=config.repeats)
        ratios[str(count)] = ratio = times["resident"] / times["offloaded"]
        print(f"{count:>10}{times['resident']:>13.1f}{times['offloaded']:>14.1f}{ratio:>8.3f}", flush=True)
    times = interleaved_ms(_transfers(config), repeats=config.repeats)
    transfers = {noise: times[f"{noise} bfloat16"] / times[f"{noise} float32"] for noise in NOISES}
    print(
        "blocks as bfloat16 / float32: " + "  ".join(f"{noise} {ratio:.2f}" for noise, ratio in transfers.items()), flush=True
    )
    steps = {name: _make_step(tuner, config) for name, tuner in _recipes().items()}
    times = interleaved_ms(steps, repeats=config.repeats)
    rates = {name: 1e3 * forwards_of(tuner) / times[name] for name, tuner in _recipes().items()}
    print("  ".join(f"{name} {rate:,.0f} forwards/s" for name, rate in rates.items()))
    times = interleaved_ms(_batched(config), repeats=config.repeats)
    speedup = times["separate"] / times["batched"]
    apart, together = times["separate"], times["batched"]
    print(f"16 low-rank directions: {apart:.1f} ms one by one, {together:.1f} ms in one pass: {speedup:.2f}x")
    summary = {"offload_ratio": ratios[str(config.directions[-1])], "offload_ratios": ratios, "transfer_ratio": transfers}
    summary |= model_parts | {"forwards_per_second": rates, "lowrank_batched_speedup": speedup}
    print_summary(summary | {"config": dataclasses.asdict(config), "about": about})


def _torch_ratios(config: ZO) -> dict[str, float] | None:
    """Seconds of a step of MeZO, with either noise, and LOZO, ours over torch's with the same noise; None without torch."""
    if any(importlib.util.find_spec(name) is None for name in ("torch", "transformers")):
        print("torch_ratio needs torch and transformers: make parity", flush=True)
        return None
    model, draw = SIZES[config.models[0]], np.random.default_rng(0)
    batch = draw.integers(model.vocab_size, size=(BATCH, TOKENS), dtype=np.int32), np.arange(BATCH, dtype=np.int32)
    params = init(leaves(model), jax.random.key(0))
    loop = TorchLoop(model, *batch)
    noises = {"mezo": eggroll.Dense("rademacher"), "mezo_normal": eggroll.Dense("normal")}
    pieces, rates = decoder_pieces(model), dict[str, Any](learning_rate=1e-6, sigma=SIGMA)
    tuners = {name: zo.mezo(pieces, perturbation=noise, **rates) for name, noise in noises.items()} | {
        "lozo": zo.lozo(pieces, **rates)
    }
    forms: dict[str, Callable[[], object]] = {f"{name} torch": getattr(loop, name) for name in tuners}
    forms |= {name: _stepping(tuner, params, batch) for name, tuner in tuners.items()}
    times = interleaved_ms(forms, repeats=config.repeats)
    ratios = {name: times[name] / times[f"{name} torch"] for name in tuners}
    for name, ratio in ratios.items():
        ours, theirs = times[name] / 1e3, times[f"{name} torch"] / 1e3
        print(f"{name}, {config.models[0]}: {ours:.2f} s a step, {theirs:.2f} s in torch: {ratio:.3f}", flush=True)
    return ratios


def _mean_square(resident: Any, x: jax.Array, batch: jax.Array) -> jax.Array:
    return jnp.mean((x @ resident["head"]) ** 2)


PIECES = zo.Blocks(
    lambda resident, batch, key: (batch * resident["scale"], ()),
    lambda params, x, aux: x + jnp.tanh(x @ params["w"]) @ params["v"],
    _mean_square,
)


def _params(config: ZO) -> Any:
    draw, d = np.random.default_rng(0).normal, config.width
    blocks = {"w": draw(size=(config.blocks, d, 4 * d)), "v": draw(size=(config.blocks, 4 * d, d))}
    blocks = {name: (0.02 * leaf).astype(np.float32) for name, leaf in blocks.items()}
    return {"resident": {"scale": jnp.ones(d), "head": jnp.full((d, 1), 0.1)}, "blocks": blocks}


def _make_step(tuner: Any, config: ZO) -> Callable[[], Any]:
    """Make a function that runs one more step of the stack of blocks."""
    batch = jax.random.normal(jax.random.key(1), (config.tokens, config.width))
    if isinstance(tuner, zo.ZerothOrder):
        if zo.ESTIMATORS[tuner.estimator].per_example:
            batch = batch.reshape(tuner.directions, -1, config.width)
        tuner.plan_of(_params(config), batch)  # the shape of momentum depends on it
    return _stepping(tuner, _params(config), batch)


def _stepping(tuner: Any, params: Any, batch: Any) -> Callable[[], Any]:
    return advancing(lambda state: tuner.step(state, batch), tuner.init(params, key=jax.random.key(0)))


def _make_both_steps(config: ZO, directions: int) -> dict[str, Callable[[], Any]]:
    tuner = zo.mezo(PIECES, learning_rate=1e-6, directions=directions, chunk_directions=1)
    return {"resident": _make_step(tuner, config), "offloaded": _make_step(zo.Offload(tuner), config)}


def _transfers(config: ZO) -> dict[str, Callable[[], Any]]:
    """Steps in which the blocks weigh more than the products."""
    config, forms = dataclasses.replace(config, tokens=64), {}
    for noise in NOISES:
        tuner = zo.mezo(PIECES, learning_rate=1e-6, perturbation=eggroll.Dense(noise))
        forms[f"{noise} float32"] = _make_step(zo.Offload(tuner), config)
        forms[f"{noise} bfloat16"] = _make_step(zo.Offload(tuner, transfer_dtype=jnp.bfloat16), config)
    return forms


def _recipes() -> dict[str, zo.ZerothOrder]:
    return {
        name: make(
            PIECES,
            learning_rate=1e-6,
            directions=DIRECTIONS.get(name, 1),
            chunk_directions=None if name == "grzo" else 1,  # 8 examples, each with an equal part of the tokens
        )
        for name, make in zo.RECIPES.items()
    }


def _batched(config: ZO) -> dict[str, Callable[[], Any]]:
    """16 low-rank directions of one matrix, each with its own inputs: in one pass, and one at a time by the same code."""
    size = config.matrix
    params = {"w": jnp.full((size, size), 1e-3)}
    x = jax.random.normal(jax.random.key(2), (16, config.rows, size))
    product = lambda params, batch, key, _: (batch @ params["w"]).sum()  # noqa: E731
    es = eggroll.EvolutionStrategy(None, population_size=2, sigma=0.1, optimizer=zo.Descent(0.1).transformation())
    plan = es.plan(es.init(params, key=jax.random.key(0)), x[0], function=lambda params, batch: batch @ params["w"])

    def forwards(params: Any, x: jax.Array, first: jax.Array, *, count: int) -> jax.Array:
        key = jax.random.key(0)
        layout = PopulationLayout(count, members_per_batch=1, signs=(1.0,))
        return evaluate(
            product,
            plan,
            params,
            layout=layout,
            batch=x,
            first_pair=first,
            noise_key=key,
            noise_generation=jnp.int32(0),
            sigma=jnp.float32(0.1),
            evaluation_key=key,
        )

    compiled = {count: jax.jit(forwards, static_argnames="count") for count in (1, 16)}
    parts = [x[index : index + 1] for index in range(16)]
    indices = [jnp.int32(index) for index in range(16)]
    return {
        "batched": lambda: compiled[16](params, x, indices[0], count=16),
        "separate": lambda: [compiled[1](params, own, index, count=1) for own, index in zip(parts, indices, strict=True)],
    }
