"""The measured cases of every kernel, each as calls without arguments, with operations and bytes.

    plain       the product of the same inputs without noise: one jnp product; for an update, one of ready bfloat16 factors
    dense       the noise of every pair, materialised beforehand, then multiplied; for one small case
    reference   the operation in plain JAX
    mosaic_gpu  the kernel: with the tiles it chooses, then with others, named in the row

A named implementation runs or raises. Operations and bytes of a case are those of its plain product.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from eggroll.kernels import hopper, operands
from eggroll.kernels.factors import Noise, values_of
from eggroll.kernels.groups import Groups
from eggroll.kernels.int8_dot import cases as int8_cases
from eggroll.kernels.int8_dot import config as int8_config
from eggroll.kernels.int8_dot.api import int8_dot
from eggroll.kernels.lowrank_dot import cases as dot_cases
from eggroll.kernels.lowrank_dot import config as dot_config
from eggroll.kernels.lowrank_dot.api import lowrank_dot
from eggroll.kernels.lowrank_update import cases as update_cases
from eggroll.kernels.lowrank_update import config as update_config
from eggroll.kernels.lowrank_update.api import lowrank_update

DENSE = "policy-mlp"  # the case whose noise is materialised
LARGEST_SMALL = {"pairs": 8, "rows": 4, "m": 256, "n": 256}  # sizes of a shrunk case, at most
TWO_ROUNDINGS = 2.0**-6  # to bfloat16, relative to the largest result
HIDDEN: tuple[Literal["inside", "before"], ...] = ("inside", "before")
FORMS = {"values": "given", "words": "packed", "keys": "drawn on the fly"}


class Call(NamedTuple):
    """One implementation of a case."""

    run: Callable[[], Any]
    config: Any = None  # of the kernel
    checked: bool = True  # whether its result is compared with the reference's


class Work(NamedTuple):
    """One case of one operation."""

    op: str
    case: str
    shape: str
    calls: dict[str, Call]
    operations: float
    bytes: float
    dtype: str = "bfloat16"  # of the products
    tolerance: float = TWO_ROUNDINGS  # of a result, relative to the largest of the reference's


def works(op: str, *, small: bool) -> list[tuple[str, Callable[[], Work]]]:
    """Names of the measured cases of an operation, and functions that make them with their operands."""
    measured: dict[str, tuple[Callable[[Any], Work], list]] = {
        "lowrank_dot": (_dot, dot_cases.MEASURED),
        "lowrank_update": (_update, update_cases.MEASURED),
        "int8_dot": (_int8, int8_cases.MEASURED),
        "together": (_together, [case for case in dot_cases.MEASURED if case.name.startswith("paper-")]),
    }
    make, cases = measured[op]
    return [(case.name, functools.partial(make, _shrink(case) if small else case)) for case in cases]


def bound(function: Callable, *arguments: Any) -> Callable[[], Any]:
    """Compile the function and bind its arguments."""
    jitted = jax.jit(function)
    return lambda: jitted(*arguments)


def _shrink(case: Any) -> Any:
    return case._replace(
        **{name: min(getattr(case, name), most) for name, most in LARGEST_SMALL.items() if name in case._fields}
    )


def _shape(case: Any, noise: str) -> str:
    rows = f" x {case.rows}" if "rows" in case._fields else ""
    return f"{case.pairs}{rows}, {case.m} x {case.n}, rank {case.rank}, {noise}"


def _calls(
    make_call: Callable[[str, Any], Callable[[], Any]], chosen: Any, others: Iterable[Any], fit: Callable
) -> dict[str, Call]:
    """The reference, the kernel with its own tiles, and with other tiles cut to fit; a call whose tiles do not fit raises."""
    calls = {"reference": Call(make_call("reference", None)), "mosaic_gpu": Call(make_call("mosaic_gpu", None), chosen)}
    for config in others:
        name = f"mosaic_gpu {config.tile_columns}" + (f" {config.hidden}" if hasattr(config, "hidden") else "")
        try:
            fitting = fit(config)
            calls[name] = Call(make_call("mosaic_gpu", fitting), fitting)
        except NotImplementedError as error:
            calls[name] = Call(functools.partial(_raise, error), config)
    return calls


def _raise(error: Exception) -> None:
    raise error


def _neighbours(n: int, chosen: int) -> list[int]:
    """Widths of tiles next to the chosen one."""
    return [columns for columns in (64, 128, 256) if n % columns == 0 and columns in (chosen // 2, 2 * chosen)]


def _dot(case: dot_cases.Case) -> Work:
    from eggroll.kernels.lowrank_dot.mosaic_gpu import least_terms

    x, w, noise, scale = operands.float_operands(case)
    groups = Groups.of(case.pairs, case.rows, case.rank, least_terms=least_terms(noise))
    chosen = dot_config.choose(groups, case.m, case.n)

    def make_call(implementation: str, config: Any) -> Callable[[], Array]:
        dot = functools.partial(lowrank_dot, rank=case.rank, implementation=implementation, config=config)
        return bound(lambda x, w, noise, scale: dot(x, w, noise, scale=scale), x, w, noise, scale)

    widths = [chosen.tile_columns, *_neighbours(case.n, chosen.tile_columns)]
    tiles = [dot_config.Config(columns, hidden=hidden) for columns in widths for hidden in HIDDEN]
    others = [tile for tile in tiles if (tile.tile_columns, tile.hidden) != (chosen.tile_columns, chosen.hidden)]
    calls = {"plain": _plain(x, w, jnp.bfloat16)}
    calls |= _calls(make_call, chosen, others, lambda config: dot_config.fit(config, groups, case.m))
    if case.name == DENSE:
        built = jax.jit(functools.partial(_build_noise, case))(noise)
        calls["dense"] = Call(bound(_dense, x, w, built, scale))
    return Work("lowrank_dot", case.name, _shape(case, FORMS[case.form]), calls, *_size(case, 2, 2))


def _update(case: update_cases.Case) -> Work:
    coefficients, noise = operands.update_operands(case)
    terms = -(-case.pairs * case.rank // hopper.STEP) * hopper.STEP
    packed = case.form != "values"
    chosen = update_config.choose(case.m, case.n, terms, packed=packed)

    def make_call(implementation: str, config: Any) -> Callable[[], Array]:
        update = functools.partial(lowrank_update, rank=case.rank, rows=case.m, columns=case.n)
        return bound(functools.partial(update, implementation=implementation, config=config), coefficients, noise)

    others = [update_config.Config(columns) for columns in _neighbours(case.n, chosen.tile_columns)]
    calls = _calls(make_call, chosen, others, lambda config: update_config.fit(config, terms, packed=packed))
    count, (m, n) = case.pairs * case.rank, (case.m, case.n)
    size = 2.0 * count * m * n, 2.0 * count * (m + n) + 4.0 * m * n
    return Work(
        "lowrank_update", case.name, _shape(case, FORMS[case.form]), {"plain": _factor_product(case, noise)} | calls, *size
    )


def _int8(case: int8_cases.Case) -> Work:
    from eggroll.kernels.int8_dot.mosaic_gpu import LEAST_TERMS

    x, w, noise, sign = operands.integer_operands(case)
    groups = Groups.of(case.pairs, case.rows, case.rank, least_terms=LEAST_TERMS)
    chosen = int8_config.choose(groups, case.m, case.n)

    def make_call(implementation: str, config: Any) -> Callable[[], Array]:
        dot = functools.partial(int8_dot, bits=case.bits, shift=case.shift, implementation=implementation, config=config)
        return bound(lambda x, w, noise, sign: dot(x, w, noise, sign=sign), x, w, noise, sign)

    others = [int8_config.Config(columns) for columns in _neighbours(case.n, chosen.tile_columns) if columns <= 128]
    calls = {"plain": _plain(x, w, jnp.int32)}
    calls |= _calls(make_call, chosen, others, lambda config: int8_config.fit(config, groups, case.m))
    return Work("int8_dot", case.name, _shape(case, "given"), calls, *_size(case, 1, 4), dtype="int8", tolerance=0.0)


def _together(case: dot_cases.Case) -> Work:
    """Forward and update of one matrix, one after the other."""
    update = update_cases.Case(case.name, case.pairs, case.m, case.n, case.rank, case.form)
    forward, backward = _dot(case), _update(update)

    def both(name: str) -> Call:
        first, second = forward.calls[name], backward.calls[name]
        return Call(lambda: (first.run(), second.run()), checked=first.checked)

    size = forward.operations + backward.operations, forward.bytes + backward.bytes
    calls = {name: both(name) for name in ("plain", "reference", "mosaic_gpu")}
    return Work("together", case.name, forward.shape, calls, *size)


def _plain(x: Array, w: Array, dtype: Any) -> Call:
    product = functools.partial(jnp.matmul, preferred_element_type=dtype)
    return Call(bound(product, x.reshape(-1, x.shape[-1]), w), checked=False)


def _factor_product(case: update_cases.Case, noise: Noise) -> Call:
    """One product of ready bfloat16 factors."""
    values = values_of(noise, rank=case.rank, rows=case.m, columns=case.n, dtype=jnp.bfloat16)
    left, right = (factor.reshape(-1, factor.shape[-1]) for factor in values)
    product = functools.partial(jnp.einsum, "km,kn->mn", preferred_element_type=jnp.float32)
    return Call(bound(product, left, right), checked=False)


def _build_noise(case: dot_cases.Case, noise: Noise) -> Array:
    """The noise of every pair, bfloat16 [P, m, n]."""
    values = values_of(noise, rank=case.rank, rows=case.m, columns=case.n, dtype=jnp.bfloat16)
    return jnp.einsum("pkm,pkn->pmn", *values)


def _dense(x: Array, w: Array, built: Array, scale: Array) -> Array:
    base = jnp.einsum("pjm,mn->pjn", x, w, preferred_element_type=jnp.float32)
    term = jnp.einsum("pjm,pmn->pjn", x, built, preferred_element_type=jnp.float32)
    return (base + scale[..., None] * term).astype(x.dtype)


def _size(case: Any, given: int, result: int) -> tuple[float, float]:
    """Operations and bytes of x w: every operand read once, the result written once."""
    rows = case.pairs * case.rows
    return 2.0 * rows * case.m * case.n, given * float(rows * case.m + case.m * case.n) + result * float(rows * case.n)
