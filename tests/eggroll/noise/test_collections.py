"""Collections that are not parameters reach the fitness unchanged, and nothing of a run touches them."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.core import freeze
from jax.sharding import Mesh

import eggroll
from eggroll import zo
from eggroll.journal import JournalError, Writer, make_header
from eggroll.journal.fingerprint import fingerprint
from eggroll.noise.rules import match_rules
from eggroll.noise.variables import collections
from tests.test_readme import code_blocks

pytestmark = pytest.mark.usefixtures("standard_promotion")  # flax and optax promote dtypes
X = jax.random.normal(jax.random.key(0), (6, 3))


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(2)(nn.BatchNorm(use_running_average=True)(nn.Dense(4)(x)))


class Net(nnx.Module):
    def __init__(self, rngs):
        self.inner, self.norm = nnx.Linear(3, 4, rngs=rngs), nnx.BatchNorm(4, use_running_average=True, rngs=rngs)
        self.dropout, self.outer = nnx.Dropout(0.5, rngs=rngs), nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x):
        return self.outer(self.dropout(self.norm(self.inner(x))))


VARIABLES = Linen().init(jax.random.key(1), X)
GRAPH, NNX_STATE = nnx.split(Net(nnx.Rngs(0)))
MODELS = {
    "linen": (lambda params, x: Linen().apply(params, x), VARIABLES),
    "nnx": (lambda params, x: nnx.merge(GRAPH, params)(x), NNX_STATE),
}
OPTIMIZERS = {
    "elements": optax.adamw(0.01),
    "leaves": optax.lamb(0.01),
    "whole": optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.01)),
}


@functools.cache
def fitness_of(model):
    return lambda params, batch, key: -jnp.mean(model(params, batch) ** 2)


def strategy(model, **options):
    options = {"population_size": 4, "sigma": 0.1, "optimizer": OPTIMIZERS["elements"]} | options
    return eggroll.EvolutionStrategy(fitness_of(model), **options)


def words(leaf):
    return np.asarray(jax.random.key_data(leaf) if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf)


def moved(old, new):
    """Paths of the leaves that changed."""
    pairs = zip(jax.tree.leaves_with_path(old), jax.tree.leaves(new), strict=True)
    named = [(jax.tree_util.keystr(path, simple=True, separator="/"), a, b) for (path, a), b in pairs]
    return {path for path, a, b in named if not np.array_equal(words(a), words(b))}


def parameters_of(params):
    flat = zip(jax.tree.leaves_with_path(params), collections(params), strict=True)
    return {jax.tree_util.keystr(path, simple=True, separator="/") for (path, _), other in flat if other is None}


# --- which leaves -------------------------------------------------------------------------------------------------------

LEAF = jnp.ones(2)
OWN_TYPE = type("Constant", (nnx.Variable,), {})
TREES = [
    ({"params": {"w": LEAF}, "batch_stats": {"m": LEAF}, "cache": {"n": LEAF}}, ["batch_stats", "cache", None]),
    (freeze({"params": {"w": LEAF}, "stats": {"m": LEAF}}), [None, "stats"]),
    ({"params": {"batch_stats": LEAF, "params": LEAF}}, [None, None]),
    ({"net": {"params": LEAF, "batch_stats": LEAF}}, [None, None]),
    ({"batch_stats": LEAF, "w": LEAF}, [None, None]),
    ([{"params": LEAF, "batch_stats": LEAF}], [None, None]),
    (nnx.State({"params": nnx.Param(LEAF), "w": nnx.Param(LEAF)}), [None, None]),
    (nnx.State({"a": nnx.Param(LEAF), "b": nnx.LoRAParam(LEAF), "c": nnx.BatchStat(LEAF)}), [None, None, "BatchStat"]),
    ({"w": LEAF, "x": OWN_TYPE({"u": LEAF, "v": LEAF})}, [None, "Constant", "Constant"]),
]


@pytest.mark.parametrize(("tree", "expected"), TREES)
def test_two_signs_and_no_others(tree, expected):
    if isinstance(tree, type(freeze({}))):  # its leaves come in the order of its keys
        assert {own and own.name for own in collections(tree)} == set(expected)
    else:
        assert [own and own.name for own in collections(tree)] == expected


RULES = [
    (eggroll.Dense(), ["Frozen", "Dense"]),
    ([(".*", eggroll.Dense())], ["Frozen", "Dense"]),
    ([("batch_stats/.*", eggroll.LowRank()), (".*", eggroll.Dense())], ["LowRank", "Dense"]),
    ([(".*", eggroll.Dense()), (".*/m", eggroll.LowRank())], ["LowRank", "Dense"]),
    ([("params/.*", eggroll.Dense())], ["Frozen", "Dense"]),
    ([("params/.*", eggroll.Dense()), (".*", eggroll.Frozen())], ["Frozen", "Dense"]),
    ([("params/.*", eggroll.Dense()), (".*", eggroll.LowRank())], ["Frozen", "Dense"]),
    ([("batch_stats/.*", eggroll.Frozen()), (".*", eggroll.Dense())], ["Frozen", "Dense"]),
]


@pytest.mark.parametrize(("rules", "expected"), RULES)
def test_a_rule_reaches_a_collection_if_its_pattern_matches_no_parameter(rules, expected):
    found = match_rules(rules, {"params": {"w": LEAF}, "batch_stats": {"m": LEAF}})
    assert [type(spec).__name__ for spec in found] == expected


def test_variables_without_a_parameter_follow_the_rules():
    assert match_rules(eggroll.Dense(), nnx.State({"w": OWN_TYPE(LEAF)})) == [eggroll.Dense()]


def test_a_rule_without_a_leaf_is_still_refused():
    with pytest.raises(ValueError, match="rule 'batch_stat' matches no parameter"):
        match_rules([("batch_stat", eggroll.Dense()), (".*", eggroll.Dense())], VARIABLES)


# --- a generation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("linen", "frozen: batch_stats (2 arrays), not parameters: siblings of 'params'"),
        (
            "nnx",
            "frozen: RngCount (1 array), RngKey (1 array), BatchStat (2 arrays), not parameters: "
            "variables that are not nnx.Param",
        ),
    ],
)
def test_the_plan_names_them(name, line):
    model, params = MODELS[name]
    es = strategy(model)
    plan = es.plan(es.init(params, key=jax.random.key(0)), X)
    assert line in plan.table().splitlines()
    assert {leaf.path for leaf in plan.leaves if leaf.role != "frozen"} == parameters_of(params)
    assert all(leaf.spec == eggroll.Frozen() and leaf.noise_bytes == 0 for leaf in plan.leaves if leaf.role == "frozen")


@pytest.mark.parametrize(("name", "split"), [("linen", "elements"), ("nnx", "elements"), ("linen", "leaves"), ("nnx", "whole")])
def test_only_parameters_move_and_have_moments(name, split):
    model, params = MODELS[name]
    es = strategy(model, optimizer=OPTIMIZERS[split])
    state = es.init(params, key=jax.random.key(0))
    shapes = [leaf.shape for leaf in jax.tree.leaves(state.opt_state) if leaf.shape]
    assert len(shapes) == 2 * len(parameters_of(params))  # two moments each
    before = eggroll.copy_state(state)
    state, metrics = es.step(state, X)
    assert moved(params, state.params) == parameters_of(params)
    again = es.replay(before, metrics.coefficients)
    assert not moved(state.params, again.params)


def test_members_differ_in_parameters_only_and_ask_and_tell_agree():
    model, params = MODELS["nnx"]
    es = strategy(model)
    state = es.init(params, key=jax.random.key(0))
    population = es.ask(state)
    fitness = population.apply(lambda own, x: fitness_of(model)(own, x, None), X)
    assert moved(params, population.member(1)) == parameters_of(params)
    state, _ = es.tell(state, fitness)
    assert moved(params, state.params) == parameters_of(params)


@pytest.mark.slow
def test_a_mesh_with_the_axis_population():
    model, params = MODELS["nnx"]
    mesh = Mesh(np.array(jax.devices()[:2]), ("population",))
    es = strategy(model, mesh=mesh, shard_optimizer=True)
    state, _ = es.step(es.init(params, key=jax.random.key(0)), X)
    assert moved(params, state.params) == parameters_of(params)


def test_replaced_short_statistics_stay_under_an_optimizer_that_mixes_parameters():
    """A float32 master would bring the old ones back."""
    model, params = MODELS["linen"]
    short = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    es = strategy(lambda own, x: model(jax.tree.map(lambda w: w.astype(x.dtype), own), x), optimizer=OPTIMIZERS["whole"])
    state = es.init(short, key=jax.random.key(0))
    assert [master is None for master in state.masters] == [True] * 2 + [False] * 6
    new = jax.tree.map(lambda leaf: leaf + jnp.bfloat16(2), state.params["batch_stats"])
    state = state._replace(params={**state.params, "batch_stats": eggroll.copy_state(new)})
    state, _ = es.step(state, X)
    assert not moved(new, state.params["batch_stats"])


def test_int8_parameters_with_other_collections():
    params = {"params": {"w": jnp.ones((3, 2), jnp.int8)}, "stats": {"m": jnp.ones(2), "key": jax.random.key(3)}}
    es = eggroll.EvolutionStrategy(
        lambda own, x, key: jnp.matmul(x, own["params"]["w"], preferred_element_type=jnp.int32).sum(),
        population_size=4,
        sigma=None,
        optimizer=eggroll.threshold(1.0),
        perturbation=eggroll.Integer(shift=0),
        shaping="pair_sign",
    )
    state, _ = es.step(es.init(params, key=jax.random.key(0)), jnp.ones((1, 3), jnp.int8))
    assert moved(params, state.params) == {"params/w"}


# --- zeroth order -------------------------------------------------------------------------------------------------------


def test_zeroth_order():
    model, params = MODELS["nnx"]
    optimizer = zo.Descent(0.01, weight_decay=0.1)
    tuner = zo.ZerothOrder(fitness_of(model), directions=2, sigma=0.1, optimizer=optimizer)
    state, _ = tuner.step(tuner.init(params, key=jax.random.key(0)), X)
    assert moved(params, state.params) == parameters_of(params)


@pytest.mark.slow
def test_offloaded_blocks():
    modules = [nnx.BatchNorm(3, use_running_average=True, rngs=nnx.Rngs(seed)) for seed in range(2)]
    graph, _ = nnx.split(modules[0])
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(nnx.split(module)[1] for module in modules))
    stacked = nnx.State({**stacked, "rng": nnx.RngKey(jax.random.split(jax.random.key(5)))})
    blocks = zo.Blocks(
        begin=lambda resident, batch, key: (batch, None),
        block=lambda own, x, aux: (
            nnx.merge(graph, nnx.State({k: v for k, v in own.items() if k != "rng"}))(x)
            + jax.random.normal(own["rng"].get_value(), x.shape)
        ),
        end=lambda resident, x, batch: jnp.mean((x @ resident["out"]) ** 2),
    )
    params = {"resident": {"out": jnp.ones((3, 1))}, "blocks": stacked}
    tuner = zo.ZerothOrder(blocks, directions=2, sigma=0.1, optimizer=zo.Descent(0.01))
    offloaded = zo.Offload(tuner)
    state, _ = offloaded.step(offloaded.init(params, key=jax.random.key(0)), X)
    whole, _ = tuner.step(tuner.init(params, key=jax.random.key(0)), X)
    found = offloaded.parameters(state)
    assert moved(params, found) == moved(params, whole.params) == parameters_of(params)


# --- files --------------------------------------------------------------------------------------------------------------


def test_a_journal_of_a_run_that_perturbed_them_is_refused(tmp_path):
    model, params = MODELS["linen"]
    es = strategy(model)
    state = es.init(params, key=jax.random.key(0))
    es.plan(state, X)
    header = make_header(es, state)
    earlier = [row.replace("frozen Frozen()", "dense LowRank(rank=1)") for row in header.plan]
    Writer(tmp_path / "journal.bin", type(header)(**vars(header) | {"plan": earlier})).close()
    words = r"plan has the row 'batch_stats/BatchNorm_0/mean \[4\] float32 dense .*, not the row '.*frozen Frozen"
    with pytest.raises(JournalError, match=words):
        Writer(tmp_path / "journal.bin", header)


@pytest.mark.parametrize("checkpoint_every", [1, 50])
def test_a_run_with_typed_keys_resumes_from_its_checkpoint_or_journal(tmp_path, checkpoint_every):
    model, params = MODELS["nnx"]
    es = strategy(model)

    def resumed():
        state = es.init(params, key=jax.random.key(0))
        es.plan(state, X)
        return eggroll.DurableRun(tmp_path, es, state, config={}, checkpoint_every=checkpoint_every)

    run = resumed()
    state, _ = eggroll.train(es, run.state, X, generations=2, durable=run)
    run.close()
    again = resumed()
    again.close()
    assert again.state.generation == 2 and not moved(state.params, again.state.params)


def test_fingerprints_see_typed_keys():
    other = jax.tree.map(lambda leaf: leaf, NNX_STATE)
    other["dropout"]["rngs"]["key"].set_value(jax.random.key(77))
    assert fingerprint(NNX_STATE) != fingerprint(other)


# --- documentation ------------------------------------------------------------------------------------------------------


def test_statistics_are_carried_as_the_page_shows():
    (source,) = code_blocks("docs/models.md", "python")
    names: dict = {}
    exec(compile(source.replace("range(30)", "range(1)"), "docs/models.md", "exec"), names)
    initial = names["net"].init(jax.random.key(1), names["x"], training=False)
    inputs = names["x"] @ initial["params"]["Dense_0"]["kernel"]  # the noise of a pair cancels in their mean
    mean = np.array(names["state"].params["batch_stats"]["BatchNorm_0"]["mean"])
    np.testing.assert_allclose(mean, 0.1 * inputs.mean(axis=0), rtol=1e-4, atol=1e-5)
    state, _ = names["es"].step(names["state"], names["batch"])
    assert not moved(mean, state.params["batch_stats"]["BatchNorm_0"]["mean"])


def test_statistics_of_nnx_are_carried():
    def fitness(params, batch, key):
        model = nnx.merge(GRAPH, params)
        model.norm.use_running_average = False
        return -jnp.mean(model(batch) ** 2), nnx.state(model, nnx.BatchStat)

    es = eggroll.EvolutionStrategy(fitness, population_size=4, sigma=0.1, optimizer=optax.sgd(0.01), aux="mean")
    state, metrics = es.step(es.init(NNX_STATE, key=jax.random.key(0)), X)
    mean = words(metrics.aux["norm"]["mean"].get_value())
    assert (mean != 0).all()
    state = state._replace(params=nnx.merge_state(state.params, metrics.aux))
    state, _ = es.step(state, X)
    np.testing.assert_array_equal(state.params["norm"]["mean"].get_value(), mean)
