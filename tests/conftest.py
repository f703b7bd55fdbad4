"""Settings of every test: 8 virtual devices, quick compilation, one compilation cache; dtypes are never promoted silently.

Warnings are errors (pyproject.toml). Workers of pytest-xdist import this file too; subprocesses inherit the environment, but
not the virtual devices. Computation lands on the first device unless a test makes a mesh of `jax.devices()[:n]`. `make test`
gives all tests of a file to one worker.
"""

import gc
import hashlib
import os
import platform
from pathlib import Path

import jax
import pytest

OPTIMIZATIONS = "JAX_DISABLE_MOST_OPTIMIZATIONS"
# With these the compiler takes a third less time.
QUICK_CODE = "--xla_cpu_max_isa=AVX2 --xla_cpu_parallel_codegen_split_count=1"  # of x86-64
if jax.__version_info__ < (0, 11):  # XLA aborts on an option that it does not know, as it no longer does this one
    QUICK_CODE += " --xla_cpu_use_fusion_emitters=false"


def cache_folder() -> Path:
    """A folder per version of jax and per kind of processor; the options of the compiler are part of jax's own keys."""
    processor = Path("/proc/cpuinfo")
    lines = processor.read_text().splitlines() if processor.exists() else [os.uname().machine]
    features = {line for line in lines if line.startswith(("flags", "Features", "model name", os.uname().machine))}
    digest = hashlib.sha256(repr((jax.__version__, sorted(features))).encode()).hexdigest()[:12]
    return Path(__file__).parents[1] / ".pytest_cache" / f"compiled-{digest}"


def set_option(name: str, value: object) -> None:
    """Set an option of jax for this process and for those that it starts."""
    os.environ[name.upper()] = str(value)
    jax.config.update(name, value)


def compile_optimized(optimized: bool) -> None:
    """Turn the optimisations of the compiler on or off; what was compiled before is forgotten."""
    if (os.environ.get(OPTIMIZATIONS) == "False") != optimized:
        set_option("jax_disable_most_optimizations", not optimized)
        jax.clear_caches()


gc.set_threshold(100_000, 50, 100)  # tracing makes many objects and few cycles: a twentieth of the time of the tests
os.environ.setdefault("XLA_FLAGS", QUICK_CODE if platform.machine() == "x86_64" else "")
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_num_cpu_devices", 8)
set_option("jax_disable_most_optimizations", True)
set_option("jax_compilation_cache_dir", os.environ.get("JAX_COMPILATION_CACHE_DIR", str(cache_folder())))
set_option("jax_persistent_cache_min_compile_time_secs", 0.0)


def pytest_collection_modifyitems(items):
    """Optimised tests last: what was compiled is forgotten at every change."""
    items.sort(key=lambda item: item.get_closest_marker("optimized") is not None)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Before the fixtures of any scope: they compile as the test does."""
    compile_optimized(item.get_closest_marker("optimized") is not None)


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item, nextitem):
    """Forget what was compiled for a file: a worker that keeps all of it holds 5 GB at the end."""
    if nextitem is not None and nextitem.path != item.path:
        jax.clear_caches()


@pytest.fixture
def standard_promotion():
    """Allow dtype promotion in one test, for third-party code that relies on it (`optax.adam` raises a float to an int32)."""
    with jax.numpy_dtype_promotion("standard"):
        yield
