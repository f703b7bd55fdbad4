"""Products of every form, and convolutions."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from eggroll.experiments.uses.use import Draw, use

W = {"w": "n n"}
HEADS = {"w": "n 4 n/4"}
IMAGES = "b 8 8 n/4"


def _batched_dot(p: Any, x: Any) -> Any:
    """Batch axes of x and w in `dot_general`."""
    return lax.dot_general(x.reshape(x.shape[0], 4, -1), p["w"], (((2,), (1,)), ((1,), (0,))))


def _accumulate(p: Any, x: Any) -> Any:
    return lax.dot_general(x.astype(jnp.bfloat16), p["w"], (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)


def _conv(spatial: str, **options: Any) -> Any:
    numbers = (f"N{spatial}C", f"{spatial}IO", f"N{spatial}C")

    def function(p: Any, x: Any) -> Any:
        settings = {"window_strides": (1,) * len(spatial), "padding": "SAME", "dimension_numbers": numbers} | options
        return jnp.tanh(lax.conv_general_dilated(x, p["w"], **settings))

    return function


def _depthwise(p: Any, x: Any) -> Any:
    return _conv("HW", feature_group_count=x.shape[-1])(p, x)


def _patches(p: Any, x: Any) -> Any:
    """A convolution as a product with extracted patches."""
    patches = lax.conv_general_dilated_patches(x, (3, 3), (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    return patches @ p["w"]


def _oihw(p: Any, x: Any) -> Any:
    """Channels first, as in torch."""
    return lax.conv_general_dilated(x, p["w"], (1, 1), "VALID", dimension_numbers=("NCHW", "OIHW", "NCHW"))


USES = (
    use("x @ w", W, lambda p, x: x @ p["w"]),
    use("w @ x", W, lambda p, x: p["w"] @ x.T),
    use("w @ vector", W, lambda p, x: p["w"] @ x[0]),
    use("vector @ w", W, lambda p, x: x[0] @ p["w"]),
    use("x @ w.T", W, lambda p, x: x @ p["w"].T),
    use("x @ w + b", {"w": "n 2n", "b": "2n"}, lambda p, x: x @ p["w"] + p["b"]),
    use("x @ w @ w.T, tied autoencoder", {"w": "n n/2"}, lambda p, x: jnp.tanh(x @ p["w"]) @ p["w"].T),
    use("einsum of 2 operands, heads", HEADS, lambda p, x: jnp.einsum("bd,dhk->bhk", x, p["w"])),
    use(
        "einsum of 2 operands, heads to model",
        {"w": "4 n/4 n"},
        lambda p, x: jnp.einsum("bhk,hkd->bd", x.reshape(-1, 4, p["w"].shape[1]), p["w"]),
    ),
    use("einsum of 3 operands, chain", {"w": "n n", "u": "n n"}, lambda p, x: jnp.einsum("bi,ij,jk->bk", x, p["w"], p["u"])),
    use("einsum of 3 operands, one parameter", W, lambda p, x: jnp.einsum("bi,ij,bj->b", x, p["w"], jnp.sin(x))),
    use("einsum with a gate per column", {"w": "n n"}, lambda p, x: jnp.einsum("bi,ij,bj->bj", x, p["w"], jnp.cos(x))),
    use(
        "einsum over a batch of weights",
        {"w": "4 n/4 n"},
        lambda p, x: jnp.einsum("bgi,gij->bgj", x.reshape(-1, 4, p["w"].shape[1]), p["w"]),
    ),
    use("einsum that sums an axis away", W, lambda p, x: jnp.einsum("bi,ij->b", x, p["w"]), expected="built"),
    use("einsum of a diagonal", W, lambda p, x: jnp.einsum("bi,ii->bi", x, p["w"]), expected="built"),
    use("dot_general with batch axes", {"w": "4 n/4 n"}, _batched_dot),
    use("dot_general over both axes", W, lambda p, x: jnp.tensordot(jnp.outer(x[0], x[1]), p["w"], 2)),
    use("tensordot over two axes", {"w": "4 n/4 n"}, lambda p, x: jnp.tensordot(x.reshape(-1, 4, p["w"].shape[1]), p["w"], 2)),
    use("vmap over a table of weights", {"w": "3 n n"}, lambda p, x: jax.vmap(lambda w: jnp.tanh(x @ w))(p["w"])),
    use(
        "vmap over weights and inputs",
        {"w": "4 n/4 n"},
        lambda p, x: jax.vmap(jnp.matmul, (1, 0))(x.reshape(-1, 4, x.shape[1] // 4), p["w"]),
    ),
    use("preferred_element_type", {"w": Draw("n n", "bfloat16", times=0.2)}, _accumulate),
    use("bfloat16 throughout", {"w": Draw("n n", "bfloat16", times=0.2)}, lambda p, x: x @ p["w"], Draw("b n", "bfloat16")),
    use("float16 throughout", {"w": Draw("n n", "float16", times=0.2)}, lambda p, x: x @ p["w"], Draw("b n", "float16")),
    use("bfloat16 weights, float32 inputs", {"w": Draw("n n", "bfloat16", times=0.2)}, lambda p, x: x @ p["w"].astype(x.dtype)),
    use("float32 weights, bfloat16 product", W, lambda p, x: x @ p["w"].astype(x.dtype), Draw("b n", "bfloat16")),
    use(
        "int8 weights, converted and rescaled",
        {"w": Draw("n n", "int8", times=20.0), "s": Draw("n", near=0.01, times=0.002)},
        lambda p, x: (x @ p["w"].astype(x.dtype)) * p["s"],
    ),
    use(
        "int8 weights, scaled before the product",
        {"w": Draw("n n", "int8", times=20.0), "s": Draw("n", near=0.01, times=0.002)},
        lambda p, x: x @ (p["w"].astype(x.dtype) * p["s"]),
    ),
    use(
        "int8 weights, multiplied as integers",
        {"w": Draw("n n", "int8", times=20.0)},
        lambda p, x: lax.dot(x.astype(jnp.int8), p["w"], preferred_element_type=jnp.int32),
        expected="refused",
    ),
    use("precision='highest'", W, lambda p, x: jnp.dot(x, p["w"], precision="highest")),
    use("inner and outer", {"w": "n n", "v": "n"}, lambda p, x: jnp.inner(x, p["w"]) + jnp.outer(x[0], p["v"])[0]),
    use("matvec by multiply and sum", W, lambda p, x: (x[:, :, None] * p["w"]).sum(1), expected="built"),
    use("linalg.multi_dot", {"w": "n n", "u": "n n/2"}, lambda p, x: jnp.linalg.multi_dot([x, p["w"], p["u"]])),
    use("conv 1d", {"w": "3 n/4 n"}, _conv("W"), "b 8 n/4"),
    use("conv 2d", {"w": "3 3 n/4 n"}, _conv("HW"), IMAGES),
    use("conv 3d", {"w": "2 2 2 n/4 n/2"}, _conv("DHW"), "b 4 4 4 n/4"),
    use("conv 1x1", {"w": "1 1 n/4 n"}, _conv("HW"), IMAGES),
    use("conv with strides, padded", {"w": "3 3 n/4 n"}, _conv("HW", window_strides=(2, 2), padding="VALID"), IMAGES),
    use("conv depthwise", {"w": "3 3 1 n/4"}, _depthwise, IMAGES),
    use("conv in 2 groups", {"w": "3 3 n/8 n"}, _conv("HW", feature_group_count=2), IMAGES),
    use("conv dilated", {"w": "3 3 n/4 n"}, _conv("HW", rhs_dilation=(2, 2)), IMAGES),
    use("conv transposed", {"w": "3 3 n/4 n"}, _conv("HW", lhs_dilation=(2, 2), padding=((1, 2), (1, 2))), IMAGES),
    use(
        "conv_transpose with flipped kernel",
        {"w": "3 3 n n/4"},
        lambda p, x: lax.conv_transpose(x, p["w"], (2, 2), "SAME", transpose_kernel=True),
        IMAGES,
    ),
    use("conv channels first", {"w": "n n/4 3 3"}, _oihw, "b n/4 8 8"),
    use("conv as a product with patches", {"w": "9n/4 n"}, _patches, IMAGES),
    use("jnp.convolve with a learnt filter", {"w": "5"}, lambda p, x: jnp.convolve(x[0], p["w"]), expected="dense"),
)
