"""Random chains of operations on parameters, before random uses of what they give, against members built explicitly."""

import random

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import eggroll
from tests.eggroll.lazy.oracle import evaluated, weights
from tests.tables import by_default

pytestmark = pytest.mark.usefixtures("standard_promotion")
X = weights(4, 6, seed=9)
PARAMS = {
    "w": weights(6, 8, seed=1),
    "u": weights(6, 8, seed=2),
    "q": weights(8, 8, seed=3) / 2,
    "a": weights(6, 2, seed=4),
    "b": weights(2, 8, seed=5),
    "t": jnp.float32(0.7),
    "e": weights(3, 6, 8, seed=6),
}


def gain(p, size):
    """Of a parameter and the batch, so that members have different ones."""
    return 1 + 0.2 * jnp.tanh((p["q"].sum() + X.sum()) * jnp.linspace(-1, 1, size))


def constant(w):
    return np.linspace(0, 1, w.size, dtype=np.float32).reshape(w.shape)


def plus_another(p, w, chance):
    other = {(6, 8): p["u"], (8, 6): p["u"].T}.get(w.shape)
    return w if other is None else chance.choice([lambda: w - other, lambda: other + w])()


def merged(p, w, chance):
    adapter = {(6, 8): lambda: p["a"] @ p["b"], (8, 6): lambda: (p["a"] @ p["b"]).T * p["t"]}.get(w.shape)
    return w if adapter is None else w + adapter()


STEPS = {
    "transpose": lambda p, w, chance: w.T,
    "reverse": lambda p, w, chance: jnp.flip(w, chance.randrange(2)),
    "pad": lambda p, w, chance: jnp.pad(w, ((chance.randrange(2), 0), (0, 1)), constant_values=chance.choice([0.0, 1.0])),
    "slice": lambda p, w, chance: w[chance.randrange(2) :, : max(2, w.shape[1] - 1)],
    "columns": lambda p, w, chance: w * gain(p, w.shape[1]),
    "rows": lambda p, w, chance: gain(p, w.shape[0])[:, None] * w,
    "divide": lambda p, w, chance: w / gain(p, w.shape[1]),
    "number": lambda p, w, chance: w * jnp.exp(p["t"]),
    "half": lambda p, w, chance: 0.5 * w,
    "negate": lambda p, w, chance: -w,
    "constant": lambda p, w, chance: chance.choice([lambda: w + constant(w), lambda: 1.0 - w])(),
    "itself": lambda p, w, chance: w + w[::-1],
    "another": plus_another,
    "adapter": merged,
    "join": lambda p, w, chance: jnp.concatenate([w, chance.choice([w[:1], 2 * w])], axis=0),
    "roll": lambda p, w, chance: jnp.roll(w, 1, axis=chance.randrange(2)),
    "tile": lambda p, w, chance: jnp.tile(w, (1, 2)) if w.shape[1] < 9 else w,
    "stack": lambda p, w, chance: jnp.stack([w, -w])[chance.randrange(2)],
    "look up": lambda p, w, chance: w[jnp.array([0, 2, 1, w.shape[0] + 3])],
    "columns looked up": lambda p, w, chance: w[:, jnp.array([1, 0, 0])],
    "norms": lambda p, w, chance: w / jnp.linalg.norm(w, axis=chance.randrange(2), keepdims=True),
    "norm": lambda p, w, chance: w / jnp.sqrt(1 + optax.tree.norm(w, squared=True)),
    "product": lambda p, w, chance: w @ p["q"] if w.shape[1] == 8 else w,
    "barrier": lambda p, w, chance: jax.lax.optimization_barrier(w),
    "branch": lambda p, w, chance: jax.lax.cond(X[0, 0] > 0, lambda w: w * 2, lambda w: w, w),
    "new row": lambda p, w, chance: w.at[1].set(0.0),
    "tanh": lambda p, w, chance: jnp.tanh(w),
    "centre": lambda p, w, chance: w - w.mean(0),
}
ENDS = {
    "left": lambda w, y, z: y @ w,
    "right": lambda w, y, z: w @ z.T,
    "both": lambda w, y, z: jnp.einsum("bi,ij,bj->b", y, w, z),
    "sums": lambda w, y, z: (w**2).sum(0) + w.sum(),
    "loop": lambda w, y, z: jax.lax.fori_loop(0, 2, lambda _, h: jnp.tanh(h @ w @ w.T), y),
    "vmap": lambda w, y, z: jax.vmap(lambda row: row @ w)(y),
    "scan": lambda w, y, z: jax.lax.scan(lambda s, row: (s + (row * y[0, 0]).sum(), row * 2), 0.0, w)[1],
    "read": lambda w, y, z: y @ w + y @ jnp.abs(w),
}
SPECS = [eggroll.LowRank(1), eggroll.LowRank(2), eggroll.LowRank(2, "normal"), eggroll.Flipout()]


@pytest.mark.parametrize("seed", by_default(range(40), 5))
def test_a_chain_equals_the_oracle(seed):
    """Two chains in one program, next to a product that keeps the noise of every source low-rank."""
    chance = random.Random(seed)
    chains = [
        (chance.choice("wuqe"), chance.choices([*STEPS], k=chance.randint(1, 5)), chance.choice([*ENDS]), chance.random())
        for _ in range(2)
    ]

    def function(p, x):
        outputs = [jnp.einsum("bi,kij->kbj", x, p["e"]), x @ p["w"], x @ p["u"], jnp.tile(x, 2)[:, :8] @ p["q"]]
        for source, steps, end, own in chains:
            choices, w = random.Random(own), p[source]
            w = w[choices.randrange(3)] if source == "e" else w
            for step in steps:
                w = STEPS[step](p, w, choices)
            y = jnp.sin(jnp.outer(x[:, 0], jnp.arange(1, 1 + w.shape[0])))
            outputs.append(ENDS[end](w, y, jnp.cos(jnp.outer(x[:, 1], jnp.arange(1, 1 + w.shape[1])))))
        return outputs

    spec = chance.choice(SPECS)
    with jax.enable_x64(True):
        params, batch = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), (PARAMS, X))
        plan, outputs, oracle = evaluated(function, params, batch, spec)
    assert {plan[source].role for source, *_ in chains} <= {"low-rank", "flipout", "dense" if spec == SPECS[-1] else ""}
    for own, wanted in zip(outputs, oracle, strict=True):
        # Float64 rounds by 1e-16; a chain and its norms amplify that by far less than 1e5.
        np.testing.assert_allclose(own, wanted, rtol=0, atol=1e-11 * np.abs(wanted).max(), err_msg=str(chains))
        assert np.abs(wanted - wanted[:1]).max() > 1e-6 * np.abs(wanted).max()  # control: the members differ by more
