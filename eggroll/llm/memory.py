"""Memory of a population that continues texts, before anything is made: from shapes alone.

    members at a time = (budget - parameters) / (cache + noise + factors + logits of one member), rounded down to whole pairs

Everything is read by abstract evaluation of the functions that run later, and is a lower bound. Not counted: what a layer
computes on its way (its scores, its part of the cache, the activations of a prompt), little beside a long cache of many layers,
but most of a small model's memory; and what an update adds to the parameters (gradient and masters in float32, the optimizer's
state). `EvolutionStrategy(memory_budget=...)` asks the compiler, once the model is there.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

import eggroll
from eggroll.lazy.planning import make_plan
from eggroll.llm import hf
from eggroll.llm.decoding import Prompts, check_sampling, complete
from eggroll.llm.int8 import SCALE, quantise
from eggroll.llm.models.families import family_of
from eggroll.llm.models.leaves import init
from eggroll.noise.plan import Plan


class MemoryPlan(NamedTuple):
    """Bytes of a model and of one member, and how many members fit."""

    model: str  # model_type and dtype
    prompts: int  # texts a member continues at the same time
    prompt_length: int  # tokens, with padding
    room: int  # tokens that may follow
    rank: int  # of the noise
    parameters: int  # bytes, once for all members
    cache: int  # bytes a member: keys and values, or states
    noise: int  # bytes a member: as it is drawn, signs packed
    factors: int  # bytes a member: signs of the factors as numbers, which are unpacked once before the loop over tokens
    logits: int  # bytes a member: of the next token, float32
    budget: int  # bytes that all of it has
    members: int  # most members at a time, even; 0: not even a pair

    @property
    def per_member(self) -> int:
        """Bytes that a further member takes."""
        return self.cache + self.noise + self.factors + self.logits

    def table(self) -> str:
        """A readable table."""
        texts = f"{self.prompts} texts of {self.prompt_length} + {self.room} tokens"
        pair = self.parameters + 2 * self.per_member
        rows = [
            ("model", self.model, ""),
            ("parameters", _readable(self.parameters), "shared by all members"),
            ("cache of a member", _readable(self.cache), texts),
            ("noise of a member", _readable(self.noise), f"rank {self.rank}, as drawn"),
            ("factors of a member", _readable(self.factors), "unpacked while it decodes"),
            ("logits of a member", _readable(self.logits), "float32"),
            ("a member", _readable(self.per_member), "all of these"),
            ("budget", _readable(self.budget), ""),
            ("members at a time", f"{self.members:,}", "" if self.members else f"a pair needs {_readable(pair)}"),
        ]
        return "\n".join(f"{name:<22}{value:>16}  {note}".rstrip() for name, value, note in rows)


def memory_plan(
    config: hf.Config,
    *,
    dtype: DTypeLike,
    prompts: int,
    prompt_length: int,
    room: int,
    rank: int,
    budget: int,
    weights: str = "float",
) -> MemoryPlan:
    """Compute what a population needs, without making an array.

    Args:
        config: of the model, as `hf.read_config` gives it.
        dtype: of the parameters, floating; the cache follows it.
        prompts: texts a member continues at the same time, >= 1.
        prompt_length: tokens of a prompt with padding, >= 1.
        room: most tokens that follow, >= 1.
        rank: of the noise, >= 1.
        budget: bytes for parameters and members, >= 1.
        weights: "int8" where the matrices of the blocks are.

    Returns:
        The plan; its `members` is 0 where not even a pair fits.

    Raises:
        ValueError: a size below 1, a dtype that is not floating, or a model that does not continue texts.
    """
    check_sampling(room=room, temperature=0, top_p=1)
    for name, value in (("prompts", prompts), ("prompt_length", prompt_length), ("rank", rank), ("budget", budget)):
        if value < 1:
            raise ValueError(f"{name} must be an integer >= 1, got {value}.")
    dtype = jnp.dtype(dtype)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"dtype must be a floating one such as float32 or bfloat16, got {dtype}.")
    generator, leaves = hf.generator(config), family_of(config).leaves(config)
    params = jax.eval_shape(lambda: init(leaves, jax.random.key(0), dtype))
    if weights == "int8":
        params = jax.eval_shape(lambda params: quantise(leaves, params), params)
    texts = Prompts(*(jax.ShapeDtypeStruct((prompts, prompt_length), kind) for kind in (jnp.int32, bool)))
    logits, cache = jax.eval_shape(lambda params, tokens, mask: generator.prefill(params, tokens, mask, room), params, *texts)

    def function(params: Any, texts: Prompts) -> Any:
        return complete(generator, params, texts, room=room, ending=())

    fixed = [(f".*/{SCALE}", eggroll.Frozen())] if weights == "int8" else []
    noise = make_plan(function, params, texts, perturbation=[*fixed, (".*", eggroll.LowRank(rank))])
    plan = MemoryPlan(
        model=f"{config.model_type}, {dtype}" + (", int8 matrices" if weights == "int8" else ""),
        prompts=prompts,
        prompt_length=prompt_length,
        room=room,
        rank=rank,
        parameters=_bytes(params),
        cache=_bytes(cache),
        noise=sum(leaf.noise_bytes for leaf in noise.leaves),
        factors=_factor_bytes(noise),
        logits=_bytes(logits),
        budget=budget,
        members=0,
    )
    return plan._replace(members=max(0, (budget - plan.parameters) // plan.per_member // 2 * 2))


def _bytes(shapes: Any) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))


def _factor_bytes(plan: Plan) -> int:
    return sum(math.prod(leaf.sizes(leaf.stack)) * leaf.values * leaf.dtype.itemsize for leaf in plan.leaves if leaf.factored)


def _readable(count: int) -> str:
    """Bytes in the largest unit that leaves at least 1."""
    power = next((power for power in (3, 2, 1) if count >= 1024**power), 0)
    return f"{count:,} B" if power == 0 else f"{count / 1024**power:,.2f} {' KMG'[power]}iB"
