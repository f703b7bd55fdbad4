"""Lookups with indices in range, beyond the end and negative, in every mode that JAX has, against the dense oracle."""

import jax
import jax.numpy as jnp
import pytest

import eggroll
from eggroll.noise import leaves
from tests.eggroll.lazy.oracle import assert_equals_the_oracle, check, evaluated, weights
from tests.tables import covering

SIZE = 5  # of the axis that is looked up
IDS = jnp.array([0, 4, 5, 9, -1, -5, -6, -20])  # inside, beyond the end, negative, beyond the start
X = weights(len(IDS), 4, seed=4)
MODES = {
    "default": {},
    "clip": {"mode": "clip"},
    "fill": {"mode": "fill"},
    "fill with 7": {"mode": "fill", "fill_value": 7.0},
    "wrap": {"mode": "wrap"},
    "promise_in_bounds": {"mode": "promise_in_bounds"},
}
ALL = [mode for mode in MODES if mode != "wrap"]
TAKE = [mode for mode in MODES if mode != "promise_in_bounds"]
PLAIN = ["default"]  # no modes
TABLE, EXPERTS, VECTOR = (SIZE, 4), (SIZE, 4, 3), (SIZE,)
LOOKUPS = {  # shape of the parameter, lookup, its modes, the parameter's role
    "rows": (TABLE, lambda w, i, **how: w.at[i].get(**how), ALL, "low-rank"),
    "columns": (TABLE, lambda w, i, **how: w.T.at[:, i].get(**how), ALL, "low-rank"),
    "rows under vmap": (TABLE, lambda w, i, **how: jax.vmap(lambda i: w.at[i].get(**how))(i), ALL, "low-rank"),
    "take": (TABLE, lambda w, i, **how: jnp.take(w, i.reshape(2, 4), axis=0, **how), TAKE, "low-rank"),
    "take of columns": (TABLE, lambda w, i, **how: jnp.take(w.T, i, axis=1, **how), TAKE, "low-rank"),
    "take_along_axis": (TABLE, lambda w, i, **how: jnp.take_along_axis(w, i[:, None], axis=0, **how), TAKE[:4], "low-rank"),
    "take_along_axis of entries": (
        TABLE,
        lambda w, i, **how: jnp.take_along_axis(w, jnp.stack([i] * 4, 1), axis=0, **how),
        TAKE[:4],
        "low-rank",
    ),
    "entries": (TABLE, lambda w, i, **how: w.at[i, i % 4].get(**how), ALL, "low-rank"),
    "rows of many tables": (EXPERTS, lambda w, i, **how: w.at[i, i % 4 - 1].get(**how), ALL, "low-rank"),
    "rows of one table": (EXPERTS, lambda w, i, **how: w.at[2, i].get(**how), ALL, "low-rank"),
    "columns of many tables": (EXPERTS, lambda w, i, **how: w.at[i, :, i % 3].get(**how), ALL, "low-rank"),
    "vmapped tables": (
        EXPERTS,
        lambda w, i, **how: jax.vmap(lambda w: w.at[i].get(**how))(w) * X[:5, None, :3],
        ALL,
        "low-rank, dense with shared noise",
    ),
    "vmapped tables and indices": (
        EXPERTS,
        lambda w, i, **how: jax.vmap(lambda w, i: w.at[i].get(**how))(w, jnp.stack([i + k for k in range(SIZE)])),
        ALL,
        "low-rank",
    ),
    "two experts at once": (
        EXPERTS,
        lambda w, i, **how: jnp.einsum("tkd,tkdn->tn", X[:2, None, :] * X[:2, :2, None], w.at[i[:4].reshape(2, 2)].get(**how)),
        ALL,
        "low-rank, dense with shared noise",
    ),
    "a row without meaning": (
        TABLE,
        lambda w, i: w.at[i[2:7:4]].set(0.0, mode="drop").at[1].set(X[0])[jnp.abs(i)],
        PLAIN,
        "low-rank",
    ),
    "an expert without meaning": (EXPERTS, lambda w, i: X @ w.at[i[-1:3]].set(0.0, mode="clip")[i[0]], PLAIN, "low-rank"),
    "experts": (EXPERTS, lambda w, i, **how: jnp.einsum("td,tdn->tn", X, w.at[i].get(**how)), ALL, "low-rank"),
    "experts by take": (
        EXPERTS,
        lambda w, i, **how: jnp.einsum("td,tdn->tn", X, jnp.take(w, i, axis=0, **how)),
        TAKE,
        "low-rank",
    ),
    "experts under vmap": (EXPERTS, lambda w, i, **how: jax.vmap(lambda x, i: x @ w.at[i].get(**how))(X, i), ALL, "low-rank"),
    "biases": (VECTOR, lambda w, i, **how: w.at[i].get(**how), ALL, "dense"),
    "one row": (
        TABLE,
        lambda w, i: jnp.stack([jax.lax.dynamic_slice(w, (j, 1), (1, 3)) @ X.T[:3] for j in i]),
        PLAIN,
        "low-rank",
    ),
    "two rows": (TABLE, lambda w, i: jnp.stack([jax.lax.dynamic_slice(w, (j, 0), (2, 4)) @ X.T for j in i]), PLAIN, "low-rank"),
    "one expert": (
        EXPERTS,
        lambda w, i: jnp.stack([X @ jax.lax.dynamic_index_in_dim(w, j, keepdims=False) for j in i]),
        PLAIN,
        "low-rank",
    ),
    "one expert by number": (EXPERTS, lambda w, i: jnp.stack([X @ w[j] for j in i]), PLAIN, "low-rank"),
    "one-hot": (TABLE, lambda w, i: jax.nn.one_hot(i, SIZE) @ w, PLAIN, "low-rank"),
    "one-hot experts": (
        EXPERTS,
        lambda w, i: jnp.einsum("te,td,edn->tn", jax.nn.one_hot(i, SIZE), X, w),
        PLAIN,
        "low-rank",
    ),
}
SPECS = {
    "rademacher": eggroll.LowRank(1),
    "normal": eggroll.LowRank(3, "normal"),
    "flipout": eggroll.Flipout(),
}


