"""Runs on meshes of the 8 virtual devices, and the same runs on one device, the oracle; `test_mesh.py` judges them."""

import functools
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import eggroll
from eggroll import programs
from eggroll.devices import pieces
from eggroll.experiments.bench.collectives import collective_bytes, largest_collective
from eggroll.journal.checkpoint import Checkpoints
from eggroll.runs.durable import DurableRun

PARAMS = {"w": 0.3 * jax.random.normal(jax.random.key(1), (4, 8)), "b": jnp.zeros(8)}
X = jax.random.normal(jax.random.key(2), (8, 4))


def model(params, x):
    return jnp.tanh(x @ params["w"] + params["b"])


def fitness(params, batch, key):
    return -jnp.mean((model(params, batch) - 1.0) ** 2)


def recurrent(params, batch, key, memory):
    memory = memory + batch.mean(axis=0) @ params["w"]
    return jnp.sum(memory + params["b"]), memory


def mesh(**sizes):
    count = int(np.prod(list(sizes.values())))
    return Mesh(np.array(jax.devices()[:count]).reshape(*sizes.values()), tuple(sizes))


def strategy(on=None, function=fitness, **options):
    options = dict(population_size=32, sigma=0.1, optimizer=optax.sgd(0.5, momentum=0.9)) | options
    return eggroll.EvolutionStrategy(function, mesh=on, **options)


def start(es, params=PARAMS, **options):
    return es.init(params, key=jax.random.key(0), **options)


def steps(es, state, batch=X, *, count=1):
    for _ in range(count):
        state, metrics = es.step(state, batch)
    return state, metrics


def difference(tree, reference):
    """Largest difference of a leaf, relative to its largest entry."""
    pairs = [map(np.float64, pair) for pair in zip(jax.tree.leaves(tree), jax.tree.leaves(reference), strict=True)]
    return max(float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-30)) for a, b in pairs)


def same(tree, reference):
    pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(reference), strict=True)
    return all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in pairs)


@functools.cache
def problem(name):
    """A fitness with its options, batch and initial state; and two generations of it on one device."""
    function, options, batch, init = PROBLEMS[name]
    es = strategy(None, function, **options)
    first = steps(es, start(es, **init), batch)
    return function, options, batch, init, (first, steps(es, eggroll.copy_state(first[0]), batch))


def against_one_device(on, name="plain", *, count=1, **mesh_options):
    function, options, batch, init, expected = problem(name)
    es = strategy(on, function, **options | mesh_options)
    state, metrics = steps(es, start(es, **init), batch, count=count)
    wanted, reference = expected[count - 1]
    if [*es.checksums(state).values()] != metrics.checksums[1].tolist():
        raise AssertionError("the update reports other checksums than the state has.")
    if count == 1 and metrics.checksums[0].tolist() != reference.checksums[0].tolist():
        raise AssertionError("the same state has other checksums on the mesh than on one device.")
    numbers = {"fitness": difference(metrics.fitness, reference.fitness), "update": difference(state.params, wanted.params)}
    numbers["momentum"] = difference(state.opt_state, wanted.opt_state)
    if any(master is not None for master in state.masters):
        numbers["masters"] = difference(state.masters, wanted.masters)
    if state.member_state is not None:
        numbers["member_state"] = difference(state.member_state, wanted.member_state)
    if metrics.aux is not None:
        numbers["aux"] = difference(metrics.aux, reference.aux)
    return numbers


def per_member_batch(size):
    return jax.random.normal(jax.random.key(5), (size, 6, 4))


MEMORY = {"member_state": jnp.ones(8)}


def with_aux(params, batch, key):
    outputs = model(params, batch)
    total, mean = (outputs**2).sum(), outputs.mean()
    aux = {"sum": total, "mean": mean, "max": outputs.max(), "min": outputs.min(), "all": mean}
    return fitness(params, batch, key), aux | {"short": jnp.float16(40000)}  # of which two are too many for float16


def quantised(params, batch, key):
    return -jnp.mean((jnp.tanh((batch @ params["w"].astype(batch.dtype)) * params["s"]) - 1.0) ** 2)


