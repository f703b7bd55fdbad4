"""Roles read from use, rules on paths, the printed table."""

from unittest import mock

import jax
import jax.numpy as jnp
import pytest

import eggroll
from eggroll.lazy.planning import make_plan

PARAMS = {
    "embed": jnp.zeros((10, 4)),
    "layers": {"w": jnp.zeros((3, 4, 4)), "b": jnp.zeros((3, 4))},
    "head": jnp.zeros((4, 1)),
    "unused": jnp.zeros((4, 4)),
    "odd": jnp.zeros((4, 4)),
}


def model(params, tokens):
    def body(x, layer):
        return jnp.tanh(x @ layer["w"] + layer["b"]), None

    x, _ = jax.lax.scan(body, params["embed"][tokens], params["layers"])
    return x @ params["head"] + jnp.sum(jnp.sin(params["odd"])), x @ params["embed"].T


def planned(perturbation=eggroll.LowRank(), params=PARAMS):
    plan = make_plan(model, params, jnp.zeros(5, jnp.int32), perturbation=perturbation)
    return {leaf.path: leaf for leaf in plan.leaves}, plan


def test_roles_and_reasons():
    leaves, _ = planned()
    assert {path: leaf.role for path, leaf in leaves.items()} == {
        "embed": "low-rank",
        "head": "dense",
        "layers/b": "dense",
        "layers/w": "low-rank",
        "odd": "dense",
        "unused": "frozen",
    }
    assert leaves["layers/w"].stack == (0,) and leaves["layers/w"].rows == (1,) and leaves["layers/w"].columns == (2,)
    assert "used twice" in leaves["embed"].reason
    assert "'sin'" in leaves["odd"].reason and "not used" in leaves["unused"].reason
    assert "'add'" in leaves["layers/b"].reason and "vector" in leaves["head"].reason


def test_noise_bytes_per_member():
    leaves, _ = planned(eggroll.LowRank(2, "normal"))
    assert leaves["embed"].noise_bytes == 4 * 2 * (10 + 4)
    assert leaves["layers/w"].noise_bytes == 3 * 4 * 2 * (4 + 4)
    assert leaves["odd"].noise_bytes == 4 * 16
    packed, _ = planned(eggroll.LowRank(2))
    assert packed["layers/w"].noise_bytes == 3 * 4  # 16 signs of a layer fit one word
    assert planned([("odd", eggroll.Frozen()), (".*", eggroll.LowRank())])[0]["odd"].noise_bytes == 0


def test_table_shows_every_leaf():
    _, plan = planned()
    lines = plan.table().splitlines()
    assert lines[0].split() == ["path", "shape", "role", "evaluated", "rank", "kernel", "bytes", "share", "work", "reason"]
    names = ["embed", "head", "layers/b", "layers/w", "odd", "unused"]
    assert [line.split()[0] for line in lines[1 : 1 + len(names)]] == names
    assert lines[1 + len(names)].startswith("noise per member: ")
    assert {leaf.path: leaf.work for leaf in plan.leaves if leaf.work} == {"embed": 14 / 40, "layers/w": 0.5}


def test_the_table_says_what_costs_a_member_an_array_of_its_own():
    params = {"b": jnp.zeros(8), "w": jnp.zeros((64, 8))}
    costs = {
        "": lambda p, x: x @ p["w"] + p["b"],
        "costly: a member has arrays of its own of 100% of the parameters' bytes; most are of 'w': used by 'abs'": (
            lambda p, x: x @ p["w"] + p["b"] + jnp.abs(p["w"]).sum()
        ),
    }
    for line, function in costs.items():
        plan = make_plan(function, params, jnp.zeros((2, 64)), perturbation=eggroll.LowRank())
        assert [row for row in plan.table().splitlines() if row.startswith("costly")] == ([] if not line else [mock.ANY])
        assert line in plan.table()
    assert [leaf.evaluation for leaf in plan.leaves] == ["copy", "lazy + built"]


def test_first_matching_rule_wins():
    rules = [
        ("head", eggroll.Frozen()),
        ("layers/.*", eggroll.LowRank(4)),
        ("embed", eggroll.Dense()),
        (".*", eggroll.LowRank()),
    ]
    leaves, _ = planned(rules)
    assert leaves["head"].role == "frozen" and leaves["embed"].role == "dense" and leaves["embed"].reason == "by rule"
    assert leaves["layers/w"].spec.rank == 4 and leaves["odd"].spec.rank == 1


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([("haed", eggroll.Frozen()), (".*", eggroll.LowRank())], "rule 'haed' matches no parameter .*; paths are embed, head"),
        ([(".*", eggroll.LowRank()), ("head", eggroll.Frozen())], "rule 'head' matches no parameter that an earlier rule left"),
        ([("head", eggroll.LowRank())], "no perturbation rule matches parameter 'embed'"),
        (eggroll.Frozen(), "perturbation freezes every parameter"),
    ],
)
def test_wrong_rules_are_refused(rules, message):
    with pytest.raises(ValueError, match=message):
        planned(rules)


X = jnp.zeros((2, 4, 4))
WITHOUT_A_SPLIT = [
    (lambda w: X.reshape(-1, 8) @ w.reshape(8, 2), (4, 4), "split between roles"),
    (lambda w: X[0] @ jnp.sort(w, axis=1), (4, 4), "'sort'"),
]


@pytest.mark.parametrize(("function", "shape", "reason"), WITHOUT_A_SPLIT)
def test_uses_without_a_common_split_get_dense_noise(function, shape, reason):
    plan = make_plan(lambda p: function(p["w"]), {"w": jnp.zeros(shape)}, perturbation=eggroll.LowRank())
    assert plan.leaves[0].role == "dense" and reason in plan.leaves[0].reason


@pytest.mark.parametrize(
    ("function", "shape", "reason"),
    [
        (lambda w: jnp.einsum("bij,ijk->bk", X, w) + jnp.einsum("bij,ikj->bk", X, w), (4, 4, 4), "over both its rows and its"),
        (lambda w: (X[0] @ w) * w, (4, 4), "'mul'"),
    ],
)
def test_members_build_what_another_use_reads(function, shape, reason):
    plan = make_plan(lambda p: function(p["w"]), {"w": jnp.zeros(shape)}, perturbation=eggroll.LowRank())
    assert plan.leaves[0].role == "low-rank" and reason in plan.leaves[0].built[0]
    assert "also built per member" in plan.table()
    dense = make_plan(lambda p: function(p["w"]), {"w": jnp.zeros(shape)}, perturbation=eggroll.Flipout())
    assert dense.leaves[0].role == "dense"
