"""The programs of a generation, compiled from shapes: the one file here that calls the engine.

    plain       vmap of the function over the batch, unperturbed parameters
    evaluate    the population's fitness and its report
    update      coefficients -> new state, the old state donated

Nothing is allocated: strategies get shapes, and the compiler says what a program would take.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

import eggroll
from eggroll import generation
from eggroll.devices.mesh import report_shardings, update_shardings
from eggroll.experiments.bench.memory.described import compile_program
from eggroll.experiments.bench.memory.models import Workload
from eggroll.noise.factored import LowRankLeaf
from eggroll.population.fitness import normalise_fitness


class Usage(NamedTuple):
    """Bytes of a program on one device, as its compiler counts them."""

    arguments: int
    results: int
    aliases: int  # of the results, in the memory of donated arguments
    temporaries: int

    @property
    def peak(self) -> int:
        """Arguments, results and temporaries; the compiler's own peak leaves out temporaries on CPU."""
        return self.arguments + self.results - self.aliases + self.temporaries


def usage(compiled: Any) -> Usage:
    """Read the memory analysis of a compiled program."""
    found = compiled.memory_analysis()
    names = ("argument_size_in_bytes", "output_size_in_bytes", "alias_size_in_bytes", "temp_size_in_bytes")
    return Usage(*(getattr(found, name) for name in names))


def tree_bytes(tree: Any) -> int:
    """Bytes of arrays or shapes on all devices together; keys count as their words."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


@dataclasses.dataclass(frozen=True)
class Generation:
    """A strategy, its plan, and the shapes of its state and batch, ready to be lowered."""

    es: Any
    plan: Any
    state: Any
    batch: Any
    function: Callable

    @property
    def implementation(self) -> str:
        """Implementation of the products, "mosaic_gpu 7/9" if not all are the kernel's."""
        names = [leaf.implementation for leaf in self.plan.leaves if isinstance(leaf, LowRankLeaf)]
        kernels = sum(name != "reference" for name in names)
        return f"mosaic_gpu {kernels}/{len(names)}" if kernels else "reference"

    def program(self, name: str) -> tuple[Any, tuple[Any, ...]]:
        """Return the jitted function called "plain", "evaluate" or "update", and the shapes of its arguments."""
        es, program = self.es, functools.partial(jax.jit, keep_unused=True)  # what a program does not read is in memory too
        if name == "plain":
            return program(jax.vmap(self.function, (None, 0))), (self.state.params, self.batch)
        if name == "evaluate":
            fitness = normalise_fitness(es.fitness, has_aux=False, integers=False)
            evaluate = functools.partial(generation.evaluate_generation, es, self.plan, fitness, es.layout)
            return program(evaluate, out_shardings=report_shardings(es.placement)), (self.state, self.batch)
        shardings = update_shardings(es.placement, self.state)
        places = shardings and shardings[0]
        update = functools.partial(generation.update_parameters, es, self.plan, optimizer=es.optimizer, shardings=places)
        coefficients = jax.ShapeDtypeStruct((es.population_size // 2,), jnp.float32, sharding=_sharding(self.state.sigma))
        return program(update, donate_argnums=0, out_shardings=shardings), (self.state, coefficients)

    def compile(self, name: str, *, platform: str | None = None) -> Any:
        """Compile one program for the devices that the shapes lie on.

        Args:
            name: as for `program`.
            platform: "cpu" or "cuda", for devices that are only described; None: the default device.
        """
        function, shapes = self.program(name)
        if platform is None:
            return function.lower(*shapes).compile()
        return compile_program(function, shapes, platform=platform)

    def run(self, compiled: dict[str, Any], params: Any, batch: Any) -> Any:
        """Run plain inference, or the two programs of a generation; a generation consumes the parameters."""
        if "plain" in compiled:
            return compiled["plain"](params, batch)
        state = self.es.init(params, key=jax.random.key(0))
        report, *_ = compiled["evaluate"](state, batch)
        return compiled["update"](state, report.coefficients)


def make_generation(
    work: Workload,
    *,
    members: int,
    optimizer: optax.GradientTransformation,
    precision: str | eggroll.Feedback,
    implementation: str | None = None,
    device: Any = None,
    mesh: Mesh | None = None,
    specs: Any = None,
) -> Generation:
    """Make a strategy over shapes.

    Args:
        work: the function, its parameters and batch.
        members: population size.
        optimizer: any optax transformation.
        precision: of the update.
        implementation: of the products, as for `LowRank`.
        device: where the shapes lie, possibly a device that is only described; None: on the mesh or the default device.
        mesh: devices that share a generation, as for `EvolutionStrategy`; possibly ones that are only described.
        specs: on a mesh, a `PartitionSpec` for every parameter.
    """
    es = eggroll.EvolutionStrategy(
        work.fitness,
        population_size=members,
        sigma=1e-3,
        optimizer=optimizer,
        perturbation=eggroll.LowRank(implementation=implementation),
        members_per_batch=work.members_per_batch,
        precision=precision,
        mesh=mesh,
    )
    state = jax.eval_shape(lambda params: es.init(params, key=jax.random.key(0)), work.params)
    plan, batch = es.plan(state, work.batch), work.batch
    if mesh is not None:
        state, batch = _on_mesh(es.placement, state, batch, specs)
    elif device is not None:
        state, batch = jax.tree.map(lambda leaf: _put(leaf, SingleDeviceSharding(device)), (state, batch))
    return Generation(es, plan, state, batch, work.fitness)


def _on_mesh(placement: Any, state: Any, batch: Any, specs: Any) -> tuple[Any, Any]:
    """Place a state and a batch with one entry per member as a generation takes them."""
    params = jax.tree.map(lambda leaf, spec: _put(leaf, NamedSharding(placement.mesh, spec)), state.params, specs)
    state = state._replace(params=params)
    per_member = NamedSharding(placement.mesh, PartitionSpec("population"))
    return jax.tree.map(_put, state, placement.shardings(state)), jax.tree.map(lambda leaf: _put(leaf, per_member), batch)


def _put(leaf: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _sharding(leaf: Any) -> Any:
    return getattr(leaf, "sharding", None)