QUANTISED = {"w": jnp.asarray(np.random.default_rng(0).integers(-99, 100, (4, 8)), jnp.int8), "s": jnp.full(8, 0.02)}
ON_INTEGERS = dict(sigma=0.4, perturbation=[("s", eggroll.Frozen()), (".*", eggroll.LowRank())])
FED_BACK = ON_INTEGERS | dict(optimizer=optax.sgd(5.0), precision=eggroll.Feedback(3))
ON_INTEGERS["optimizer"] = optax.sgd(5.0, momentum=0.9)
RULES = [("b", eggroll.Frozen()), (".*", eggroll.LowRank(2, "normal"))]
PROBLEMS = {
    "plain": (fitness, {}, X, {}),
    "11 pairs": (fitness, dict(population_size=22), X, {}),
    "batch per member": (fitness, dict(members_per_batch=1), per_member_batch(32), {}),
    "batch per group": (fitness, dict(members_per_batch=4), per_member_batch(8), {}),
    "member state": (recurrent, dict(shaping="z_score"), X, MEMORY),
    "member state, 11 pairs": (recurrent, dict(population_size=22, members_per_batch=1), per_member_batch(22), MEMORY),
    "aux": (with_aux, dict(aux={name: name for name in ("sum", "mean", "max", "min", "all")} | {"short": "mean"}), X, {}),
    "rules": (fitness, dict(perturbation=RULES), X, {}),
    "quantised": (quantised, ON_INTEGERS, X, {"params": QUANTISED}),
    "fed back": (quantised, FED_BACK, X, {"params": QUANTISED}),
}
EQUAL = {
    "population 1": lambda: against_one_device(mesh(population=1)),
    "population 2": lambda: against_one_device(mesh(population=2)),
    "population 4, explicit axes": lambda: against_one_device(jax.make_mesh((4,), ("population",), devices=jax.devices()[:4])),
    "population 8, two generations": lambda: against_one_device(mesh(population=8), count=2),
    "population 8, chunks": lambda: against_one_device(mesh(population=8), chunk_size=2),
    "population 4, memory budget": lambda: against_one_device(mesh(population=4), memory_budget=8_000),
    "population 4, data 2, shard_optimizer": lambda: against_one_device(mesh(population=4, data=2), shard_optimizer=True),
    "data 4": lambda: against_one_device(mesh(data=4)),
    "population 1, model 2": lambda: against_one_device(mesh(population=1, model=2)),
    "population 2, data 2, model 2": lambda: against_one_device(mesh(population=2, data=2, model=2)),
    "population 8, 11 pairs": lambda: against_one_device(mesh(population=8), "11 pairs"),
    "population 4, data 2, batch per member": lambda: against_one_device(mesh(population=4, data=2), "batch per member"),
    "population 4, batch per group": lambda: against_one_device(mesh(population=4), "batch per group"),
    "population 8, member state": lambda: against_one_device(mesh(population=8), "member state", count=2),
    "population 8, member state, 11 pairs": lambda: against_one_device(mesh(population=8), "member state, 11 pairs"),
    "population 4, data 2, aux": lambda: against_one_device(mesh(population=4, data=2), "aux"),
    "population 8, rules": lambda: against_one_device(mesh(population=8), "rules"),
    "population 4, data 2, quantised": lambda: against_one_device(mesh(population=4, data=2), "quantised", count=2),
    "population 2, fed back": lambda: against_one_device(mesh(population=2), "fed back", count=2),
    "population 4, data 2, fed back, shard_optimizer": lambda: against_one_device(
        mesh(population=4, data=2), "fed back", count=2, shard_optimizer=True
    ),
}


@functools.cache
def equal(name):
    return EQUAL[name]()


INTEGERS = {
    name: jnp.asarray(np.random.default_rng(0).integers(-30, 30, shape), jnp.int8)
    for name, shape in {"w": (8, 8), "table": (5, 8), "b": (8,)}.items()
}


