"""Parameters that meet parameters, and linear algebra of weights."""

from typing import Any

import jax
import jax.numpy as jnp
import jax.scipy.linalg as jsl

from eggroll.experiments.uses.use import Draw, Use, use

W = {"w": "n n"}
PAIR = {"w": "n n", "u": "n n"}
ADAPTED = {"w": "n n", "a": "n 4", "b": "4 n"}


def _solid(w: Any) -> Any:
    """A well-conditioned matrix."""
    return w + 4.0 * jnp.eye(w.shape[0])


def _positive(w: Any) -> Any:
    return w @ w.T + jnp.eye(w.shape[0])


def _of(name: str, matrix: Any, **options: Any) -> Use:
    return use(name, W, lambda p, x: x @ matrix(p["w"]), **{"expected": "dense"} | options)


def _cayley(w: Any) -> Any:
    skew, eye = w - w.T, jnp.eye(w.shape[0])
    return jnp.linalg.solve(eye + skew, eye - skew)


def _weight_norm(p: Any, x: Any) -> Any:
    return x @ (p["w"] * (p["g"] / jnp.linalg.norm(p["w"], axis=0)))


def _spectral_norm(p: Any, x: Any) -> Any:
    """One power iteration."""
    v = p["w"] @ x[0]
    v = v / jnp.linalg.norm(v)
    return x @ p["w"] / (v @ p["w"] @ p["w"].T @ v) ** 0.5


def _hypernetwork(p: Any, x: Any) -> Any:
    weights = jnp.tanh(x[0] @ p["h"]).reshape(x.shape[1], 4)
    return x @ weights


def _hypernetwork_of_embedding(p: Any, x: Any) -> Any:
    """Weights generated from a learnt code."""
    return x @ (p["code"] @ p["h"]).reshape(x.shape[1], 4)


def _tensor_train(p: Any, x: Any) -> Any:
    return jnp.einsum("bij,irp,rjq->bpq", x.reshape(x.shape[0], 4, -1), p["g"], p["h"])


def _merged_train(p: Any, x: Any) -> Any:
    """The cores are contracted first."""
    return jnp.einsum("bij,ijpq->bpq", x.reshape(x.shape[0], 4, -1), jnp.einsum("irp,rjq->ijpq", p["g"], p["h"]))


def _kron(p: Any, x: Any) -> Any:
    return x @ jnp.kron(p["a"], p["b"])


def _queries(p: Any, x: Any) -> Any:
    """Learnt queries, as in a perceiver."""
    scores = (p["q"] @ p["k"]) @ x.T
    return jax.nn.softmax(scores) @ x


def _initial(p: Any, x: Any) -> Any:
    return jnp.tanh(p["h"] @ p["w"] + x)


def _prototypes(p: Any, x: Any) -> Any:
    """Squared distances to learnt prototypes."""
    return jnp.sum((x[:, None] - p["w"][None]) ** 2, -1)


def _codebook(p: Any, x: Any) -> Any:
    """Vector quantisation: the nearest row replaces the input."""
    return p["w"][jnp.argmin(_prototypes(p, x), -1)]


