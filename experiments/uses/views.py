"""Elementwise functions and views of weights before a product."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from eggroll.experiments.uses.use import Draw, Use, use

W = {"w": "n n"}
GAINED = {"w": "n n", "s": Draw("n", near=1.0, times=0.3)}
SCALED = {"w": "n n", "s": Draw("", near=0.2)}
PAIR = {"w": "n n", "u": "n n"}


def _of(name: str, view: Any, params: Any = None, **options: Any) -> Use:
    """The product of the inputs with `view(w)`."""
    return use(name, params or W, lambda p, x: x @ view(p["w"]), **options)


def _checkerboard(size: int) -> Any:
    return np.arange(size)[:, None] % 2 == np.arange(size) % 2


def _masked(w: Any) -> Any:
    return w * _checkerboard(w.shape[0]).astype(np.float32)


def _split_thirds(p: Any, x: Any) -> Any:
    q, k, v = jnp.split(p["w"], 3, axis=1)
    return jnp.tanh(x @ q) * (x @ k) + x @ v


def _masked_layers(p: Any, x: Any) -> Any:
    """A masked autoregressive network, as in MADE: constant masks of every layer."""
    for name in ("a", "b", "c"):
        x = jnp.tanh(x @ (p[name] * np.tril(np.ones(p[name].shape, np.float32))))
    return x


USES = (
    _of("-w", lambda w: -w),
    _of("2 * w", lambda w: 2.0 * w),
    _of("w / 3", lambda w: w / 3.0),
    _of("w scaled by sqrt of its rows", lambda w: w * w.shape[0] ** -0.5),
    use("w * s, learnt scalar", SCALED, lambda p, x: x @ (p["w"] * p["s"])),
    use("w * exp(s)", SCALED, lambda p, x: x @ (p["w"] * jnp.exp(p["s"]))),
    use("w * gain per column", GAINED, lambda p, x: x @ (p["w"] * p["s"])),
    use("w * gain per row", GAINED, lambda p, x: x @ (p["w"] * p["s"][:, None])),
    use("w * exp(gain per column)", GAINED, lambda p, x: x @ (p["w"] * jnp.exp(p["s"]))),
    use("w / gain per row", GAINED, lambda p, x: x @ (p["w"] / (1.0 + p["s"][:, None] ** 2))),
    use("w * function of the input", W, lambda p, x: x @ (p["w"] * jnp.cos(x[0]))),
    _of("w + constant matrix", lambda w: w + np.eye(w.shape[0], dtype=np.float32)),
    _of("w + 1", lambda w: w + 1.0),
    _of("w - stop_gradient(w) / 2", lambda w: w - lax.stop_gradient(w) / 2),
    _of("w + w", lambda w: w + w),
    _of("w - mean(w)", lambda w: w - w.mean(0), expected="built"),
    _of("constant mask * w", _masked, expected="built"),
    _of("where(mask, w, 0)", lambda w: jnp.where(_checkerboard(w.shape[0]), w, 0.0), expected="built"),
    _of("where(w > 0, w, w / 10)", lambda w: jnp.where(w > 0, w, w / 10), expected="built"),
    _of("tril(w)", jnp.tril, expected="built"),
    _of("triu(w, 1)", lambda w: jnp.triu(w, 1), expected="built"),
    use("masked layers", {"a": "n n", "b": "n n", "c": "n n"}, _masked_layers, expected="built"),
    _of("clip(w)", lambda w: jnp.clip(w, -0.3, 0.3), expected="built"),
    _of("abs(w)", jnp.abs, expected="built"),
    _of("w ** 2", lambda w: w**2, expected="built"),
    _of("exp(w)", jnp.exp, expected="built"),
    _of("softmax(w)", jax.nn.softmax, expected="built"),
    _of("sign(w), binary weights", jnp.sign, expected="built"),
    _of("round(w), fake quantisation", lambda w: w + lax.stop_gradient(jnp.round(w * 8) / 8 - w), expected="built"),
    _of("reshape to heads and back", lambda w: w.reshape(w.shape[0], 4, -1).reshape(w.shape)),
    _of("reshape that mixes rows and columns", lambda w: w.reshape(-1, w.shape[0] // 2).reshape(w.shape), expected="built"),
    use(
        "flat vector reshaped to a matrix",
        {"w": Draw("32n", times=0.2)},
        lambda p, x: x @ p["w"].reshape(x.shape[1], 32),
        expected="dense",
    ),
    _of("transpose twice", lambda w: w.T.T),
    use("moveaxis", {"w": "4 n n/4"}, lambda p, x: jnp.einsum("bd,dhk->bhk", x, jnp.moveaxis(p["w"], 0, 1))),
    use("swapaxes of a stack", {"w": "3 n n"}, lambda p, x: jax.vmap(lambda w: x @ w)(jnp.swapaxes(p["w"], 1, 2))),
    _of("flip of rows", lambda w: jnp.flip(w, 0)),
    _of("rot90", jnp.rot90),
    _of("roll of columns", lambda w: jnp.roll(w, 1, axis=1)),
    _of("pad of columns", lambda w: jnp.pad(w, ((0, 0), (1, 2)))),
    _of("tile", lambda w: jnp.tile(w, (1, 2))),
    _of("repeat of columns", lambda w: jnp.repeat(w, 2, axis=1), expected="built"),
    use("concatenate of two weights", PAIR, lambda p, x: x @ jnp.concatenate([p["w"], p["u"]], axis=1)),
    use(
        "concatenate of weights and zeros",
        W,
        lambda p, x: x @ jnp.concatenate([p["w"], jnp.zeros_like(p["w"])], axis=1),
        expected="built",
    ),
    use("stack of two weights", PAIR, lambda p, x: jnp.einsum("bi,gij->gbj", x, jnp.stack([p["w"], p["u"]]))),
    use("split into three", {"w": "n 3n"}, _split_thirds),
    use("unstack", {"w": "3 n n"}, lambda p, x: sum(x @ w for w in jnp.unstack(p["w"]))),
    _of("squeeze", lambda w: w[:, 0, :], {"w": "n 1 n"}),
    _of("expand and squeeze", lambda w: w[None].squeeze(0)),
    _of("broadcast to a batch of weights", lambda w: jnp.broadcast_to(w, (3, *w.shape)), expected="built"),
    _of("ravel and unravel", lambda w: w.ravel().reshape(w.shape), expected="built"),
    _of("sort of columns", lambda w: jnp.sort(w, axis=0), expected="built"),
    _of("cumsum of rows", lambda w: jnp.cumsum(w, axis=0), expected="built"),
    _of("diag of a vector", jnp.diag, {"w": "n"}, expected="dense"),
    _of("symmetric part", lambda w: (w + w.T) / 2),
    _of("skew part", lambda w: w - w.T),
    _of("cast to bfloat16 and back", lambda w: w.astype(jnp.bfloat16).astype(jnp.float32)),
    _of("cast to float16 product", lambda w: w.astype(jnp.float16).astype(jnp.float32)),
    use(
        "real part of a complex product",
        W,
        lambda p, x: (x.astype(jnp.complex64) @ p["w"].astype(jnp.complex64)).real,
        expected="built",
    ),
    _of(
        "view of the bits",
        lambda w: lax.bitcast_convert_type(lax.bitcast_convert_type(w, jnp.int32), jnp.float32),
        expected="built",
    ),
)