@pytest.mark.parametrize(("name", "spec"), covering(LOOKUPS, SPECS, strength=1))
def test_lookups_equal_the_oracle_in_every_mode(name, spec):
    shape, lookup, modes, role = LOOKUPS[name]

    def apply(params, ids):
        inside = jnp.clip(ids, -SIZE, SIZE - 1)  # what is promised
        return {mode: lookup(params["w"], inside if "promise" in mode else ids, **MODES[mode]) for mode in modes}

    plan = check(apply, {"w": weights(*shape)}, IDS, SPECS[spec])
    expected = {"low-rank": spec}.get(role, "dense") if spec == "flipout" else role.split(",")[0]
    assert plan["w"].role == expected, plan["w"].reason


ENTRIES = jax.lax.GatherDimensionNumbers(offset_dims=(), collapsed_slice_dims=(0, 1), start_index_map=(0, 1))


@pytest.mark.parametrize("dtype", ["int8", "uint8", "uint32"])
def test_indices_of_a_dtype_that_the_axis_does_not_fit(dtype, monkeypatch):
    """300 rows: a byte cannot hold the size of the axis."""
    params = {"table": weights(300, 3), "experts": weights(300, 4, 3)}
    ids = jnp.array([0, 7, 127, 99], dtype)

    def apply(params, ids):
        rows = [jnp.take(params["table"], ids, axis=0, mode=mode) for mode in ("fill", "clip")]
        entries = jax.lax.gather(params["table"], jnp.stack([ids, ids % 3], -1), ENTRIES, (1, 1))
        return rows, entries, jnp.einsum("td,tdn->tn", X[:4], jnp.take(params["experts"], ids, axis=0))

    plan = check(apply, params, ids)
    assert {leaf.role for leaf in plan.values()} == {"low-rank"}
    monkeypatch.setattr(leaves, "LATE", 1)  # dense noise is drawn where the rows are looked up
    check(apply, params, ids, eggroll.Dense())


def test_a_clipped_row_has_the_perturbation_of_the_last_one():
    """A second oracle, without any built parameter: what is clipped equals what is inside."""
    for lookup in (lambda w, i: w[i], lambda w, i: jnp.take(w, i, axis=0, mode="clip")):
        _, outputs, _ = evaluated(lambda p, i, lookup=lookup: lookup(p["w"], i), {"w": weights(SIZE, 4)}, jnp.array([4, 5, 99]))
        assert (outputs[:, 0] == outputs[:, 1]).all() and (outputs[:, 0] == outputs[:, 2]).all()


@pytest.mark.parametrize("spec", [eggroll.LowRank(1), eggroll.Flipout()])
def test_quantised_rows_beyond_the_end_are_those_of_the_model_alone(spec):
    params = {"table": (10 * weights(SIZE, 4)).astype(jnp.int8)}
    ids = jnp.array([4, 5, 9])

    def apply(params, ids, mode):
        return jnp.take(params["table"], ids, axis=0, mode=mode).astype(jnp.float32)

    _, outputs, oracle = evaluated(lambda p, i: apply(p, i, "clip"), params, ids, spec)
    assert_equals_the_oracle(outputs, oracle)
    _, filled, _ = evaluated(lambda p, i: apply(p, i, "fill"), params, ids, spec)
    assert (filled[:, 1:] == apply(params, ids, "fill")[1:]).all() and (filled[:, 0] == outputs[:, 0]).all()