def integer_recurrent(params, batch, key, memory):
    x = jnp.take(params["table"], batch, axis=0) // 2 + memory // 2
    product = jax.lax.dot_general(x, params["w"], (((0,), (0,)), ((), ())), preferred_element_type=jnp.int32)
    memory = jnp.clip((product >> 6) + params["b"].astype(jnp.int32), -127, 127).astype(jnp.int8)
    return jnp.sum(memory, dtype=jnp.int32), memory


@functools.cache
def integers():
    """Int8 parameters after two generations: the same bits on any number of devices."""

    def run(on=None, **options):
        options = dict(perturbation=eggroll.Integer(2), sigma=None, shaping="z_score", population_size=22) | options
        es = strategy(on, integer_recurrent, optimizer=eggroll.threshold(0.3), **options)
        state, metrics = steps(es, start(es, INTEGERS, member_state=jnp.zeros(8, jnp.int8)), jnp.uint8(3), count=2)
        return state.params, state.member_state, metrics.fitness, metrics.coefficients

    expected = run()
    meshes = {
        "population 4": (mesh(population=4), {}),
        "chunks": (mesh(population=2), {"chunk_size": 4}),
        "shares": (mesh(population=4), {"shard_optimizer": True}),
    }
    found = {name: same(run(on, **options), expected) for name, (on, options) in meshes.items()}
    return found | {"moved": not same(expected[0], INTEGERS), "control": same(run(shaping="pair_sign"), expected)}


@functools.cache
def wrong_weights_of_padded_pairs():
    """The negative control: pairs past P that weigh 1 change the update."""
    right = pieces.pad_coefficients
    pieces.pad_coefficients = lambda coefficients, size: jnp.pad(
        coefficients, (0, size - coefficients.shape[0]), constant_values=1.0
    )
    try:
        return against_one_device(mesh(population=8), "11 pairs")
    finally:
        pieces.pad_coefficients = right


@functools.cache
def cut_and_repeated():
    """Replay, ask and tell on one mesh against step, bit for bit where it is the same program."""
    es, copy = strategy(mesh(population=4, data=2), population_size=24), eggroll.copy_state
    before = start(es)
    after, metrics = steps(es, copy(before))
    replayed = es.replay(copy(before), np.asarray(metrics.coefficients))
    outputs = es.ask(before).apply(model, X)
    told, reported = es.tell(copy(before), [float(-jnp.mean((o - 1.0) ** 2)) for o in outputs])
    twice, _ = steps(es, copy(after)._replace(sigma=jnp.float32(0.05)))
    by_hand = [model(es.ask(before).member(i), X) for i in (0, 23)]
    return {
        "replay": same(replayed.params, after.params) and same(replayed.opt_state, after.opt_state),
        "told": difference(told.params, after.params),
        "told_fitness": difference(reported.fitness, metrics.fitness),
        "applied": difference([outputs[0], outputs[23]], by_hand),
        "programs": [programs.find_all("score", es)[0]._cache_size(), len(programs.find_all("update", es))],
        "generation": int(twice.generation),
    }


@functools.cache
def invalid():
    def spoiled(params, batch, key):
        return jnp.where(batch.sum() > 0, jnp.nan, fitness(params, batch[None], key))

    es = strategy(mesh(population=8), spoiled, members_per_batch=1)
    batch = jnp.where(jnp.arange(32)[:, None] == 5, 1.0, -jnp.ones((32, 4)))
    state, some = es.step(start(es), batch)
    after, every = es.step(eggroll.copy_state(state), jnp.ones((32, 4)))
    skipped = [bool(some.skipped), bool(every.skipped)]
    return {"invalid": int(some.invalid), "skipped": skipped, "kept": same(after.params, state.params)}


