"""Operands of the cases that kernels are tested with, and the members of their noise in float64."""

import jax.numpy as jnp
import numpy as np

from kernels.factors import Noise, values_of
from kernels.operands import float_operands, integer_operands, update_operands

__all__ = ["float_operands", "integer_operands", "members", "update_operands"]


def members(noise: Noise, *, rank: int, m: int, n: int) -> np.ndarray:
    """sqrt(r) E of every pair, built: float64 [P, m, n]."""
    left, right = (np.asarray(f, np.float64) for f in values_of(noise, rank=rank, rows=m, columns=n, dtype=jnp.float32))
    return np.einsum("pkm,pkn->pmn", left, right)
