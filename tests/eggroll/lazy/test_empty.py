"""Parameters without entries go through plan, evaluation, update, checkpoint and journal as any other."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import eggroll
from eggroll import zo
from eggroll.noise import regions
from tests.eggroll.lazy.oracle import check, weights
from tests.tables import covering

X = weights(5, 4, seed=4)
LAYERS = lambda z, x: jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, z)[0]  # noqa: E731
USES = {  # shape of the empty parameter, how it is used
    "no rows": ((0, 4), lambda z, x: x + jnp.zeros((5, 0)) @ z),
    "no columns": ((4, 0), lambda z, x: x + (x @ z).sum()),
    "neither": ((0, 0), lambda z, x: x + (jnp.zeros((5, 0)) @ z).sum()),
    "no entries of a vector": ((0,), lambda z, x: x + z.sum()),
    "no layers": ((0, 4, 4), LAYERS),
    "layers without columns": ((3, 4, 0), lambda z, x: x + jnp.einsum("td,ldn->tln", x, z).sum()),
    "no words": ((0, 4), lambda z, x: x + z[jnp.zeros(0, int)].sum(0)),
    "no experts of a ragged product": ((0, 4, 4), lambda z, x: x + jax.lax.ragged_dot(x, z, jnp.zeros(0, jnp.int32))),
    "joined": ((4, 0), lambda z, x: x @ jnp.concatenate([z, jnp.eye(4)], 1)),
    "not at all": ((0, 4), lambda z, x: x),
}
SPECS = {
    "rademacher": eggroll.LowRank(1),
    "normal": eggroll.LowRank(2, "normal"),
    "dense": eggroll.Dense("rademacher"),
    "flipout": eggroll.Flipout(),
}
OPTIMIZERS = {
    "sgd": (optax.sgd(0.1), "stochastic"),
    "adam": (optax.adam(0.1), "nearest"),
    "lamb": (optax.lamb(0.1), "master"),
    "clipped": (optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1)), "master"),
}


def params_of(use, dtype=jnp.float32):
    return {"z": jnp.zeros(USES[use][0], dtype), "w": weights(4, 4).astype(dtype)}


def function_of(use):
    return lambda params, x: USES[use][1](params["z"], x @ params["w"])


def strategy(use, **options):
    settings = {"population_size": 8, "sigma": 0.1, "optimizer": optax.sgd(0.1)} | options
    function = function_of(use)
    return eggroll.EvolutionStrategy(lambda p, x, key: -(function(p, x) ** 2).mean().astype(jnp.float32), **settings)


@pytest.mark.parametrize(("use", "spec"), covering(USES, SPECS, strength=1))
def test_members_equal_the_oracle(use, spec):
    plan = check(function_of(use), params_of(use), X, SPECS[spec], one_by_one=True)
    assert plan["z"].noise_bytes == 0
    if plan["z"].role != "frozen":
        assert plan["z"].role == "dense" and plan["z"].reason == ("by rule" if spec == "dense" else "has no entries")


@pytest.mark.parametrize(("use", "spec", "optimizer"), covering(["no rows", "no layers"], SPECS, OPTIMIZERS, strength=1))
def test_updates(use, spec, optimizer, monkeypatch, standard_promotion):
    monkeypatch.setattr(regions, "LIMIT", 8)
    transformation, precision = OPTIMIZERS[optimizer]
    options = {"optimizer": transformation, "precision": precision, "perturbation": SPECS[spec]}
    options["chunk_size"] = 4 if spec == "normal" else None
    es = strategy(use, **options)
    first = es.init(params_of(use, jnp.bfloat16), key=jax.random.key(0))
    state, metrics = es.step(eggroll.copy_state(first), X.astype(jnp.bfloat16))
    assert not metrics.skipped and metrics.kept == 0
    assert state.params["z"].shape == USES[use][0] and (state.params["w"] != first.params["w"]).any()


@pytest.mark.slow
def test_a_run_is_resumed_from_its_checkpoint_and_replayed_from_its_journal(tmp_path):
    es = strategy("no layers", optimizer=optax.sgd(0.1, momentum=0.9))

    def go(folder, generations):
        initial = es.init(params_of("no layers"), key=jax.random.key(0))
        es.plan(initial, X)
        run = eggroll.DurableRun(folder, es, initial, config={}, checkpoint_every=2)
        left = generations - int(run.state.generation)
        state, _ = eggroll.train(es, run.state, lambda _: X, generations=left, run_folder=folder, durable=run)
        run.close()
        return state.params

    whole = go(tmp_path / "whole", 5)
    go(tmp_path / "parts", 3)
    for one, other in zip(*map(jax.tree.leaves, (whole, go(tmp_path / "parts", 5))), strict=True):
        np.testing.assert_array_equal(one, other)


def test_zeroth_order_and_integers():
    loss = lambda p, x, key: (function_of("no layers")(p, x) ** 2).mean()  # noqa: E731
    mezo = zo.mezo(loss, learning_rate=0.1, sigma=0.01)
    state, _ = mezo.step(mezo.init(params_of("no layers"), key=jax.random.key(0)), X)
    assert state.params["z"].shape == (0, 4, 4)

    def integers(params, x, key):
        product = lambda x, w: jax.lax.dot_general(x, w, (((1,), (0,)), ((), ())), preferred_element_type=jnp.int32)  # noqa: E731
        return (product(x, params["w"]).sum() + product(x, params["z"]).sum()).astype(jnp.float32)

    settings = {"sigma": None, "shaping": "pair_sign", "optimizer": eggroll.threshold(0.1), "perturbation": eggroll.Integer()}
    es = eggroll.EvolutionStrategy(integers, population_size=8, **settings)
    state, _ = es.step(es.init(params_of("no columns", jnp.int8), key=jax.random.key(0)), jnp.ones((2, 4), jnp.int8))
    assert state.params["z"].shape == (4, 0)


def test_outputs_without_entries():
    es = eggroll.EvolutionStrategy(None, population_size=4, sigma=0.1, optimizer=optax.sgd(0.1))
    state = es.init({"w": jnp.ones((4, 3)), "z": jnp.ones((4, 0))}, key=jax.random.key(0))
    outputs = es.ask(state).apply(lambda p, x: (x @ p["w"], x @ p["z"], x[:0] @ p["w"]), jnp.ones((2, 4)))
    assert [output.shape for output in outputs] == [(4, 2, 3), (4, 2, 0), (4, 0, 3)]
