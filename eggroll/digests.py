"""The digest of a traced function: equal where the function computes the same from the same constants.

It is of the text of the jaxpr, without addresses, and of the constants that the function closes over. It holds for one version
of JAX: another one may trace the same function differently. The digest is "", not known, where a constant is itself being
traced and where a function runs on the host, of which the jaxpr shows only an address.
"""

import hashlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.extend.core as jexc
import numpy as np

_HOST = re.compile(r"\b(pure|io)_callback\[")
_UNSTABLE = re.compile(r" at 0x[0-9a-f]+|\bname=\S+")


def digest(function: Callable, *args: Any) -> str:
    """Return the digest of `function(*args)`; of the arguments, shapes and dtypes count."""
    return digest_of_jaxpr(jax.make_jaxpr(function)(*args))


def digest_setting(setting: Any, *args: Any) -> str:
    """Return the digest of a setting that is a function; "" if it is none, or does not take these arguments."""
    if not callable(setting):
        return ""
    try:
        return digest(setting, *args)
    except Exception:  # the user's code, with arguments that the run may not call it with
        return ""


def digest_of_jaxpr(jaxpr: jexc.ClosedJaxpr) -> str:
    """Return the SHA-256 of a jaxpr and of its constants, shortened to 16 hexadecimal digits, or ""."""
    constants = [*_constants(jaxpr)]
    if any(isinstance(constant, jax.core.Tracer) for constant in constants) or _HOST.search(text := str(jaxpr.jaxpr)):
        return ""
    hashed = hashlib.sha256(_UNSTABLE.sub("", text).encode())
    for constant in constants:
        if hasattr(constant, "dtype"):
            is_key = jax.dtypes.issubdtype(constant.dtype, jax.dtypes.prng_key)
            array = np.asarray(jax.random.key_data(constant) if is_key else constant)
            hashed.update(f"{array.dtype} {array.shape}".encode() + np.ascontiguousarray(array).tobytes())
        else:
            hashed.update(_UNSTABLE.sub("", repr(constant)).encode())
    return hashed.hexdigest()[:16]


def _constants(jaxpr: jexc.ClosedJaxpr) -> Iterator[Any]:
    yield from jaxpr.consts
    yield from _nested_constants(jaxpr.jaxpr)


def _nested_constants(jaxpr: Any) -> Iterator[Any]:
    for equation in jaxpr.eqns:
        for value in jax.tree.leaves(tuple(equation.params.values()), is_leaf=_is_jaxpr):
            if isinstance(value, jexc.ClosedJaxpr):
                yield from _constants(value)
            elif isinstance(value, jexc.Jaxpr):
                yield from _nested_constants(value)


def _is_jaxpr(value: Any) -> bool:
    return isinstance(value, jexc.ClosedJaxpr | jexc.Jaxpr)
