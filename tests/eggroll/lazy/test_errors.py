"""Errors of the user's function are the user's own; any other names the parameters and the primitive."""

import jax
import jax.numpy as jnp
import pytest

import eggroll
from eggroll.lazy import products, views
from eggroll.lazy import uses as errors
from eggroll.lazy.interpret import apply_perturbed
from eggroll.lazy.planning import make_plan
from tests.eggroll.lazy.oracle import check, weights
from tests.eggroll.lazy.test_perturbed import strategy

PARAMS = {"a": weights(4, 4), "b": weights(4, 4, seed=3)}
INTEGERS = {path: (10 * weight).astype(jnp.int8) for path, weight in PARAMS.items()}
X = weights(5, 4, seed=4)


def planned(function, params=PARAMS):
    return make_plan(function, params, perturbation=eggroll.LowRank(1))


class Mine(Exception):
    """Of the user."""


def raises(params):
    raise Mine("my own words")


def in_a_loop(params):
    return jax.lax.scan(lambda c, _: (raises(params), None), X @ params["a"], None, length=2)[0]


@pytest.mark.parametrize(
    ("function", "kind", "message"),
    [
        (raises, Mine, "^my own words"),
        (in_a_loop, Mine, "^my own words"),
        (lambda p: X @ p["a"][:3], TypeError, "^dot_general requires contracting dimensions to have the same shape"),
        (lambda p: p["c"], KeyError, "^'c'"),
        (lambda p: X.reshape(3, 3) @ p["a"], TypeError, "^cannot reshape array"),
        (lambda p: 1.0 if p["a"].sum() > 0 else 0.0, jax.errors.TracerBoolConversionError, "^Attempted boolean conversion"),
    ],
)
def test_errors_of_the_function_stay_its_own(function, kind, message):
    with pytest.raises(kind, match=message) as caught:
        planned(function)
    assert not isinstance(caught.value, errors.UseError) and caught.value.__cause__ is None


def test_errors_of_a_function_after_planning_stay_its_own():
    es = strategy(eggroll.LowRank(1))
    state = es.init(PARAMS, key=jax.random.key(0))
    es.plan(state, X, function=lambda p, x: x @ p["a"])
    with pytest.raises(Mine, match=r"^my own words"):
        es.ask(state).apply(lambda p, x: raises(p), X)


def broken(*operands, **params):
    raise RuntimeError("internal words\nof another library")


USES = {  # the same in a loop and in a branch
    "alone": lambda p: X @ p["a"],
    "scan": lambda p: jax.lax.scan(lambda c, _: (jnp.tanh(c @ p["a"]), None), X, None, length=2)[0],
    "while": lambda p: jax.lax.while_loop(lambda c: c.sum() < 3.0, lambda c: jnp.tanh(c @ p["a"]) + 1, X),
    "branch": lambda p: jax.lax.cond(X.sum() > 0, lambda: X @ p["a"], lambda: X),
    "jit": jax.jit(lambda p: jax.checkpoint(lambda x: x @ p["a"])(X)),
}


@pytest.mark.parametrize("name", USES)
def test_a_rule_that_fails_names_parameter_and_primitive(name, monkeypatch):
    monkeypatch.setattr(products, "_dot", broken)
    message = (
        "^'dot_general' failed with perturbed parameter 'a', where the function alone could be traced: RuntimeError: internal "
        r"words\. Put the rule \('a', eggroll\.Dense\(\)\) first in `perturbation`\."
    )
    with pytest.raises(ValueError, match=message) as caught:
        planned(USES[name])
    assert isinstance(caught.value, errors.FailedUse) and isinstance(caught.value.__cause__, RuntimeError)


def test_a_primitive_that_fails_without_a_rule_names_all_its_parameters(monkeypatch):
    monkeypatch.setattr(products.PerturbedArray, "read", broken)
    with pytest.raises(errors.FailedUse, match=r"^'mul' failed with perturbed parameter 'a' and 'b', where"):
        planned(lambda p: X @ (p["a"] * p["b"]))


def test_a_rule_that_fails_during_evaluation_is_named_too(monkeypatch):
    es = strategy(eggroll.LowRank(1))
    state = es.init(PARAMS, key=jax.random.key(0))
    function = lambda p, x: x @ p["a"].T  # noqa: E731
    es.plan(state, X, function=function)
    monkeypatch.setattr(views.PerturbedArray, "view", broken)
    with pytest.raises(errors.FailedUse, match=r"^'transpose' failed with perturbed parameter 'a', where"):
        es.ask(state).apply(function, X)


ROWS = jnp.array([1, 2, 3, 0])
UNCONVERTED = {  # int8 parameters before they are floats, looked up or not
    "arithmetic": (lambda p: p["a"] + p["b"], "'add'"),
    "rows and a matrix": (lambda p: jax.lax.select(X.sum() > 0, p["a"][ROWS], p["b"]), "'select_n'"),
    "joined": (lambda p: jnp.concatenate([p["a"], p["b"][ROWS]]), "'concatenate'"),
    "rows in a carry": (
        lambda p: jax.lax.scan(lambda c, _: (p["a"][ROWS], None), p["b"] * 0, None, length=2)[0].astype(jnp.float32),
        "'mul'",
    ),
    "rows become a carry": (
        lambda p: jax.lax.scan(lambda c, _: (p["a"][ROWS], None), jnp.zeros((4, 4), jnp.int8), None, length=2)[0] @ p["b"],
        "a carry of 'scan' that is not the same view of one parameter on every iteration",
    ),
    "rows of one branch": (
        lambda p: jax.lax.cond(X.sum() > 0, lambda: p["a"][ROWS], lambda: jnp.zeros((4, 4), jnp.int8)),
        "the result of a conditional",
    ),
}


@pytest.mark.parametrize("name", UNCONVERTED)
def test_integers_that_are_not_converted_are_refused(name):
    function, where = UNCONVERTED[name]
    with pytest.raises(errors.UnconvertedUse, match=rf"^int8 parameter '[ab]' has floating noise but is used in {where}"):
        planned(function, INTEGERS)


def sharded(params, x):
    mesh = jax.make_mesh((1,), ("x",), devices=jax.devices()[:1])
    return jax.shard_map(lambda w, x: x @ w, mesh=mesh, in_specs=jax.P(), out_specs=jax.P())(params["a"], x) @ params["b"]


def test_a_primitive_with_a_program_of_its_own_makes_its_parameters_dense():
    """`shard_map` and the like have no rule: 'a' is dense with that reason, 'b' is low-rank."""
    plan = check(sharded, PARAMS, X)
    assert plan["a"].role == "dense" and plan["a"].reason == "used by 'shard_map', which has no low-rank rule"
    assert plan["b"].role == "low-rank"


def test_plain_values_are_evaluated_by_jax_alone(monkeypatch):
    """Nothing but lazy values is dispatched."""
    monkeypatch.setattr("eggroll.lazy.perturbed.interpret_with_rules", broken)
    function = lambda p, x: jnp.tanh(jax.lax.scan(lambda c, w: (c @ w, None), x, jnp.stack([p["a"]] * 2))[0])  # noqa: E731
    assert jnp.allclose(apply_perturbed(function, PARAMS, X), function(PARAMS, X))
