"""One process of the reinforcement-learning benchmark: a run of ours, or of evosax's Open_ES; or both on a tiny problem.

    python -m eggroll.experiments.bench.rl_sides '{"library": "ours", "seed": 0, ...}'
    python -m eggroll.experiments.bench.rl_sides tiny

Both start from the same parameters of the same policy and are evaluated after every generation on the same held-out episodes,
whose time is not counted. The time includes compilation and generations, not imports.
"""

import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

import eggroll
from eggroll import envs
from eggroll.experiments.bench.timing import advancing, interleaved_ms
from eggroll.experiments.common.memory import peak_mib
from eggroll.experiments.common.run import print_summary
from eggroll.experiments.rl.config import Config
from eggroll.experiments.rl.evolution import make_strategy, next_statistics
from eggroll.experiments.rl.inputs import load
from eggroll.experiments.rl.networks import MLP
from eggroll.experiments.rl.problem import Evaluation, Task
from eggroll.scan import run_scan

Advance = Callable[[int], tuple[Any, envs.ObservationStatistics]]  # generation -> mean parameters and statistics after it


@dataclasses.dataclass(frozen=True)
class Side:
    """Settings of one process."""

    library: str  # "ours" or "evosax"
    seed: int
    env: str
    target: float
    generations: int
    population_size: int
    episodes: int
    sigma: float
    learning_rate: float
    hidden_sizes: tuple[int, ...]

    @property
    def config(self) -> Config:
        """The same as options of `experiments.rl`."""
        return Config(
            env=self.env,
            population_size=self.population_size,
            episodes=self.episodes,
            sigma=self.sigma,
            learning_rate=self.learning_rate,
            hidden_sizes=tuple(self.hidden_sizes),
        )


def run(side: Side) -> dict[str, Any]:
    """Run generations until the mean parameters reach the target.

    Returns:
        seconds and generations to the target (None where it was not reached), members per second, memory in MiB.
    """
    task = load(side.config)
    evaluation = Evaluation(task, episodes=100)
    init_key, run_key, check_key = jax.random.split(jax.random.key(side.seed), 3)
    params = task.init_params(key=init_key)
    evaluation.mean_return(params, envs.initial_statistics(task.environment.observation_shape), key=check_key)  # compiles
    before, reached = peak_mib(), False
    seconds: list[float] = []
    start = time.perf_counter()
    advance = (ours if side.library == "ours" else evosax)(side, task, params, key=run_key)
    prepared = time.perf_counter() - start
    while not reached and len(seconds) < side.generations:
        start = time.perf_counter()
        mean_params, observed = jax.block_until_ready(advance(len(seconds)))
        seconds.append(time.perf_counter() - start)
        key = jax.random.fold_in(check_key, len(seconds))
        reached = evaluation.mean_return(mean_params, observed, key=key) >= side.target
    steady = seconds[2:]  # evosax compiles in its first two generations
    return {
        "seconds": prepared + sum(seconds) if reached else None,
        "generations": len(seconds) if reached else None,
        "members_per_second": side.population_size / statistics.median(steady) if steady else None,
        "peak_mib": peak_mib(),
        "growth_mib": peak_mib() - before,
    }


def ours(side: Side, task: Task, params: Any, *, key: Array) -> Advance:
    """Make the generation of this library: rank-1 noise, Adam, centred ranks."""
    es = make_strategy(side.config, task)
    state, observed = es.init(params, key=key), envs.initial_statistics(task.environment.observation_shape)

    def advance(generation: int) -> tuple[Any, envs.ObservationStatistics]:
        nonlocal state, observed
        state, metrics = es.step(state, observed)
        observed = next_statistics(observed, metrics)
        return state.params, observed

    return advance


class _EvosaxPolicy:
    """The task's network as the policy that evosax calls."""

    def __init__(self, task: Task):
        self._task = task

    def init(self, key: Array, observation: Array, _: Array) -> Any:
        return self._task.network.init(key, observation)

    def apply(self, params: Any, observation: Array, _: Array) -> Array:
        output: Any = self._task.network.apply(params, observation)
        return envs.choose_action(self._task.environment.action_space, output)


