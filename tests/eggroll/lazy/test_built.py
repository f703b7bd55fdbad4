"""Uses without a rule next to products, two parameters that meet, and numbers that wait: right, and the product stays lazy."""

import jax
import jax.numpy as jnp
import optax
import pytest

import eggroll
from tests.eggroll.lazy.oracle import check, weights

X = weights(4, 6)
SQUARE = {"w": weights(6, 6, seed=1), "u": weights(6, 6, seed=2), "s": jnp.float32(0.3), "h": weights(6, seed=3)}


def loop(body):
    return lambda p, x: jax.lax.fori_loop(0, 3, lambda _, h: jnp.tanh(body(p, h)), x)


BUILT = {  # members read the whole of "w" as well
    "an L1 penalty": lambda p, x: ((x @ p["w"]) ** 2).sum() + jnp.abs(p["w"]).sum(),
    "a global norm": lambda p, x: (x @ p["w"]) / jnp.sqrt(jnp.vdot(p["w"], p["w"])),
    "a monitor": lambda p, x: jnp.where(jnp.isfinite(p["w"]).all(), x @ p["w"], 0.0),
    "both sides": lambda p, x: x @ p["w"] + jnp.trace(p["w"]),
    "returned": lambda p, x: (x @ p["w"], p["w"]),
    "in a loop": loop(lambda p, h: h @ p["w"] + 0.01 * jnp.sum(jnp.abs(p["w"]))),
}
LAZY = {  # "w" is only multiplied
    "times itself": lambda p, x: x @ (p["w"] @ p["w"]),
    "plus a product of others": lambda p, x: x @ (p["w"] + p["u"] @ p["u"]) + x @ p["w"],
    "a learnt initial state": lambda p, x: jnp.tanh(p["h"] @ p["w"] + x @ p["w"]),
    "queries": lambda p, x: p["h"][None] @ p["w"],
    "a learnt scale": lambda p, x: x @ (p["w"] * jnp.exp(p["s"])),
    "a scale on the left of a transposed view": lambda p, x: x @ (jnp.exp(p["s"]) * p["w"]).T,
    "a parameter as a number": loop(lambda p, h: h @ (p["w"] / p["s"])),
    "two numbers": lambda p, x: x @ (p["w"] * p["s"] * jnp.exp(p["s"]) / jnp.sqrt(2.0)),
    "spectral normalisation": lambda p, x: x @ (p["w"] / jnp.linalg.norm(p["w"] @ jnp.ones(6))),
    "a scale before a conditional": lambda p, x: jax.lax.cond(
        x[0, 0] > 0, lambda w: x @ w, lambda w: x @ w * 2, p["w"] * p["s"]
    ),
    "a scale and its sign": lambda p, x: x @ -(p["w"] * jnp.exp(p["s"])),
    "a scaled lookup by take": lambda p, x: jnp.take(p["w"] * jnp.exp(p["s"]), jnp.array([0, 9]), axis=0),
    "a scaled parameter meets a smaller one": lambda p, x: x @ ((p["w"] * p["s"]) @ p["h"][:, None]),
    "a scaled embedding": lambda p, x: (p["w"] * p["s"])[jnp.array([0, 3, 5])],
}


@pytest.mark.parametrize("use", [*BUILT, *LAZY])
def test_members_equal_the_oracle(use):
    function = (BUILT | LAZY)[use]
    plan = check(function, {name: SQUARE[name] for name in SQUARE if f"'{name}'" in _names(function)}, X)
    assert plan["w"].role == "low-rank" and (plan["w"].evaluation == "lazy + built") == (use in BUILT)


def _names(function):
    """The parameters that a function names."""
    used = set()

    class Params(dict):
        def __getitem__(self, name):
            used.add(name)
            return super().__getitem__(name)

    jax.eval_shape(lambda x: function(Params(SQUARE), x), X)
    return {f"'{name}'" for name in used}


def test_stacked_layers_with_a_scale():
    params = {"w": weights(3, 6, 6), "s": jnp.float32(0.5)}
    plan = check(lambda p, x: jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p["w"] * p["s"])[0], params, X)
    assert plan["w"].stack == (0,) and plan["w"].evaluation == "lazy"


