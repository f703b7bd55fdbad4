"""Memory of a run of evolution, from shapes alone: what its programs need by the compiler's own account.

    peak = state + the largest of    evaluation + encoding of a checkpoint, which is written meanwhile
                                     update, which waits for the checkpoint
                                     check of the unperturbed parameters
                                     comparison with them + encoding

The programs are compiled as a run compiles them, for the chunk of the population that will run, and nothing else is made. What
the interpreter, JAX, orbax and the compiler take is what this process took.
"""

import dataclasses
import functools
import importlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from eggroll import generation
from eggroll.envs import tasks
from eggroll.experiments.common.memory import peak_mib
from eggroll.experiments.reason.config import Config
from eggroll.experiments.reason.evolution import Evolution
from eggroll.experiments.reason.inputs import Inputs, make_sampling
from eggroll.experiments.reason.problem import Problem, Validation
from eggroll.journal.checkpoint import CHUNK, IN_FLIGHT
from eggroll.llm.int8 import quantise
from eggroll.llm.memory import MemoryPlan, format_bytes
from eggroll.llm.models.families import family_of, init_params


class RunMemory(NamedTuple):
    """Bytes of a run; `members_at_a_time` is the chunk of the population that is evaluated at a time."""

    shapes: MemoryPlan
    population_size: int
    members_at_a_time: int
    parameters: int  # shared by all members
    state: int  # the optimizer's state and float32 masters
    evaluation: int  # temporaries of an evaluation
    per_member: int  # of them, for one more member at a time
    update: int  # temporaries of an update: blocks of the gradient and of the new parameters
    check: int  # temporaries of the completions of held-out problems
    comparison: int  # temporaries of those of the unperturbed model for the problems of a generation
    encoding: int  # of a checkpoint, while it is written: copies of chunks, and of those that the cores encode the results
    runtime: int  # interpreter, JAX, orbax and the compiler: the resident memory of this process
    budget: int  # for everything but the runtime

    def needed(self, members: int) -> int:
        """Bytes that a run with this many members at a time needs, excluding the runtime."""
        evaluation = self.evaluation + (members - self.members_at_a_time) * self.per_member
        waiting = max(evaluation, self.comparison) + self.encoding
        return self.parameters + self.state + max(waiting, self.update, self.check)

    @property
    def members(self) -> int:
        """Most members at a time in the budget, even; 0: not even a pair fits."""
        if self.shortage:
            return 0
        room = self.budget - self.parameters - self.state - self.encoding - self.evaluation
        return self.members_at_a_time + room // self.per_member // 2 * 2

    @property
    def peak(self) -> int:
        """Bytes of the run, without the runtime."""
        return self.needed(self.members_at_a_time)

    @property
    def shortage(self) -> int:
        """Bytes that the budget is short of the smallest run, a pair at a time; 0 if one fits."""
        return max(0, self.needed(2) - self.budget)

    def summary(self) -> dict[str, Any]:
        """Return all numbers, JSON values."""
        own = {name: value for name, value in self._asdict().items() if name != "shapes"}
        return self.shapes._asdict() | own | {"peak": self.peak, "members": self.members, "shortage": self.shortage}

    def table(self) -> str:
        """Return the plan as a table for people."""
        shapes = self.shapes
        texts = f"{shapes.prompts} texts of {shapes.prompt_length} + {shapes.max_new_tokens} tokens each"
        pair = f"a pair needs {format_bytes(self.needed(2))}, short by {format_bytes(self.shortage)}"
        rows = [
            ("parameters", self.parameters, f"of {shapes.model}, shared by all members"),
            ("state", self.state, "of the optimizer, and masters"),
            ("evaluation", self.evaluation, f"{self.members_at_a_time:,} members at a time, {texts}"),
            ("of it a member", self.per_member, "and the rest once; lower bounds from sizes alone are"),
            ("  cache", shapes.cache, "keys and values, or recurrent states"),
            ("  noise and factors", shapes.noise + shapes.factors, f"rank {shapes.rank}"),
            ("  logits", shapes.logits, "float32"),
            ("update", self.update, "blocks of the gradient and of the new parameters"),
            ("check", self.check, "completions of held-out problems"),
            ("comparison", self.comparison, "completions of the unperturbed model, next to the members'"),
            ("checkpoint", self.encoding, "encoded at a time, while it is written during an evaluation"),
            ("a run", self.peak, "parameters, state, and what is largest at a time of the others"),
            ("runtime", self.runtime, "in addition: Python, JAX, orbax and the compiler, measured here"),
            ("budget", self.budget, "without the runtime"),
        ]
        lines = [f"{name:<22}{format_bytes(value):>16}  {note}" for name, value, note in rows]
        lines.append(f"{'members at a time':<22}{self.members:>16,}  {'' if self.members else pair}".rstrip())
        return "\n".join(lines)