def evosax(side: Side, task: Task, params: Any, *, key: Array) -> Advance:
    """Make the generation of evosax: Open_ES with antithetic noise, Adam, centred ranks; ask, eval and tell in one jit."""
    from evosax.algorithms import Open_ES
    from evosax.problems import GymnaxProblem

    problem = GymnaxProblem(side.env, _EvosaxPolicy(task), num_rollouts=side.episodes, use_normalize_obs=True)
    schedule = optax.constant_schedule(side.sigma)
    es = Open_ES(side.population_size, params, optimizer=optax.adam(side.learning_rate), std_schedule=schedule)
    init_key, problem_key, run_key = jax.random.split(key, 3)
    es_params = es.default_params
    state, problem_state = es.init(init_key, params, es_params), problem.init(problem_key)

    @jax.jit
    def step(state, problem_state, key):
        ask_key, eval_key, tell_key = jax.random.split(key, 3)
        population, state = es.ask(ask_key, state, es_params)
        fitness, problem_state, _ = problem.eval(eval_key, population, problem_state)
        state, _ = es.tell(tell_key, population, -fitness, state, es_params)  # it minimises
        return state, problem_state

    def advance(generation: int) -> tuple[Any, envs.ObservationStatistics]:
        nonlocal state, problem_state
        state, problem_state = step(state, problem_state, jax.random.fold_in(run_key, generation))
        number = jnp.asarray(problem_state.obs_counter, jnp.float32)
        observed = envs.ObservationStatistics(number, problem_state.obs_mean, problem_state.obs_var_sum)
        return es.get_mean(state), observed

    return advance


def tiny(*, scan: int = 100, repeats: int = 20) -> dict[str, float]:
    """Time a generation of a tiny problem: a policy of 32 x 32 units fits 8 outputs, 256 members, Adam, centred ranks.

    Args:
        scan: generations of one program.
        repeats: programs of each form, taking turns.

    Returns:
        Medians of milliseconds a generation: `scan_ms` and `evosax_scan_ms` of one program, `train_ms` of `train` with
        `on_device`, without files; their ratios `scan_ratio` (ours over evosax's) and `train_ratio` (`train` over our scan).
    """
    network = MLP((32, 32), 2)
    data_key, init_key, key = jax.random.split(jax.random.key(0), 3)
    batch = jax.random.normal(data_key, (8, 6))
    params = network.init(init_key, batch[:, :4])

    def fitness(params: Any, batch: Array, key: Any) -> Array:
        output: Any = network.apply(params, batch[:, :4])
        return -jnp.square(output - batch[:, 4:]).mean()

    es = eggroll.EvolutionStrategy(fitness, population_size=256, sigma=0.05, optimizer=optax.adam(0.01))
    scanned, trained = (es.init(params, key=key) for _ in range(2))

    def scan_ours(state: Any) -> Any:
        state, _, metrics = run_scan(es, state, batch, count=scan, length=scan)
        return state, metrics

    def train(state: Any) -> Any:
        return eggroll.train(es, state, batch, generations=scan, on_device=scan, progress=False)

    step, theirs = _tiny_evosax(fitness, batch, params, key=key, scan=scan)
    forms = {
        "scan": advancing(scan_ours, scanned),
        "train": advancing(lambda state: (train(state)[0], None), trained),
        "evosax_scan": advancing(step, theirs),
    }
    found = {f"{name}_ms": ms / scan for name, ms in interleaved_ms(forms, repeats=repeats).items()}
    ratios = {"scan_ratio": found["scan_ms"] / found["evosax_scan_ms"], "train_ratio": found["train_ms"] / found["scan_ms"]}
    return ratios | found


def _tiny_evosax(fitness: Callable, batch: Array, params: Any, *, key: Array, scan: int) -> tuple[Callable, Any]:
    """The same by evosax's Open_ES: a compiled scan of ask, evaluation and tell, and its first state."""
    from evosax.algorithms import Open_ES

    schedule = optax.constant_schedule(0.05)
    es = Open_ES(256, params, optimizer=optax.adam(0.01), std_schedule=schedule)
    es_params = es.default_params

    def generation(state: Any, key: Array) -> tuple[Any, Array]:
        ask_key, tell_key = jax.random.split(key)
        population, state = es.ask(ask_key, state, es_params)
        found = jax.vmap(fitness, (0, None, None))(population, batch, None)
        state, _ = es.tell(tell_key, population, -found, state, es_params)  # it minimises
        return state, found.mean()

    @jax.jit
    def run(state: Any) -> tuple[Any, Array]:
        return jax.lax.scan(generation, state, jax.random.split(key, scan))

    return run, es.init(key, params, es_params)


if __name__ == "__main__":
    print_summary(tiny() if sys.argv[1] == "tiny" else run(Side(**json.loads(sys.argv[1]))))