def test_a_learnt_scale_gives_no_member_a_copy_of_the_weights():
    """The evaluation's arrays are activations, and not one [members, rows, columns]."""
    params = {"w": weights(64, 48), "s": jnp.float32(0.5)}
    es = eggroll.EvolutionStrategy(None, population_size=8, sigma=0.1, optimizer=optax.sgd(0.1))
    state, x = es.init(params, key=jax.random.key(0)), weights(3, 64)

    def shapes(function):
        es.plan(state, x, function=function)
        text = str(jax.make_jaxpr(lambda x: es.ask(state).apply(function, x))(x))
        return [size for size in ("[4,2,64,48]", "[2,4,64,48]", "[8,64,48]", "[2,64,48]") if size in text]

    assert not shapes(lambda p, x: x @ (p["w"] * jnp.exp(p["s"])))
    assert shapes(lambda p, x: x @ p["w"] + jnp.abs(p["w"]).sum())  # the control


def test_a_scale_survives_a_cast_to_short_floats():
    """Rounded to bfloat16 itself, the scale of almost every member would be 1."""
    params = {"w": weights(32, 32) / 16, "s": jnp.float32(0)}
    rules = [("w", eggroll.LowRank(sigma_multiplier=1e-6)), ("s", eggroll.Dense())]
    es = eggroll.EvolutionStrategy(None, population_size=8, sigma=1e-3, optimizer=optax.sgd(0.1), perturbation=rules)

    def function(p, x):
        scaled = (p["w"] * jnp.exp(p["s"])).astype(jnp.bfloat16)
        return jax.lax.dot_general(x.astype(jnp.bfloat16), scaled, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)

    outputs = es.ask(es.init(params, key=jax.random.key(0))).apply(function, weights(4, 32))
    assert len(jnp.unique(outputs.sum(axis=(1, 2)))) > 4


def test_a_small_scale_of_half_floats_comes_before_the_product():
    params = {"w": (20 * weights(6, 6)).astype(jnp.float16), "s": jnp.float16(1e-3)}
    es = eggroll.EvolutionStrategy(None, population_size=4, sigma=1e-4, optimizer=optax.sgd(0.1))
    state = es.init(params, key=jax.random.key(0))
    outputs = es.ask(state).apply(lambda p, x: (4000 * x) @ (p["w"] * p["s"]), weights(4, 6).astype(jnp.float16))
    assert jnp.isfinite(outputs).all()


def test_only_the_parameter_to_blame_is_built():
    def function(p, x):
        turn = lambda c, w: (c + (x @ p["f"])[:, :1] * w[0], None)  # noqa: E731
        return jax.lax.scan(turn, jnp.zeros((4, 1)), p["v"])[0] + x @ p["v"]

    plan = check(function, {"f": weights(6, 6), "v": weights(6, 6, seed=5)}, X)
    assert plan["v"].built[0] and not plan["f"].built[0]


def test_a_later_function_may_build_what_the_first_one_multiplies():
    es = eggroll.EvolutionStrategy(None, population_size=4, sigma=0.1, optimizer=optax.sgd(0.1))
    state = es.init({"w": weights(6, 6)}, key=jax.random.key(0))
    es.plan(state, X, function=lambda p, x: x @ p["w"])
    population = es.ask(state)
    outputs = population.apply(lambda p, x: (p["w"] ** 2).sum(), X)
    assert jnp.allclose(outputs[1], (population.member(1)["w"] ** 2).sum(), rtol=1e-5)


def test_a_function_may_close_over_a_traced_value():
    es = eggroll.EvolutionStrategy(None, population_size=4, sigma=0.1, optimizer=optax.sgd(0.1))
    state = es.init({"w": weights(6, 6)}, key=jax.random.key(0))
    outputs = jax.jit(lambda state, t: es.ask(state).apply(lambda p, x: t * (x @ p["w"]), X))(state, 2.0)
    assert outputs.shape == (4, 4, 6)


def test_stacked_layers_with_a_scale_are_not_copied():
    params = {"w": weights(3, 64, 48), "v": weights(3, 48, 64), "s": jnp.float32(0.5)}
    es = eggroll.EvolutionStrategy(None, population_size=8, sigma=0.1, optimizer=optax.sgd(0.1))
    state, x = es.init(params, key=jax.random.key(0)), weights(3, 64)

    def function(p, x):
        scaled = p["w"] * jnp.exp(p["s"]), p["v"] * jnp.exp(p["s"])
        return jax.lax.scan(lambda h, layer: (jnp.tanh(h @ layer[0] @ layer[1]), None), x, scaled)[0]

    es.plan(state, x, function=function)
    text = str(jax.make_jaxpr(lambda x: es.ask(state).apply(function, x))(x))
    assert not [
        size for size in ("[4,2,3,64,48]", "[3,4,2,64,48]", "[3,8,64,48]", "[8,3,64,48]", "[4,2,64,48]") if size in text
    ]
