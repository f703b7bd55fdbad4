"""The kernels against the plain product of the same inputs, and against the roofline of this machine.

    ratio     milliseconds of the plain product / milliseconds of the row
    roofline  max(operations / peak, bytes / bandwidth) of the plain product / the row; peak and bandwidth are measured in the
              same run with a large product and a copy, so a small case that stays in the cache may exceed 1

Every implementation is named: a row that cannot run, or whose result differs from the reference's, says why. The calls of a
case are interleaved and queued (`timing.queued_ms`); "*" marks rows that dispatch may limit.
"""

import dataclasses
import functools
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from eggroll.experiments.bench import kernel_generation
from eggroll.experiments.bench.kernel_work import Work, bound, works
from eggroll.experiments.bench.timing import machine, queued_ms
from eggroll.experiments.common.options import ignored_options, refuse, unless
from eggroll.experiments.common.run import print_summary

OPS = ("lowrank_dot", "lowrank_update", "int8_dot", "together", "generation")
GOALS = {"paper_values": 0.97, "paper_keys": 0.95, "forward_and_update": 0.90, "decode": 0.95}
KERNEL = "mosaic_gpu"  # the row that the goals are for: the kernel with the tiles it chooses
COLUMNS = f"{'op':<15}{'case':<22}{'implementation':<23}{'ms':>10}{'roofline':>10}{'ratio':>8}{'difference':>12}"


@dataclasses.dataclass(frozen=True)
class Kernels:
    """Time every kernel at its measured cases, as a ratio to the plain product of the same inputs."""

    ops: tuple[str, ...] = OPS
    """What to run: lowrank_dot, lowrank_update, int8_dot, together (forward and update of one matrix), generation."""
    cases: tuple[str, ...] = ()
    """Run only cases whose name contains one of these."""
    small: bool = False
    """Shrink the cases; always on without a GPU. Shrunk cases say nothing about the goals."""
    repeats: int = 12
    """Rounds; the medians are reported."""
    members: int = 256
    """Members of the generation. Shrunk, it has at most 8; another number above that is an error."""
    tokens: int = 1
    """Tokens that each member of the generation reads."""
    verbose: bool = False
    """Name every call on standard error before its first run; if a kernel hangs, it is the last one named."""


RULES = (unless(lambda config: "generation" not in config.ops, "without generation among --ops", "members", "tokens"),)
MOST_SMALL = 8  # members of a shrunk generation


class Peak(NamedTuple):
    """Measured peak rates of this machine."""

    operations: dict[str, float]  # dtype -> operations a second
    bandwidth: float  # bytes a second, reads and writes
    dispatch_ms: float  # of a call that computes nothing

    def roofline_ms(self, work: Work) -> float:
        """The least time of the plain product."""
        return 1e3 * max(work.operations / self.operations[work.dtype], work.bytes / self.bandwidth)


class Settings(NamedTuple):
    """How calls are timed."""

    small: bool
    repeats: int
    round_ms: float
    verbose: bool = False


def run(config: Kernels) -> None:
    """Run the benchmark; the last line of standard output is JSON."""
    on_gpu = jax.default_backend() == "gpu"
    small = config.small or not on_gpu
    _check(config, small)
    settings = Settings(small, config.repeats, 20.0 if on_gpu else 0.0, config.verbose)
    about = machine() | {"small": small, "rounds": config.repeats}
    print("  ".join(f"{key} {value}" for key, value in about.items()))
    peak = measure_peak(settings)
    figures = {f"{dtype}_tera_operations": number / 1e12 for dtype, number in peak.operations.items()}
    figures |= {"copy_gigabytes": peak.bandwidth / 1e9, "dispatch_ms": peak.dispatch_ms}
    print("a second: " + "  ".join(f"{key} {value:.3g}" for key, value in figures.items()))
    print(COLUMNS, flush=True)
    rows: list[dict[str, Any]] = []
    for op in config.ops:
        for name, make in _works(op, config, small):
            if _is_chosen(config, name):
                rows += measure(op, name, make, peak, settings)
    goals = goals_of([] if small else rows)
    for name, found in goals.items():
        print(f"{name}: {'not measured' if found['ratio'] is None else round(found['ratio'], 3)}, goal {found['goal']}")
    print_summary({"about": about, "peak": figures, "rows": rows, "goals": goals})


