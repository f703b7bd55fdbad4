"""Lookups: rows, columns and entries of a parameter by constant, computed, negative and out-of-range indices."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from eggroll.experiments.uses.use import ids, use

W = {"w": "2n n"}
ROWS = ids("b", "2n")
OUTSIDE = ids("b", "3n")  # a third is past the end


def _tied(p: Any, tokens: Any) -> Any:
    return jnp.tanh(p["w"][tokens]) @ p["w"].T


def _bag(p: Any, tokens: Any) -> Any:
    return p["w"][tokens].mean(1)


def _segments(p: Any, tokens: Any) -> Any:
    """Sums of looked-up rows by segment."""
    return jax.ops.segment_sum(p["w"][tokens], tokens % 3, 3)


def _mode(mode: str, **options: Any) -> Any:
    return lambda p, i: p["w"].at[i].get(mode=mode, **options)


def _first_and_sum(p: Any, i: Any) -> Any:
    """An out-of-range lookup whose filled rows are replaced, as by a mask."""
    rows = jnp.take(p["w"], i, axis=0, mode="fill", fill_value=0.0)
    return rows.sum(0)


USES = (
    use("w[3]", W, lambda p, x: p["w"][3] * x),
    use("w[3, 2]", W, lambda p, x: p["w"][3, 2] * x),
    use("w[:, 2]", W, lambda p, x: x * p["w"][:8, 2].sum()),
    use("w[2:5]", W, lambda p, x: x @ p["w"][2:5].T),
    use("w[::2]", W, lambda p, x: x @ p["w"][::2]),
    use("w[::-1]", W, lambda p, x: x @ p["w"][::-1].T),
    use("w[-1]", W, lambda p, x: p["w"][-1] * x),
    use("w[..., None]", W, lambda p, x: x @ p["w"][..., None][:, :, 0].T),
    use("w[ids]", W, lambda p, i: p["w"][i], ROWS),
    use("w[ids] of two axes", W, lambda p, i: p["w"][i], ids("b 3", "2n")),
    use("w[i] of a traced scalar", W, lambda p, i: p["w"][i[0]], ROWS),
    use("w[-1 - ids]", W, lambda p, i: p["w"][-1 - i], ROWS),
    use("w[:, ids]", {"w": "n 2n"}, lambda p, i: p["w"][:, i], ROWS),
    use("w[ids, ids]", W, lambda p, i: p["w"][i, i // 2], ROWS),
    use("w[ids][:, ids]", W, lambda p, i: p["w"][i][:, i // 2], ROWS),
    use("w[boolean constant]", W, lambda p, x: x @ p["w"][np.arange(p["w"].shape[0]) % 2 == 0]),
    use("w[ids] past the end", W, lambda p, i: p["w"][i], OUTSIDE),
    use("w[-ids] before the start", W, lambda p, i: p["w"][-i], OUTSIDE),
    use("at[].get(mode='clip')", W, _mode("clip"), OUTSIDE),
    use("at[].get(mode='fill')", W, _mode("fill", fill_value=0.0), OUTSIDE),
    use("at[].get(mode='fill') with NaN", W, lambda p, i: jnp.nan_to_num(_mode("fill")(p, i)), OUTSIDE),
    use("at[].get(mode='promise_in_bounds')", W, _mode("promise_in_bounds"), ROWS),
    use(
        "at[].get(mode='clip'), sorted and unique",
        W,
        _mode("clip", indices_are_sorted=True, unique_indices=True),
        ids("1", "2n"),
    ),
    use("at[].get(mode='wrap') by take", W, lambda p, i: jnp.take(p["w"], i, axis=0, mode="wrap"), OUTSIDE),
    use("take along axis 0", W, lambda p, i: jnp.take(p["w"], i, axis=0), ROWS),
    use("take along axis 1", {"w": "n 2n"}, lambda p, i: jnp.take(p["w"], i, axis=1), ROWS),
    use("take with filled zeros, summed", W, _first_and_sum, OUTSIDE),
    use("take of the flattened matrix", W, lambda p, i: jnp.take(p["w"], i), ROWS),
    use("take_along_axis", W, lambda p, i: jnp.take_along_axis(p["w"], i[:, None], axis=1), ids("2n", "n")),
    use("dynamic_slice", W, lambda p, i: lax.dynamic_slice(p["w"], (i[0], 0), (2, p["w"].shape[1])), ROWS),
    use(
        "dynamic_slice, then a product",
        W,
        lambda p, b: b[1] @ lax.dynamic_slice(p["w"], (b[0][0], 0), (4, p["w"].shape[1])).T,
        [ROWS, "b n"],
    ),
    use(
        "dynamic_slice past the end",
        W,
        lambda p, b: b[1] @ lax.dynamic_slice(p["w"], (b[0][0] + 10_000, 0), (4, p["w"].shape[1])).T,
        [ROWS, "b n"],
    ),
    use(
        "dynamic_index_in_dim",
        {"w": "4 n n"},
        lambda p, b: b[1] @ lax.dynamic_index_in_dim(p["w"], b[0][0], keepdims=False),
        [ids("b", "4"), "b n"],
    ),
    use(
        "dynamic_index_in_dim of an embedding",
        W,
        lambda p, i: lax.dynamic_index_in_dim(p["w"], i[0], keepdims=False),
        ROWS,
    ),
    use("one-hot product", W, lambda p, i: jax.nn.one_hot(i, p["w"].shape[0]) @ p["w"], ROWS),
    use("embedding scaled by sqrt(n)", W, lambda p, i: p["w"][i] * p["w"].shape[1] ** 0.5, ROWS),
    use(
        "table of matrices by ids",
        {"w": "4 n n"},
        lambda p, b: jnp.einsum("bi,bij->bj", b[1], p["w"][b[0]]),
        [ids("b", "4"), "b n"],
    ),
    use("table of matrices by one id", {"w": "4 n n"}, lambda p, b: b[1] @ p["w"][b[0][0]], [ids("b", "4"), "b n"]),
    use(
        "table of matrices past the end",
        {"w": "4 n n"},
        lambda p, b: jnp.einsum("bi,bij->bj", b[1], p["w"].at[b[0]].get(mode="clip")),
        [ids("b", "6"), "b n"],
    ),
    use("vmapped tables", {"w": "3 2n n"}, lambda p, i: jax.vmap(lambda w: w[i])(p["w"]), ROWS),
    use("vmapped lookup of a table", W, lambda p, i: jax.vmap(lambda one: p["w"][one])(i), ROWS),
    use(
        "vmapped tables and ids",
        {"w": "3 2n n"},
        lambda p, i: jax.vmap(lambda w, i: w[i])(p["w"], i),
        ids("3 b", "2n"),
    ),
    use("tied embedding and head", W, _tied, ROWS),
    use("embedding bag", W, _bag, ids("b 3", "2n")),
    use("segment sum of looked-up rows", W, _segments, ROWS),
    use(
        "two embeddings, token and position",
        {"w": "2n n", "u": "b n"},
        lambda p, i: p["w"][i] + p["u"][: i.shape[0]],
        ROWS,
        expected="dense",
    ),
    use("lookup of a bias", {"w": "2n"}, lambda p, i: p["w"][i], ROWS, expected="dense"),
    use("lookup by argmax of logits", {"w": "n 2n", "u": "2n n"}, lambda p, x: p["u"][jnp.argmax(x @ p["w"], -1)]),
    use("scatter into zeros", W, lambda p, i: jnp.zeros_like(p["w"]).at[i].set(p["w"][i]), ROWS),
    use("w.at[ids].set", W, lambda p, i: p["w"].at[i].set(0.0).sum(1), ROWS, expected="built"),
    use("w.at[ids].add", W, lambda p, i: p["w"].at[i].add(1.0), ROWS, expected="built"),
    use("searchsorted of learnt thresholds", {"w": "n"}, lambda p, x: jnp.searchsorted(jnp.sort(p["w"]), x), expected="dense"),
)
