"""How many pairs fit a byte budget, according to the compiler's own account of temporary memory."""

import dataclasses
import functools
import logging
import math
import os
from collections.abc import Callable
from typing import Any

import jax

from eggroll.devices.mesh import Placement
from eggroll.devices.processes import minimum_over_processes
from eggroll.population.layout import PopulationLayout

logger = logging.getLogger(__name__)


def free_bytes(device: Any = None) -> int:
    """Bytes that a device has free, by its own account; without one, those of the host. None: the default device."""
    account = (device or jax.devices()[0]).memory_stats() or {}
    if "bytes_limit" in account:
        return int(account["bytes_limit"] - account["bytes_in_use"])
    return free_host_bytes()


def free_host_bytes() -> int:
    """The machine's available memory; where the system does not report it, half of the installed memory."""
    try:
        with open("/proc/meminfo") as file:
            rows = dict(line.split(":") for line in file)
        return int(rows["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def layout_in_budget(
    evaluate: Callable,
    state: Any,
    batch: Any,
    *,
    layout: PopulationLayout,
    budget: int | str | None,
    placement: Placement | None = None,
) -> PopulationLayout:
    """Choose how many pairs to evaluate at a time.

    The evaluation is compiled for two small populations; what it needs grows linearly in the pairs.

    Args:
        evaluate: `evaluate(layout, state, batch)`, the evaluation of a population.
        state: `ESState`; only shapes are used.
        batch: as for `step`.
        layout: the whole population; one that has chunks keeps them.
        budget: bytes of temporary memory, of one device; "device": half of what is free next to the parameters, now; None: no
            limit.
        placement: the mesh that the population is spread over; then one device's part is what has to fit.

    Returns:
        The layout, in chunks unless the whole population fits; then the log says so.

    Raises:
        ValueError: not even one pair fits, or the compiler does not say what fits.
    """
    if budget is None or layout.chunk_pairs is not None:
        return layout
    whole, budget = layout, minimum_over_processes(free_bytes() // 2) if isinstance(budget, str) else budget
    if placement is not None:
        layout, batch = placement.local_layout, placement.local_batch(batch)

    state, batch = jax.eval_shape(lambda *given: given, state, batch)  # a sigma or an entry may be a Python number

    def temporary_bytes(pairs: int) -> int:
        small = dataclasses.replace(layout, num_pairs=pairs)
        per_member = jax.tree.map(lambda x: jax.ShapeDtypeStruct((pairs, *x.shape[1:]), x.dtype), state.member_state)
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)._replace(member_state=per_member)
        axis = {None: None, 1: 2 * pairs}.get(layout.members_per_batch)
        small_batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct((axis, *x.shape[1:]) if axis else x.shape, x.dtype), batch)
        compiled = jax.jit(functools.partial(evaluate, small)).lower(shapes, small_batch).compile()
        account = compiled.memory_analysis()
        if account is None:
            raise ValueError(f"memory_budget needs the compiler's account of memory, which {jax.default_backend()} lacks.")
        return account.temp_size_in_bytes

    sizes = (8, 16) if layout.num_pairs >= 16 else (1, 2)
    needs = [temporary_bytes(size) for size in sizes]
    per_pair = max(1.0, (needs[1] - needs[0]) / max(1, sizes[1] - sizes[0]))
    fixed = max(0.0, needs[0] - per_pair * sizes[0])
    fitting = int((budget - fixed) // per_pair)
    if fitting < 1:
        raise ValueError(f"memory_budget of {budget} bytes is too small: one pair needs about {int(fixed + per_pair)} bytes.")
    if fitting >= layout.num_pairs:
        return whole
    # Chunks of nearly equal size: the last is not a short one, which would be compiled apart.
    chunk = math.ceil(layout.num_pairs / math.ceil(layout.num_pairs / fitting))
    logger.warning(
        "%d members%s would need about %.2g GiB; they are evaluated %d at a time.",
        layout.population_size,
        "" if placement is None else " a device",
        (fixed + per_pair * layout.num_pairs) / 2**30,
        2 * chunk,
    )
    return dataclasses.replace(whole, chunk_pairs=chunk)