def run_memory(config: Config, inputs: Inputs, shapes: MemoryPlan) -> RunMemory:
    """Compile the programs of a run from shapes; return what they need.

    Args:
        config: of the run.
        inputs: everything but the weights.
        shapes: what is known from the sizes of the model.
    """
    sampling = make_sampling(config, inputs.tokenizer)
    problem = Problem(Path(), inputs.model, _no_weights, *inputs[1:], scorer=tasks.Scorer(inputs.task.reward, workers=0))
    evolution = Evolution(dataclasses.replace(config, memory_budget=None), problem, sampling)  # here it is of a whole run
    es: Any = evolution.strategy.es
    params = jax.eval_shape(functools.partial(_params, config, inputs))
    state = jax.eval_shape(lambda params: evolution.strategy.init(params, key=jax.random.key(0)), params)
    batch, _ = evolution.questions(0, seed=config.seed)
    plan = es.plan(state, batch, function=evolution.strategy.function)

    def evaluation(pairs: int) -> int:
        layout = es.layout if pairs == es.layout.num_pairs else dataclasses.replace(es.layout, chunk_pairs=pairs)
        evaluate = functools.partial(generation.apply_to_members, es, plan, evolution.strategy.function, layout)
        return _temporaries(evaluate, state, batch)

    chunk = es.layout.chunk_pairs or es.layout.num_pairs
    fewer = max(1, chunk // 2)
    needs = evaluation(chunk), evaluation(fewer) if fewer < chunk else 0
    per_member = max(1, (needs[0] - needs[1]) // (2 * (chunk - fewer)) if fewer < chunk else needs[0] // 2)
    importlib.import_module("orbax.checkpoint")  # which a run imports, for the runtime
    coefficients = jax.ShapeDtypeStruct((config.population_size // 2,), jnp.float32)
    update = functools.partial(generation.update_parameters, es, plan, optimizer=es.optimizer)
    check = Validation(problem, "validation", size=config.validation_size, sampling=sampling)
    complete: Any = evolution.strategy.complete
    whole = _bytes(state)
    return RunMemory(
        shapes=shapes,
        population_size=config.population_size,
        members_at_a_time=2 * chunk,
        parameters=_bytes(params),
        state=whole - _bytes(params),
        evaluation=needs[0],
        per_member=per_member,
        update=_temporaries(update, state, coefficients, donate_argnums=0),
        check=check.compile(params).memory_analysis().temp_size_in_bytes,
        comparison=complete.lower(params, batch).compile().memory_analysis().temp_size_in_bytes,
        encoding=min(whole, IN_FLIGHT) + min(whole, IN_FLIGHT, CHUNK * (os.cpu_count() or 1)),
        runtime=round(peak_mib() * 2**20),
        budget=shapes.budget,
    )


def _no_weights() -> Any:
    raise AssertionError("a plan reads no weights.")


def _params(config: Config, inputs: Inputs) -> Any:
    params = init_params(inputs.model, key=jax.random.key(0), dtype=jnp.dtype(config.dtype if config.model else "float32"))
    return quantise(family_of(inputs.model).leaves(inputs.model), params) if config.weights == "int8" else params


def _temporaries(function: Callable, *shapes: Any, **options: Any) -> int:
    account: Any = jax.jit(function, **options).lower(*shapes).compile().memory_analysis()
    return account.temp_size_in_bytes


def _bytes(shapes: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))
