"""Arguments that cannot take effect are errors, each with the reason; without them, and where they take effect, calls work."""

import re

import jax
import jax.numpy as jnp
import optax
import pytest

import eggroll
from eggroll import zo
from eggroll.kernels.factors import Values
from eggroll.kernels.lowrank_dot.api import lowrank_dot
from eggroll.kernels.lowrank_dot.config import Config
from eggroll.llm import TransformerConfig, complete, init_params, make_generator, memory_plan, pad_prompts

FLOAT32, BFLOAT16 = {"w": jnp.ones((4, 3))}, {"w": jnp.ones((4, 3), jnp.bfloat16)}
MIXED = {"low": jnp.ones((4, 3), jnp.bfloat16), "wide": jnp.ones((4, 3))}
MODEL = TransformerConfig(257, 16, 48, 1, 2, 2, head_dim=8)
PIECES = zo.Blocks(
    lambda resident, batch, key: (resident["w"], ()), lambda own, x, aux: x + own["w"], lambda resident, x, batch: x.sum()
)
SIZES = {"prompts": 1, "prompt_length": 4, "max_new_tokens": 2, "rank": 1, "budget": 1 << 20}


def score(params, batch, key):
    return sum(leaf.astype(jnp.float32).sum() for leaf in jax.tree.leaves(params))


def strategy(fitness=score, **options):
    return eggroll.EvolutionStrategy(fitness, population_size=4, sigma=0.1, optimizer=optax.sgd(0.1), **options)


def start(params=FLOAT32, **options):
    return strategy(**options).init(params, key=jax.random.key(0))


def step(batch=None, **options):
    return strategy(**options).step(start(**options), batch)


def train(**options):
    return eggroll.train(strategy(), start(), generations=1, **options)


def tune(params=FLOAT32, **options):
    return zo.mezo(score, learning_rate=1.0, **options).init(params, key=jax.random.key(0))


def decode(**options):
    prompts, params = pad_prompts([[256, 50]], length=4), init_params(MODEL, key=jax.random.key(0))
    return complete(make_generator(MODEL), params, prompts, max_new_tokens=1, stop_token_ids=(), **options)


def product(**options):
    noise = Values(jnp.ones((2, 1, 4)), jnp.ones((2, 1, 3)))
    return lowrank_dot(jnp.ones((2, 2, 4)), jnp.ones((4, 3)), noise, scale=jnp.ones((2, 2)), rank=1, **options)


ROUNDED = "has no effect: no parameter that evolves is quantised or shorter than float32; leave it out."
REFUSED = {
    "both chunk_size and memory_budget": (
        lambda: strategy(chunk_size=2, memory_budget=1 << 20),
        "memory_budget has no effect with chunk_size, which takes its place; give one of them.",
    ),
    "aux for ask and tell": (
        lambda: strategy(None, aux="sum"),
        "aux has no effect without a fitness function, whose aux it reduces; leave it out.",
    ),
    "members_per_batch without a batch": (
        lambda: step(members_per_batch=2),
        "members_per_batch 2 has no effect without a batch; give one, or leave it out.",
    ),
    "precision of float32": (lambda: start(precision="stochastic"), f"precision 'stochastic' {ROUNDED}"),
    "precision of frozen bfloat16": (
        lambda: start(MIXED, precision="nearest", perturbation=[("low", eggroll.Frozen()), (".*", eggroll.LowRank())]),
        f"precision 'nearest' {ROUNDED}",
    ),
    "precision of a float32 step without gradients": (lambda: tune(precision="nearest"), f"precision 'nearest' {ROUNDED}"),
    "signs of signs": (
        lambda: strategy(perturbation=eggroll.Integer(distribution="rademacher", shift=4, update="sign")),
        "update 'sign' has no effect with rademacher factors, which are signs; leave it out.",
    ),
    "everything frozen": (
        lambda: step(perturbation=eggroll.Frozen()),
        "perturbation freezes every parameter, or the function uses none; at least one must be perturbed.",
    ),
    "plot without a folder": (
        lambda: train(plot=lambda history, folder: None),
        "plot has no effect without run_folder, where it draws; give one, or leave it out.",
    ),
    "words without a line": (
        lambda: train(words=str, progress=False),
        "words has no effect with progress=False, without a progress line; leave one of them out.",
    ),
    "exempt without decay": (
        lambda: zo.Descent(0.1, exempt="norm"),
        "exempt has no effect without weight_decay, from which it exempts parameters; give a weight_decay.",
    ),
    "precision of offloaded blocks": (
        lambda: zo.Offload(zo.mezo(PIECES, learning_rate=1.0, precision="nearest")),
        "precision has no effect on offloaded blocks, which are rounded stochastically; leave it out.",
    ),
    "top_p of greedy completions": (
        lambda: decode(top_p=0.5),
        "top_p has no effect with temperature 0, where the likeliest token is taken; give a temperature.",
    ),
    "precision of a plan without state": (
        lambda: memory_plan(MODEL, dtype=jnp.bfloat16, precision="nearest", **SIZES),
        "precision 'nearest' has no effect without an optimizer's state of short parameters; leave it out.",
    ),
    "precision of a plan of float32": (
        lambda: memory_plan(MODEL, dtype=jnp.float32, precision="nearest", optimizer=optax.sgd(1.0), **SIZES),
        "precision 'nearest' has no effect without an optimizer's state of short parameters; leave it out.",
    ),
    "tiles for the reference": (
        lambda: product(implementation="reference", config=Config(64)),
        "config of lowrank_dot has no effect with implementation 'reference': its tiles are the kernel's.",
    ),
}


@pytest.mark.parametrize("call", REFUSED)
def test_an_argument_without_effect_is_a_clear_error(call):
    function, message = REFUSED[call]
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        function()


ACCEPTED = {
    "precision of bfloat16": lambda: start(BFLOAT16, precision="stochastic"),
    "precision of one short parameter": lambda: start(MIXED, precision="nearest"),
    "precision of bfloat16 without gradients": lambda: tune(BFLOAT16, precision="stochastic"),
    "members_per_batch with a batch": lambda: step(jnp.ones(2), members_per_batch=2),
    "a chunk of more than all members": lambda: step(chunk_size=64),  # a limit that is kept
    "the reference without tiles": lambda: product(implementation="reference"),
    "words, and a line if there is a terminal": lambda: train(words=str),
    "exempt with decay": lambda: zo.Descent(0.1, exempt="norm", weight_decay=0.1),
    "top_p of drawn completions": lambda: decode(top_p=0.5, temperature=1.0, key=jax.random.key(1)),
}


@pytest.mark.parametrize("call", ACCEPTED)
def test_an_argument_that_takes_effect_is_accepted(call):
    ACCEPTED[call]()
