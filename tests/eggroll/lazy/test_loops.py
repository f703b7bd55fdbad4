"""Loops whose carries start as, become or stop being lazy, against the dense oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import eggroll
from eggroll import generation
from eggroll.lazy.low_rank import LowRankDelta
from eggroll.lazy.planning import make_plan
from tests.eggroll.lazy.oracle import check, weights
from tests.eggroll.lazy.test_perturbed import strategy
from tests.tables import covering

PARAMS = {"a": weights(4, 4), "b": weights(4, 4, seed=3)}
X = weights(5, 4, seed=4)


def scan(body, first, *, turns=3):
    return jax.lax.scan(lambda carry, _: (body(carry), None), first, None, length=turns)[0]


def while_loop(body, first, *, turns=3):
    loop = jax.lax.while_loop(lambda c: c[0] < turns, lambda c: (c[0] + 1, body(c[1])), (jnp.int32(0), first))
    return loop[1]


def fori_loop(body, first, *, turns=3):
    """With a bound that is not known: a `while`."""
    return jax.lax.fori_loop(0, jnp.abs(first[0]).astype(jnp.int32).min() + turns, lambda _, carry: body(carry), first)


LOOPS = {"scan": scan, "while": while_loop, "fori": fori_loop}
TRANSITIONS = {  # what the carry starts as, what it becomes, which parameters are dense for it
    "stays": (lambda p: [p["a"]], lambda p, c: [c[0]], ""),
    "scaled": (lambda p: [p["a"]], lambda p, c: [0.5 * c[0]], ""),
    "a view of it stays": (lambda p: [p["a"].T], lambda p, c: [c[0].T.T], ""),
    "plain, then lazy": (lambda p: [jnp.eye(4)], lambda p, c: [p["a"]], "a"),
    "lazy, then plain": (lambda p: [p["a"]], lambda p, c: [jnp.eye(4)], "a"),
    "two are swapped": (lambda p: [p["a"], p["b"]], lambda p, c: c[::-1], "ab"),
    "one of two is replaced": (lambda p: [p["a"], p["b"]], lambda p, c: [p["b"], c[1]], "ab"),
    "plain, then lazy, later": (lambda p: [jnp.eye(4), jnp.eye(4)], lambda p, c: [c[1], p["a"]], "a"),
    "transposed": (lambda p: [p["a"]], lambda p, c: [c[0].T], "a"),
    "replaced": (lambda p: [p["a"]], lambda p, c: [p["b"]], "ab"),
    "one branch returns it": (
        lambda p: [p["a"]],
        lambda p, c: [jax.lax.cond(c[0][0, 0] > 0, lambda w: p["b"], lambda w: w, c[0])],
        "ab",
    ),
}


def product(loop, transition):
    """Multiply by the first weight of the carry on every iteration and after the last."""
    first, following, _ = TRANSITIONS[transition]

    def apply(params, x):
        x, kept = LOOPS[loop](lambda c: (jnp.tanh(c[0] @ c[1][0]), following(params, c[1])), (x, first(params)))
        return x, x @ kept[0]

    return apply


@pytest.mark.parametrize(("transition", "loop"), covering(TRANSITIONS, ["scan", "while", "fori"], strength=1))
def test_carries_equal_the_oracle(transition, loop):
    plan = check(product(loop, transition), PARAMS, X)
    for path in TRANSITIONS[transition][-1]:
        assert "a carry of" in plan[path].reason + plan[path].built[0] or transition == "one branch returns it"


@pytest.mark.parametrize("transition", TRANSITIONS)
def test_plans_of_carries(transition):
    """In every loop: built, or dense without another use, where the carry changes; low-rank where it does not."""
    plans = [
        make_plan(product(loop, transition), PARAMS, X, perturbation=eggroll.LowRank(1)) for loop in ("scan", "while", "fori")
    ]
    dense = TRANSITIONS[transition][-1]
    for plan in plans:
        for leaf in plan.leaves:
            if leaf.path in dense:
                assert leaf.role == "dense" or leaf.built[0]
            else:
                assert leaf.role == ("low-rank" if leaf.path == "a" else "frozen") and not leaf.built[0]


def test_the_reason_in_the_plan():
    plan = make_plan(product("scan", "plain, then lazy"), PARAMS, X, perturbation=eggroll.LowRank(1))
    expected = "used in a carry of 'scan' that is not the same view of one parameter on every iteration"
    assert plan.leaves[0].reason == expected and expected in plan.table()


def nested(change):
    def apply(params, x):
        def outer(carry):
            return while_loop(lambda c: (jnp.tanh(c[0] @ c[1]), change(params, c[1])), carry, turns=2)

        return scan(outer, (x, params["a"]), turns=2)[0]

    return apply


def reads(weight):
    """A loop that goes on while the weight in its carry says so."""

    def apply(params, x):
        goes_on = lambda c: (weight(c[1]) + c[0]).sum() < 40.0  # noqa: E731
        return jax.lax.while_loop(goes_on, lambda c: (c[0] + 1.0, c[1]), (x[:4], params["a"]))[0] @ params["a"]

    return apply


def stacked(params, x):
    return jax.lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, jnp.stack([jnp.eye(4)] * 2))[0] @ params["a"]


OTHERS = {  # the role of "a"
    "two loops, the same": (nested(lambda p, w: w), "low-rank"),
    "two loops, transposed": (nested(lambda p, w: w.T), "built"),
    "two loops, replaced": (nested(lambda p, w: p["b"]), "built"),
    "the condition multiplies by it": (reads(lambda w: X[:4] @ w), "low-rank"),
    "the condition reads its entries": (reads(jnp.sin), "built"),
    "the condition multiplies by a constant": (
        lambda p, x: jax.lax.while_loop(lambda c: ((c @ p["a"]) ** 2).sum() < 400.0, lambda c: c + 0.1, x),
        "low-rank",
    ),
    "examples end at different times": (
        lambda p, x: (
            jax.vmap(
                lambda row: jax.lax.while_loop(
                    lambda c: (c[1] @ p["a"]).sum() + c[0] < 5.0, lambda c: (c[0] + 1.0, c[1]), (0.0, row)
                )
            )(x)[0][:, None]
            * (x @ p["a"])
        ),
        "low-rank",
    ),
    "stacked results": (lambda p, x: x @ jax.lax.scan(lambda c, _: (c, p["a"]), 0.0, None, length=3)[1][1], "dense"),
    "rows": (lambda p, x: x * jax.lax.scan(lambda c, w: (c + (x @ w).sum(), None), 0.0, p["a"])[0] @ p["a"], "dense"),
    "a loop of plain values": (stacked, "low-rank"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_loops_equal_the_oracle(name):
    function, role = OTHERS[name]
    plan = check(function, PARAMS, X)
    assert ("built" if plan["a"].built[0] else plan["a"].role) == role, plan["a"].reason


@pytest.mark.parametrize("spec", [eggroll.LowRank(1), eggroll.Flipout()], ids=["rademacher", "flipout"])
def test_packed_signs_in_a_carry(spec):
    """Packed before the body, unpacked by the view in it: the same carry."""

    def apply(params, x):
        return scan(lambda c: (jnp.tanh(c[0] @ c[1][0] @ c[1][1]), 0.5 * c[1]), (x, params["w"]))

    plan = check(lambda p, x: apply(p, x)[0], {"w": weights(2, 4, 4)}, X, spec)
    assert plan["w"].role != "dense"


def test_quantised_parameters_that_change_places_are_refused():
    params = {path: (10 * weight).astype(jnp.int8) for path, weight in PARAMS.items()}

    def apply(params, x):
        body = lambda c: (jnp.tanh(c[0] @ c[1].astype(x.dtype)), c[2], c[1])  # noqa: E731
        return scan(body, (x, params["a"], params["b"]))[0]

    with pytest.raises(
        ValueError, match=r"int8 parameter 'a' .* used in a carry of 'scan' that is not the same .* write param.as"
    ):
        make_plan(apply, params, X, perturbation=eggroll.LowRank(1))


def test_a_carry_that_changes_after_planning_is_built():
    """The plan was made for another function of the same parameters."""
    es = strategy(eggroll.LowRank(1))
    state = es.init({"a": PARAMS["a"]}, key=jax.random.key(0))
    es.plan(state, X, function=lambda p, x: x @ p["a"])
    population, function = es.ask(state), product("scan", "transposed")
    outputs, expected = population.apply(function, X), function(population.member(1), X)
    np.testing.assert_allclose(outputs[1][1], expected[1], rtol=1e-4, atol=1e-5)


@pytest.mark.optimized
def test_the_factors_of_a_layer_are_sliced_once(monkeypatch):
    """XLA for CPU would slice them again for every entry of the activations: four times the time of the addition."""
    params, x = {"w": jnp.ones((3, 64, 64))}, jnp.ones((8, 64))

    def layers(params, batch, *_):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), batch, params["w"])[0].sum()

    def sliced_with_activations():
        es = eggroll.EvolutionStrategy(
            layers, population_size=2, sigma=0.1, optimizer=optax.sgd(0.1), perturbation=eggroll.LowRank(2, "normal")
        )
        state = es.init(params, key=jax.random.key(0))
        plan = es.plan(state, x)
        run = jax.jit(lambda state: generation.apply_to_members(es, plan, layers, es.layout, state, x))
        computations = run.lower(state).compile().as_text().split("\n\n")
        return [" dynamic-slice(" in text for text in computations if " tanh(" in text]

    assert sliced_with_activations() == [False]
    monkeypatch.setattr(LowRankDelta, "prepare_slice", lambda self: self)
    assert sliced_with_activations() == [True]