USES = (
    use("h0 @ w, learnt initial state", {"h": "n", "w": "n n"}, _initial),
    use("learnt queries @ w", {"q": "4 n", "k": "n n"}, _queries, expected="dense"),
    use("merged adapter, x @ (w + a @ b)", ADAPTED, lambda p, x: x @ (p["w"] + p["a"] @ p["b"])),
    use("parallel adapter, x @ w + x @ a @ b", ADAPTED, lambda p, x: x @ p["w"] + x @ p["a"] @ p["b"]),
    use("adapter with its scale", ADAPTED, lambda p, x: x @ p["w"] + 2.0 * ((x @ p["a"]) @ p["b"])),
    use("low-rank factorisation, x @ (a @ b)", {"a": "n 4", "b": "4 n"}, lambda p, x: x @ (p["a"] @ p["b"])),
    use("a @ (b @ x)", {"a": "n 4", "b": "4 n"}, lambda p, x: p["a"] @ (p["b"] @ x.T)),
    use("w * u", PAIR, lambda p, x: x @ (p["w"] * p["u"]), expected="built"),
    use("w + u", PAIR, lambda p, x: x @ (p["w"] + p["u"])),
    use(
        "interpolation of two weights",
        {"w": "n n", "u": "n n", "t": ""},
        lambda p, x: x @ (p["t"] * p["w"] + (1 - p["t"]) * p["u"]),
    ),
    use("tensor train", {"g": "4 3 n", "h": "3 n/4 4"}, _tensor_train),
    use("tensor train, merged", {"g": "4 3 n", "h": "3 n/4 4"}, _merged_train, expected="dense"),
    use("bilinear x^T w y", W, lambda p, x: jnp.einsum("bi,ij,bj->b", x, p["w"], x[::-1])),
    use("bilinear layer", {"w": "4 n n"}, lambda p, x: jnp.einsum("bi,kij,bj->bk", x, p["w"], jnp.sin(x))),
    _of("w @ w", lambda w: w @ w),
    _of("gram w.T @ w", lambda w: w.T @ w),
    use("w @ u before x", PAIR, lambda p, x: x @ (p["w"] @ p["u"])),
    _of("matrix_power(w, 3)", lambda w: jnp.linalg.matrix_power(w, 3)),
    use("kron(a, b)", {"a": "4 4", "b": "n/4 n/4"}, _kron, expected="dense"),
    use("outer product of two vectors", {"a": "n", "b": "n"}, lambda p, x: x @ jnp.outer(p["a"], p["b"]), expected="dense"),
    use("hypernetwork of the input", {"h": "n 4n"}, _hypernetwork),
    use("hypernetwork of a learnt code", {"code": "8", "h": "8 4n"}, _hypernetwork_of_embedding),
    use("weight norm", {"w": "n n", "g": Draw("n", near=1.0, times=0.1)}, _weight_norm),
    use("spectral norm", W, _spectral_norm),
    _of("columns of norm one", lambda w: w / jnp.linalg.norm(w, axis=0)),
    _of("orthogonal by qr", lambda w: jnp.linalg.qr(_solid(w))[0]),
    _of("orthogonal by cayley", _cayley),
    _of("orthogonal by expm", lambda w: jsl.expm(w - w.T)),
    _of("inv(w)", lambda w: jnp.linalg.inv(_solid(w))),
    use("solve(w, x)", W, lambda p, x: jnp.linalg.solve(_solid(p["w"]), x.T), expected="built"),
    use("solve_triangular(w, x)", W, lambda p, x: jsl.solve_triangular(_solid(p["w"]), x.T), expected="built"),
    _of("cholesky", lambda w: jnp.linalg.cholesky(_positive(w))),
    use("eigvalsh", W, lambda p, x: x @ p["w"] + jnp.linalg.eigvalsh(_positive(p["w"]))),
    use("singular values", W, lambda p, x: x @ p["w"] + jnp.linalg.svd(p["w"], compute_uv=False)),
    use("log determinant", W, lambda p, x: x @ p["w"] + jnp.linalg.slogdet(_solid(p["w"]))[1]),
    use(
        "fft of weights",
        {"w": "n"},
        lambda p, x: jnp.fft.irfft(jnp.fft.rfft(x) * jnp.fft.rfft(p["w"]), x.shape[-1]),
        expected="dense",
    ),
    _of("fft of a matrix", lambda w: jnp.abs(jnp.fft.fft(w, axis=0))),
    use("complex parameters", {"w": Draw("n n", "complex64", times=0.2)}, lambda p, x: jnp.abs(x @ p["w"]), expected="refused"),
    use("complex weights from two parts", PAIR, lambda p, x: jnp.abs(x @ jax.lax.complex(p["w"], p["u"])), expected="built"),
    use("toeplitz matrix of a vector", {"w": "n"}, lambda p, x: x @ jsl.toeplitz(p["w"]), expected="dense"),
    use("distances to prototypes", {"w": "4 n"}, _prototypes, expected="dense"),
    use(
        "distances to prototypes by products",
        {"w": "4 n"},
        lambda p, x: -2 * x @ p["w"].T + jnp.sum(p["w"] ** 2, 1),
    ),
    use("vector quantisation", {"w": "4 n"}, _codebook),
)