@functools.cache
def placed():
    """Where arrays lie, and what crosses."""
    wide = {"w": 0.1 * jax.random.normal(jax.random.key(1), (64, 128)), "b": jnp.zeros(128)}
    batch = jax.random.normal(jax.random.key(2), (8, 64))
    size = sum(leaf.nbytes for leaf in wide.values())

    def crossing(on, params=wide, **options):
        es = strategy(on, **options)
        state = start(es, params)
        es.plan(state, batch)
        compiled = jax.jit(es.step).lower(state, batch).compile()
        return es, state, compiled

    compiled = crossing(mesh(population=8))[-1]
    _, state, shared = crossing(mesh(population=8), shard_optimizer=True)
    moved, _ = shared(state, jax.device_put(batch, shared.input_shardings[0][1]))
    on = mesh(population=4, model=2)
    columns = {"w": PartitionSpec(None, "model"), "b": PartitionSpec("model")}
    columns = {name: jax.device_put(wide[name], NamedSharding(on, spec)) for name, spec in columns.items()}
    partitioned, sharded_state, over_model = crossing(on, columns)
    after, metrics = partitioned.step(sharded_state, batch)
    one = strategy()
    expected, reference = one.step(start(one, wide), batch)
    memory = start(strategy(mesh(population=8), recurrent), **MEMORY).member_state
    return {
        "bytes": collective_bytes(compiled.as_text()),
        "expected_bytes": {"all-gather": 4 * 32, "all-reduce": size},
        "shared_bytes": collective_bytes(shared.as_text()),
        "gradient_bytes": size,
        "momentum": str(jax.tree.leaves(moved.opt_state)[1].sharding.spec),
        "momentum_share": jax.tree.leaves(moved.opt_state)[1].addressable_shards[0].data.shape,
        "model": [str(after.params["w"].sharding.spec), str(jax.tree.leaves(after.opt_state)[1].sharding.spec)],
        "model_gather": largest_collective(over_model.as_text(), "all-gather"),
        "model_reduce": largest_collective(over_model.as_text(), "all-reduce"),
        "parameter": wide["w"].nbytes,
        "jitted": difference(moved.params, expected.params),
        "model_update": difference(after.params, expected.params),
        "model_fitness": difference(metrics.fitness, reference.fitness),
        "memory": str(memory.sharding.spec),
    }


@functools.cache
def restored():
    """A checkpoint and a durable run of one mesh go on on another."""
    eight, two = strategy(mesh(population=8)), strategy(mesh(population=2))
    state, _ = steps(eight, start(eight), count=2)
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = Checkpoints(folder, config={})
        checkpoints.save(state)
        checkpoints.wait()
        back, _ = checkpoints.restore(start(two))
        checkpoints.close()
    ahead, went_on = steps(eight, state)[0], steps(two, eggroll.copy_state(back))[0]
    with tempfile.TemporaryDirectory() as folder:
        eight.plan(start(eight), X)
        run = DurableRun(folder, eight, start(eight), config={}, checkpoint_every=2)
        state = run.state
        for _ in range(3):
            state, metrics = eight.step(state, X)
            run.record(state, metrics)
        run.close()
        again = DurableRun(folder, eight, start(eight), config={}, checkpoint_every=2)
        again.close()
    return {
        "mesh": dict(back.params["w"].sharding.mesh.shape),
        "bits": same(back.params, ahead.params) or same(back.params, steps(eight, start(eight), count=2)[0].params),
        "went_on": difference(went_on.params, ahead.params),
        "durable": same(again.state.params, state.params) and same(again.state.opt_state, state.opt_state),
        "generation": int(again.state.generation),
    }


ERRORS = {
    "fewer pairs than devices": lambda: strategy(mesh(population=8), population_size=14),
    "groups": lambda: strategy(mesh(population=8), members_per_batch=8),
    "examples": lambda: steps(es := strategy(mesh(data=8)), start(es), X[:6]),
    "scalar leaf": lambda: steps(
        es := strategy(mesh(data=8), lambda p, b, k: b[1] * fitness(p, b[0], k)), start(es), (X, jnp.float32(1))
    ),
    "vector of examples": lambda: steps(
        es := strategy(mesh(data=2), lambda p, b, k: -((model(p, b) - 1.0) ** 2).mean(axis=1)), start(es)
    ),
    "member state over data": lambda: steps(es := strategy(mesh(data=2), recurrent), start(es, **MEMORY)),
    "integers over data": lambda: strategy(
        mesh(data=2), perturbation=eggroll.Integer(), sigma=None, shaping="pair_sign", optimizer=eggroll.threshold(0.5)
    ),
    "shard_optimizer with model": lambda: strategy(mesh(population=2, model=2), shard_optimizer=True),
}
