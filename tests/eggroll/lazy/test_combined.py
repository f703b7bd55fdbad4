"""Parameters that are combined, scaled along an axis or moved before their product: right, and the product stays lazy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

import eggroll
from eggroll.lazy.planning import make_plan
from tests.eggroll.lazy.oracle import check, weights
from tests.tables import by_default

X, IMAGES, SERIES = weights(4, 6), weights(2, 5, 5, 4, seed=5), weights(2, 7, 6, seed=15)
PARAMS = {
    "w": weights(6, 8, seed=1),
    "u": weights(6, 8, seed=2),
    "a": weights(6, 2, seed=3),
    "b": weights(2, 8, seed=4),
    "g": 1 + 0.3 * weights(8, seed=5),
    "r": 1 + 0.3 * weights(6, seed=6),
    "t": jnp.float32(0.3),
    "layers": weights(3, 6, 6, seed=7) / 3,
    "down": weights(3, 6, 2, seed=8) / 3,
    "up": weights(3, 2, 6, seed=9) / 3,
    "gains": 1 + 0.3 * weights(3, 6, seed=10),
    "kernel": weights(3, 3, 4, 6, seed=11),
    "grouped": weights(3, 3, 2, 6, seed=12),
    "depthwise": weights(3, 3, 1, 8, seed=13),
}
C = weights(6, 8, seed=14)


def conv(x, kernel, groups=1):
    numbers = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=numbers, feature_group_count=groups)


def scan(layer, *stacks):
    return lambda p, x: jax.lax.scan(lambda h, own: (jnp.tanh(layer(h, *own)), None), x, tuple(p[name] for name in stacks))[0]


def constrained(p, x):
    mesh = jax.make_mesh((1,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))
    return x @ jax.lax.with_sharding_constraint(p["w"], jax.sharding.NamedSharding(mesh, PartitionSpec("i")))


GAINS = {
    "per column": lambda p, x: x @ (p["w"] * p["g"]),
    "per row": lambda p, x: x @ (p["w"] * p["r"][:, None]),
    "both, divided": lambda p, x: x @ (p["r"][:, None] * p["w"] / p["g"]),
    "of a transposed view": lambda p, x: x @ ((p["w"] * p["g"]).T[::-1] * p["r"]).T,
    "on the left": lambda p, x: (p["w"] * p["g"]).T @ x.T,
    "sliced": lambda p, x: x[:, 1:5] @ (p["w"] * p["g"] * p["r"][:, None])[1:5, ::2],
    "weight normalisation": lambda p, x: x @ (p["g"] * p["w"] / jnp.linalg.norm(p["w"], axis=0)),
    "of a batch": lambda p, x: jnp.einsum("bi,kij->kbj", x, p["layers"] * p["gains"][:, None] * p["gains"][:, :1, None]),
    "two contracted axes": lambda p, x: jnp.einsum("ki,kij->j", x[:3], p["layers"] * p["gains"].T[:3, :3][..., None][:, :1]),
    "of stacked layers": scan(lambda h, w, g: h @ (w * g[:, None]), "layers", "gains"),
    "of stacked layers, before the scan": lambda p, x: scan(lambda h, w: h @ w, "layers")(
        {"layers": p["layers"] * p["gains"][:, None] * p["t"]}, x
    ),
    "of channels": lambda p, x: conv(IMAGES, p["kernel"] * p["r"]) * x[0, 0],
}
VIEWS = {
    "reversed": lambda p, x: x @ p["w"][::-1],
    "padded": lambda p, x: x @ jnp.pad(p["w"], ((0, 0), (1, 2))),
    "padded with ones": lambda p, x: jnp.pad(x, ((0, 0), (1, 0))) @ jnp.pad(p["w"], ((1, 0), (0, 1)), constant_values=1.0),
    "tiled": lambda p, x: jnp.tile(x, (1, 2)) @ jnp.tile(p["w"], (2, 3)),
    "unstacked": lambda p, x: x @ jax.lax.unstack(p["layers"])[1],
    "behind a barrier": lambda p, x: x @ jax.lax.optimization_barrier((p["w"], x))[0],
    "put": lambda p, x: x @ jax.device_put((p["w"], x))[0],
    "with a sharding": constrained,
    "plus a constant": lambda p, x: x @ (1 - (np.asarray(C) - p["w"])),
    "transposed convolution": lambda p, x: jax.lax.conv_transpose(
        IMAGES * x[0, 0], p["kernel"].swapaxes(2, 3)[..., :4, :], (2, 2), "SAME", transpose_kernel=True
    ),
    "convolution in groups": lambda p, x: conv(IMAGES * x[0, 0], p["grouped"], 2),
    "convolution of width 1": lambda p, x: conv(IMAGES * x[0, 0], p["w"][None, None, :4]),
    "convolution along a line": lambda p, x: conv(IMAGES * x[0, 0], p["kernel"][0][:, None]),
    "inserted axes": lambda p, x: jnp.einsum("bki,kij->bj", x[:, None], p["w"][None]),
    "depthwise convolution": lambda p, x: conv(IMAGES * x[0, 0], p["depthwise"], 4),
}
COMBINED = {
    "sum": lambda p, x: x @ (p["w"] + p["u"]),
    "difference of a scaled one": lambda p, x: x @ (p["w"] - p["t"] * p["u"] - np.asarray(C)),
    "symmetric part": lambda p, x: x @ (p["layers"][0] + p["layers"][0].T),
    "next to each other": lambda p, x: x @ jnp.concatenate([p["w"], p["a"], p["u"][:, :1]], axis=1),
    "below each other": lambda p, x: jnp.tile(x, (1, 2)) @ jnp.concatenate([p["w"], p["u"]]),
    "joined, transposed, on the left": lambda p, x: jnp.concatenate([p["w"], -p["u"]], axis=1).T @ x.T,
    "joined and scaled": lambda p, x: x @ (jnp.concatenate([p["w"], p["u"]], axis=1) * jnp.exp(p["t"])),
    "rolled": lambda p, x: x @ jnp.roll(p["w"], 3, axis=1),
    "stacked": lambda p, x: jnp.einsum("bi,kij->kbj", x, jnp.stack([p["w"], p["u"], np.asarray(C)])),
    "merged adapter": lambda p, x: x @ (p["w"] + 0.5 * (p["a"] @ p["b"])),
    "merged adapter of layers": scan(lambda h, w, a, b: h @ (w + a @ b).T, "layers", "down", "up"),
    "factors": lambda p, x: (p["a"] @ p["b"]).T @ x.T,
}
SUMS = {
    "L2 penalty": lambda p, x: x @ p["w"] + (p["w"] ** 2).sum(),
    "norms of rows and columns": lambda p, x: (
        (x / jnp.linalg.norm(p["w"], axis=1)) @ (p["w"] / jnp.sqrt(jnp.sum(p["w"] * p["w"], axis=0)))
    ),
    "global norm": lambda p, x: x @ p["w"] / optax.tree.norm({"w": p["w"]}),
    "scaled squares": lambda p, x: x @ p["w"] + jnp.mean(0.5 * p["w"] ** 2 * p["t"] - 1.0),
    "entries": lambda p, x: x @ (p["w"] * p["w"].mean()) + (p["w"] * p["t"]).sum(0),
    "of layers": lambda p, x: (
        jnp.einsum("bi,kij->kbj", x, p["layers"]) + (p["layers"] ** 2).sum((1, 2))[:, None, None] + p["layers"].sum((0, 2))
    ),
}
READ = {  # what is combined has to be built
    "gains between two parameters": lambda p, x: x @ ((p["layers"][0] * p["r"]) @ p["layers"][1]),
    "stacked, what is read": lambda p, x: x @ jnp.stack([p["w"], jnp.concatenate([p["a"], p["w"][:, :6]], axis=1)])[1],
    "three factors": lambda p, x: x @ (p["layers"][0] @ p["layers"][1] @ p["layers"][2]),
    "sum": lambda p, x: x @ jnp.tanh(p["w"] + p["u"]),
    "joined": lambda p, x: x @ jnp.concatenate([p["w"], p["u"]], axis=1).reshape(2, 6, 8)[0],
    "product": lambda p, x: x @ jnp.abs(p["a"] @ p["b"]),
    "gain": lambda p, x: x @ jnp.sort(p["w"] * p["g"], axis=1),
    "sliced by a scan": lambda p, x: jax.lax.scan(lambda s, row: (s + row, None), jnp.zeros(8), p["a"] @ p["b"])[0],
    "squares sliced by a scan": lambda p, x: jax.lax.scan(lambda s, row: (s + row, None), x @ p["w"], 0.5 * p["w"] ** 2)[0],
    "taps of a kernel, then a convolution with it": lambda p, x: (
        sum(SERIES[:, k : k + 5] @ p["layers"][k] for k in range(3)),
        jax.lax.conv_general_dilated(SERIES, p["layers"], (1,), "VALID", dimension_numbers=("NWC", "WIO", "NWC")),
    ),
    "padded with an activation": lambda p, x: x @ jnp.concatenate([p["w"], x.T], axis=1),
    "squares": lambda p, x: x @ (p["w"] ** 2 + 1.0) + x @ (p["w"] * p["w"]),
    "plus an activation": lambda p, x: x @ (p["w"] + x[0, 0]),
    "a sum cast to integers": lambda p, x: (
        (x @ p["w"] - x @ p["u"]).sum() + jnp.sum((p["w"] - p["u"]).astype(int)).astype(x.dtype)
    ),
    "an entry plus a constant": lambda p, x: (x @ p["w"]).sum() + ((p["w"][0, 0] + np.asarray(C)) ** 2).sum(),
    "an entry of a sum plus a constant": lambda p, x: x @ p["w"] + ((p["w"] + p["u"])[0, 0] - np.asarray(C))[0],
}


USES = {
    f"{kind}, {name}": use
    for kind, uses in (("gain", GAINS), ("view", VIEWS), ("several", COMBINED), ("sum", SUMS))
    for name, use in uses.items()
}


DEFAULT = (
    "gain, both, divided",
    "gain, weight normalisation",
    "gain, of a batch",
    "gain, of stacked layers",
    "view, padded with ones",
    "view, behind a barrier",
    "view, convolution in groups",
    "view, convolution along a line",
    "several, difference of a scaled one",
    "several, below each other",
    "several, rolled",
    "several, merged adapter of layers",
    "sum, global norm",
    "sum, norms of rows and columns",
)


@pytest.mark.parametrize("use", by_default(USES, *DEFAULT))
def test_members_equal_the_oracle_without_copies(use):
    plan = check(USES[use], PARAMS, X)
    matrices = [leaf for leaf in plan.values() if len(leaf.shape) > 1 and leaf.role != "frozen" and leaf.path != "gains"]
    assert matrices and {(leaf.role, leaf.evaluation) for leaf in matrices} == {("low-rank", "lazy")}


BUILT = ("sum", "plus an activation", "stacked, what is read", "squares sliced by a scan")


@pytest.mark.parametrize("name", by_default(READ, *BUILT, *filter(lambda name: "a sum" in name, READ)))
def test_what_has_to_be_built_is_right(name):
    check(READ[name], PARAMS, X)


def test_an_adapter_of_a_frozen_matrix_stays_lazy():
    rules = [("w", eggroll.Frozen()), (".*", eggroll.LowRank(2, "normal"))]
    plan = check(COMBINED["merged adapter"], {name: PARAMS[name] for name in "wab"}, X, rules)
    assert {name: (leaf.role, leaf.evaluation) for name, leaf in plan.items() if name != "w"} == dict.fromkeys(
        "ab", ("low-rank", "lazy")
    )


@pytest.mark.parametrize("name", by_default(["below each other", "symmetric part", "merged adapter"], "merged adapter"))
def test_with_shared_noise(name):
    plan = check(COMBINED[name], PARAMS, X, eggroll.Flipout())
    assert {leaf.role for leaf in plan.values()} >= {"flipout"}


def test_int8_weights_may_be_scaled_before_the_product():
    grid = {"w": jnp.round(40 * PARAMS["w"]).astype(jnp.int8), "g": PARAMS["g"]}
    plan = check(lambda p, x: x @ (p["w"].astype(x.dtype) * p["g"]), grid, X)
    assert plan["w"].role == "low-rank" and plan["w"].evaluation == "lazy"


def test_a_parameter_that_no_product_uses():
    """Low-rank where that is far fewer numbers, read in slices or built; dense where it is not, or by rule."""
    functions = {
        "built": lambda p, x: jnp.sort(p["w"], axis=0) @ x,
        "slices": lambda p, x: p["w"][3] + p["w"][5] * x[:24],
        "scanned": lambda p, x: jax.lax.scan(lambda s, w: (s + jnp.abs(w), None), jnp.zeros(24), p["w"])[0],
    }
    wide, narrow, x = {"w": weights(24, 24)}, {"w": weights(2, 24)}, weights(24)
    plans = {name: check(function, wide, x, eggroll.LowRank(2))["w"] for name, function in functions.items()}
    assert (plans["built"].role, plans["built"].evaluation, plans["built"].rank) == ("built", "copy", 2)
    assert plans["slices"].role == "low-rank" and plans["slices"].copy_bytes == 24 * 4
    assert plans["scanned"].role == "dense"  # a vector in every slice
    for params, rules in ((narrow, eggroll.LowRank()), (wide, [("w", eggroll.Dense())])):
        assert make_plan(functions["scanned"], params, x, perturbation=rules).leaves[0].role == "dense"
    assert make_plan(functions["built"], wide, x, perturbation=eggroll.Flipout()).leaves[0].role == "dense"
