"""Where a generation's time beyond inference goes: forms that contain each other, timed in turns.

    inference    the members' inputs through unperturbed parameters, in the same chunks
    given        the same with the engine's corrections, the noise of all pairs being an argument
    forward      the same with the noise drawn from its addresses
    generation   the same with the fitness shaped and the parameters updated

`given` is the floor of the formula on this machine: what XLA needs for two small products, a multiply and an add in each layer
and a bias for each member, with nothing drawn and nothing updated. A goal above its ratio cannot be reached by drawing or
updating faster.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import eggroll
from eggroll.experiments.bench.cases import CASES, Case, check_cases
from eggroll.experiments.bench.engine import engine_forms, inference_form, start
from eggroll.experiments.bench.timing import interleaved_ms, machine
from eggroll.experiments.common.run import print_summary
from eggroll.lazy.hoisting import hoist_transposes
from eggroll.lazy.interpret import apply_perturbed
from eggroll.noise.addresses import Distribution, Factors
from eggroll.noise.draws import draw_pair
from eggroll.noise.plan import Plan
from eggroll.population.members import member_params

FORMS = ("inference", "given", "forward", "generation")


@dataclasses.dataclass(frozen=True)
class Floor:
    """Time a generation in parts, as forms that contain each other, next to inference in the same chunks."""

    cases: tuple[str, ...] = tuple(CASES)
    """Cases to run: mlp8, mlp128, transformer, policy."""
    repeats: int = 15
    """Rounds; the medians are reported."""
    distribution: Distribution = "rademacher"
    """Distribution of the factors: rademacher or normal."""
    rank: int = 1
    """Rank of the perturbation."""


def run(config: Floor) -> None:
    """Run the benchmark; the last line of standard output is JSON."""
    check_cases(config.cases)
    about = machine()
    print("  ".join(f"{key} {value}" for key, value in about.items()))
    print(f"{'case':<12}" + "".join(f"{f'{form} ms':>15}{'ratio':>8}" for form in FORMS), flush=True)
    results = {}
    for name in config.cases:
        results[name] = row = measure(CASES[name](), eggroll.LowRank(config.rank, config.distribution), config.repeats)
        print(f"{name:<12}" + "".join(f"{row[f'{form}_ms']:>15.2f}{row[f'{form}_ratio']:>8.2f}" for form in FORMS), flush=True)
    print_summary(results | {"about": about | {"distribution": config.distribution, "rank": config.rank}})


def measure(case: Case, spec: eggroll.LowRank, repeats: int) -> dict[str, float]:
    """Milliseconds of every form, and inference divided by it."""
    engine = engine_forms(case, spec, chunk_size=case.chunk_size)
    forms = {"inference": inference_form(case, case.chunk_size), "given": given_form(case, spec), **engine}
    times = interleaved_ms({name: forms[name] for name in FORMS}, repeats=repeats)
    ratios = {f"{name}_ratio": times["inference"] / ms for name, ms in times.items()}
    return {f"{name}_ms": ms for name, ms in times.items()} | ratios


def given_form(case: Case, spec: eggroll.LowRank) -> Callable[[], Any]:
    """The perturbed forward with the noise of all pairs as an argument."""
    es, state = start(case, spec, chunk_size=case.chunk_size)
    plan, layout, signs = es.plan(state), es.layout, jnp.asarray([1.0, -1.0])

    @jax.jit
    def forward(params: Any, noise: list, batch: Any, sigma: jax.Array) -> Any:
        def evaluate_pair(inputs: tuple[list, Any]) -> Any:
            own_noise, own_batch = inputs

            def evaluate_member(sign: jax.Array, x: Any) -> Any:
                return apply_perturbed(case.function, member_params(plan, params, own_noise, sign=sign, sigma=sigma), x)

            return jax.vmap(evaluate_member)(signs, own_batch)

        def evaluate_all(inputs: tuple[list, Any]) -> Any:
            if layout.is_chunked:
                return jax.lax.map(evaluate_pair, inputs, batch_size=layout.chunk_pairs)
            return jax.vmap(evaluate_pair)(inputs)

        return hoist_transposes(evaluate_all)((noise, batch.reshape(-1, 2, *batch.shape[1:])))

    noise = _draw_all(plan, state, layout.num_pairs)
    return lambda: forward(case.params, noise, case.batch, state.sigma)


def _draw_all(plan: Plan, state: eggroll.ESState, num_pairs: int) -> list:
    """The noise of all pairs, unpacked."""

    def draw(pair: jax.Array) -> list:
        drawn = zip(plan.leaves, draw_pair(plan, state.key, state.generation, pair), strict=True)
        return [_unpacked(own, leaf.noise_dtype) if isinstance(own, Factors) else own for leaf, own in drawn]

    return jax.jit(jax.vmap(draw))(jnp.arange(num_pairs, dtype=jnp.int32))


def _unpacked(factors: Factors, dtype: Any) -> Factors:
    left, right = factors.unpack(dtype)
    return dataclasses.replace(factors, left=left, right=right, words=None)