def _check(config: Kernels, small: bool) -> None:
    unknown = [op for op in config.ops if op not in OPS]
    if unknown:
        raise SystemExit(f"error: ops must be among {', '.join(OPS)}, got {', '.join(unknown)}.")
    for name in ("repeats", "members", "tokens"):
        if getattr(config, name) < 1:
            raise SystemExit(f"error: {name} must be an integer >= 1, got {getattr(config, name)}.")
    try:
        refuse(ignored_options(config, RULES, Kernels()))
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    if small and config.members not in (*range(1, MOST_SMALL + 1), Kernels().members):
        raise SystemExit(f"error: members must be at most {MOST_SMALL} where cases are shrunk (--small, or no GPU).")
    names = [name for op in config.ops for name, _ in _works(op, config, small)]
    if unknown := [part for part in config.cases if not any(part in name for name in names)]:
        raise SystemExit(f"error: cases must be parts of {', '.join(names)}, got {', '.join(unknown)}.")


def _is_chosen(config: Kernels, name: str) -> bool:
    return not config.cases or any(part in name for part in config.cases)


def _works(op: str, config: Kernels, small: bool) -> list[tuple[str, Callable[[], Work]]]:
    if op != "generation":
        return works(op, small=small)
    members = min(config.members, MOST_SMALL) if small else config.members
    return [("llama-1b", lambda: kernel_generation.work(small=small, members=members, tokens=config.tokens))]


def measure_peak(settings: Settings) -> Peak:
    """Time a large product of each dtype, a copy, and a call that computes nothing."""
    size, copied = (256, 1 << 24) if settings.small else (8192, 1 << 31)
    random = jax.random.randint(jax.random.key(0), (size, size), -127, 128)  # a product of constants draws less power
    forms = {"copy": bound(jnp.copy, jnp.zeros(copied, jnp.int8)), "nothing": bound(jnp.copy, jnp.zeros(8))}
    for dtype, total in (("bfloat16", jnp.bfloat16), ("int8", jnp.int32)):
        product = functools.partial(jnp.matmul, preferred_element_type=total)
        forms[dtype] = bound(product, random.astype(dtype), random.astype(dtype))
    ms = queued_ms(forms, repeats=settings.repeats, round_ms=settings.round_ms)
    operations = {dtype: 2e3 * size**3 / ms[dtype] for dtype in ("bfloat16", "int8")}
    return Peak(operations, 2e3 * copied / ms["copy"], ms["nothing"])


def measure(op: str, name: str, make: Callable[[], Work], peak: Peak, settings: Settings) -> list[dict[str, Any]]:
    """Rows of one case, printed."""
    try:
        work = make()
    except Exception as error:
        rows = [{"op": op, "case": name, "implementation": "all", "failed": _reason(error)}]
    else:
        failed, differences = _try_calls(work, settings.verbose)
        ms = _time_calls(work, failed, settings)
        rows = [_row(work, called, ms, failed, differences, peak) for called in work.calls]
    for row in rows:
        print(_line(row), flush=True)
    return rows


def _try_calls(work: Work, verbose: bool) -> tuple[dict[str, str], dict[str, float]]:
    """Run every call once; return why calls failed, and how far results are from the reference's."""
    failed: dict[str, str] = {}
    differences: dict[str, float] = {}
    reference = None
    for name, call in work.calls.items():
        if verbose:
            print(f"{work.op} {work.case} {name}", file=sys.stderr, flush=True)
        try:
            result = jax.block_until_ready(call.run())
            reference = result if name == "reference" else reference
            if call.checked and name != "reference":
                differences[name] = found = _difference(result, reference)
                if not found <= work.tolerance:
                    failed[name] = (
                        f"differs from the reference by {found:.1e} of its largest entry, tolerance {work.tolerance:.1e}"
                    )
        except Exception as error:
            failed[name] = _reason(error)
    return failed, differences


