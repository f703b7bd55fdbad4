"""Memory that a population needs to continue texts, computed from shapes alone, before any array is made.

    members at a time = (budget - parameters - state) / (cache + noise + factors + logits of one member), in whole pairs

All sizes come from abstract evaluation of the functions that run later. The result is a lower bound: it leaves out the
temporaries of a layer (attention scores, its slice of the cache, the activations of a prompt), which are small compared with a
long cache of many layers but most of a small model's memory, and the working set of an update, whose state is in place.
`EvolutionStrategy(memory_budget=...)` asks the compiler instead, once the model is loaded.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike

import eggroll
from eggroll.lazy.planning import make_plan
from eggroll.llm.decoding import Prompts, check_sampling, complete
from eggroll.llm.int8 import SCALE, quantise
from eggroll.llm.models.families import Config, family_of, init_params, make_generator
from eggroll.noise.factored import FactoredLeaf
from eggroll.noise.plan import Plan
from eggroll.noise.rules import Spec
from eggroll.update.optimizer import init_masters_and_optimizer


class MemoryPlan(NamedTuple):
    """Bytes of a model and of one member, and how many members fit."""

    model: str  # model_type and dtype
    prompts: int  # texts that a member continues at the same time
    prompt_length: int  # tokens, with padding
    max_new_tokens: int  # tokens of a completion
    rank: int  # of the noise
    parameters: int  # bytes, shared by all members
    state: int  # bytes of the optimizer's state and of float32 masters; 0 without an optimizer
    cache: int  # bytes per member: keys and values, or recurrent states
    noise: int  # bytes per member: as drawn, signs packed
    factors: int  # bytes per member: factors unpacked to numbers, once before the loop over tokens
    logits: int  # bytes per member: of the next token, float32
    budget: int  # bytes for parameters, state and members
    members: int  # most members at a time, even; 0: not even a pair fits

    @property
    def per_member(self) -> int:
        """Bytes that one more member takes."""
        return self.cache + self.noise + self.factors + self.logits

    @property
    def shortage(self) -> int:
        """Bytes that the budget is short of a pair of members; 0 if one fits."""
        return max(0, self.of_a_pair - self.budget)

    @property
    def of_a_pair(self) -> int:
        """Bytes that the smallest population takes."""
        return self.parameters + self.state + 2 * self.per_member

    def table(self) -> str:
        """Return the plan as a table for people."""
        texts = f"{self.prompts} texts of {self.prompt_length} + {self.max_new_tokens} tokens"
        pair = f"a pair needs {format_bytes(self.of_a_pair)}, short by {format_bytes(self.shortage)}"
        rows = [
            ("model", self.model, ""),
            ("parameters", format_bytes(self.parameters), "shared by all members"),
            ("state", format_bytes(self.state), "of the optimizer, and masters"),
            ("cache of a member", format_bytes(self.cache), texts),
            ("noise of a member", format_bytes(self.noise), f"rank {self.rank}, as drawn"),
            ("factors of a member", format_bytes(self.factors), "unpacked for decoding"),
            ("logits of a member", format_bytes(self.logits), "float32"),
            ("a member", format_bytes(self.per_member), "the four above"),
            ("budget", format_bytes(self.budget), ""),
            ("members at a time", f"{self.members:,}", "" if self.members else pair),
        ]
        return "\n".join(f"{name:<22}{value:>16}  {note}".rstrip() for name, value, note in rows)


def memory_plan(
    config: Config,
    *,
    dtype: DTypeLike,
    prompts: int,
    prompt_length: int,
    max_new_tokens: int,
    rank: int,
    budget: int,
    weights: str = "float",
    optimizer: optax.GradientTransformation | None = None,
    precision: str = "master",
) -> MemoryPlan:
    """Compute the memory of a population without making an array.

    Args:
        config: of the model, from `read_config`.
        dtype: of the parameters, floating; the cache has it too.
        prompts: texts that a member continues at the same time, >= 1.
        prompt_length: tokens of a prompt with padding, >= 1.
        max_new_tokens: most tokens of a completion, >= 1.
        rank: of the noise, >= 1.
        budget: bytes for parameters, state and members, >= 1.
        weights: "float", or "int8" for quantised matrices in the blocks.
        optimizer: whose state is counted; None: no state, for inference.
        precision: as of `EvolutionStrategy`; decides whether the state has masters of short parameters.

    Returns:
        The plan; `members` is 0 if not even a pair fits.

    Raises:
        ValueError: a size below 1, a dtype that is not floating, or a model that does not continue texts.
    """
    check_sampling(max_new_tokens=max_new_tokens, temperature=0, top_p=1)
    for name, value in (("prompts", prompts), ("prompt_length", prompt_length), ("rank", rank), ("budget", budget)):
        if value < 1:
            raise ValueError(f"{name} must be an integer >= 1, got {value}.")
    dtype = jnp.dtype(dtype)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"dtype must be a floating one such as float32 or bfloat16, got {dtype}.")
    if precision != "master" and (optimizer is None or (dtype.itemsize >= 4 and weights == "float")):
        raise ValueError(
            f"precision {precision!r} has no effect without an optimizer's state of short parameters; leave it out."
        )
    generator, leaves = make_generator(config), family_of(config).leaves(config)
    params = jax.eval_shape(lambda: init_params(config, key=jax.random.key(0), dtype=dtype))
    if weights == "int8":
        params = jax.eval_shape(lambda params: quantise(leaves, params), params)
    batch = Prompts(*(jax.ShapeDtypeStruct((prompts, prompt_length), kind) for kind in (jnp.int32, bool)))
    logits, cache = jax.eval_shape(
        lambda params, batch: generator.prefill(params, batch.tokens, batch.mask, max_new_tokens), params, batch
    )

    def function(params: Any, prompts: Prompts) -> Any:
        return complete(generator, params, prompts, max_new_tokens=max_new_tokens, stop_token_ids=())

    frozen: list[tuple[str, Spec]] = [(f".*/{SCALE}", eggroll.Frozen())] if weights == "int8" else []
    perturbation: list[tuple[str, Spec]] = [*frozen, (".*", eggroll.LowRank(rank))]
    noise = make_plan(function, params, batch, perturbation=perturbation)

    def make_state(params: Any) -> Any:
        return init_masters_and_optimizer(optimizer, params, perturbation, precision)

    plan = MemoryPlan(
        model=f"{config.model_type}, {dtype}" + (", int8 matrices" if weights == "int8" else ""),
        prompts=prompts,
        prompt_length=prompt_length,
        max_new_tokens=max_new_tokens,
        rank=rank,
        parameters=_bytes(params),
        state=_bytes(jax.eval_shape(make_state, params)) if optimizer else 0,
        cache=_bytes(cache),
        noise=sum(leaf.noise_bytes for leaf in noise.leaves),
        factors=_factor_bytes(noise),
        logits=_bytes(logits),
        budget=budget,
        members=0,
    )
    return plan._replace(members=max(0, (budget - plan.parameters - plan.state) // plan.per_member // 2 * 2))


def _bytes(shapes: Any) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))


def _factor_bytes(plan: Plan) -> int:
    return sum(
        math.prod(leaf.sizes(leaf.stack)) * leaf.values * leaf.dtype.itemsize
        for leaf in plan.leaves
        if isinstance(leaf, FactoredLeaf)
    )


def format_bytes(count: int) -> str:
    """Format bytes in the largest unit that gives at least 1."""
    power = next((power for power in (3, 2, 1) if count >= 1024**power), 0)
    return f"{count:,} B" if power == 0 else f"{count / 1024**power:,.2f} {' KMG'[power]}iB"