def _time_calls(work: Work, failed: dict[str, str], settings: Settings) -> dict[str, float]:
    """Milliseconds of the calls that did not fail; an error here cannot be attributed to one call, so it fails all of them."""
    forms = {name: call.run for name, call in work.calls.items() if name not in failed}
    try:
        return queued_ms(forms, repeats=settings.repeats, round_ms=settings.round_ms)
    except Exception as error:
        failed |= dict.fromkeys(forms, _reason(error))
        return {}


@jax.jit
def _distances(result: Array, reference: Array) -> tuple[Array, Array]:
    wide = jnp.int32 if jnp.issubdtype(result.dtype, jnp.integer) else jnp.float32
    result, reference = result.astype(wide), reference.astype(wide)
    return jnp.abs(result - reference).max(), jnp.abs(reference).max()


def _difference(result: Any, reference: Any) -> float:
    """The largest distance of an array from the reference, relative to the reference's largest entry."""
    pairs = zip(jax.tree.leaves(result), jax.tree.leaves(reference), strict=True)
    distances = [np.asarray(_distances(*pair), np.float64) for pair in pairs]
    return float(np.max([distance / largest for distance, largest in distances]))  # NaN stays


def _reason(error: Exception) -> str:
    """One line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"


def _row(work: Work, name: str, ms: dict, failed: dict, differences: dict, peak: Peak) -> dict[str, Any]:
    call = work.calls[name]
    about: dict[str, Any] = {"op": work.op, "case": work.case, "shape": work.shape, "implementation": name}
    about |= {"config": dataclasses.asdict(call.config) if call.config else None}
    if name in failed:
        return about | {"failed": failed[name]}
    return about | {
        "ms": ms[name],
        "roofline": peak.roofline_ms(work) / ms[name],
        "ratio": ms["plain"] / ms[name] if "plain" in ms else None,
        "difference": differences.get(name),
        "dispatch_may_limit": ms[name] < 3 * peak.dispatch_ms,
    }


def _line(row: dict[str, Any]) -> str:
    start = f"{row['op']:<15}{row['case']:<22}{row['implementation']:<23}"
    if "failed" in row:
        return f"{start} {row['failed']}"
    ratio, difference = (
        "-" if row[key] is None else f"{row[key]:{form}}" for key, form in (("ratio", ".3f"), ("difference", ".1e"))
    )
    numbers = f"{row['ms']:>10.4f}{row['roofline']:>10.3f}{ratio:>8}{difference:>12}"
    shape = f"   {row['shape']}" if row["implementation"] == "plain" else ""
    return start + numbers + (" *" if row["dispatch_may_limit"] else "") + shape


def goals_of(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Each goal with the kernel's ratio (the lowest of its cases) and whether it passed; None: not measured."""
    names = {
        "paper_values": ("lowrank_dot", "paper-values"),
        "paper_keys": ("lowrank_dot", "paper-keys"),
        "forward_and_update": ("together", "paper-keys"),
        "decode": ("lowrank_dot", "decode-"),
    }
    goals = {}
    for goal, (op, part) in names.items():
        own = {row["case"]: row for row in rows if row["op"] == op and row["implementation"] == KERNEL}
        found: list[Any] = [own.get(case, {}).get("ratio") for case, _ in works(op, small=True) if case.startswith(part)]
        ratio = None if None in found else min(found)
        goals[goal] = {"goal": GOALS[goal], "ratio": ratio, "passed": None if ratio is None else ratio >= GOALS[goal]}
    return goals
