"""Double precision everywhere; tests of single precision pass float32 positions."""

import gc
import hashlib
import os
import platform
import time
from importlib.metadata import version
from pathlib import Path

# Matplotlib needs no screen, and NumPyro's bar stays out of the log.
os.environ.setdefault("MPLBACKEND", "Agg")
# What processes of tests run is compiled in a hurry, as below.
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
# Each worker of the tests has a core: threads that wait for each other would cost a tenth more.
# Read once, when JAX starts; processes that tests start inherit it.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_multi_thread_eigen=false"
if version("jax").startswith("0.10."):
    # XLA's older way to compile a fused loop for a CPU, in three fifths of the time; JAX 0.12
    # has no such flag. Each program in one piece, as the other core has tests of its own.
    os.environ["XLA_FLAGS"] += (
        " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    )

import jax
import pytest

jax.config.update("jax_enable_x64", True)


def _processor() -> str:
    """Name the instructions of this processor: a program compiled for others may not run here."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    flags = "".join(sorted({line for line in lines if line.startswith(("flags", "Features"))}))
    return f"{platform.machine()}-{hashlib.sha256(flags.encode()).hexdigest()[:8]}"


# Programs that were long to compile are kept for the next run and for the other workers; to write
# the many small ones would cost a first run a tenth. JAX looks them up by the program, its options
# and its own version; one that can't be read is compiled, with a warning that pyproject.toml lets
# pass.
CACHE = Path(__file__).parents[1] / "build" / "jax_cache" / _processor()
for name, value in {
    "jax_compilation_cache_dir": str(CACHE),
    "jax_persistent_cache_min_compile_time_secs": 0.15,
    "jax_persistent_cache_min_entry_size_bytes": -1,
}.items():
    jax.config.update(name, value)
    os.environ[name.upper()] = str(value)  # for the processes that tests start


def pytest_collection_finish():
    """Spare the collector the modules, which stay; tracing makes many objects and few cycles."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)


def pytest_sessionfinish(session):
    """Drop programs that are older than two weeks; those that are still needed come again."""
    if not hasattr(session.config, "workerinput") and CACHE.is_dir():
        old = time.time() - 14 * 24 * 3600
        for path in CACHE.iterdir():
            if path.stat().st_mtime < old:
                path.unlink(missing_ok=True)


@pytest.fixture(autouse=True, scope="module")
def _programs_are_dropped():
    """Every compiled program holds memory maps, and a process may have 65,530 of them."""
    yield
    jax.clear_caches()


@pytest.fixture(autouse=True)
def _what_llvm_leaves_out(request, monkeypatch):
    """The suite compiles thousands of programs and runs most of them for an instant.

    So LLVM does what correct code takes and no more, in three quarters of the time; XLA's own
    passes, and with them memory and operations, are the same. Tests marked `optimised`
    have all, and so have the processes that they start.
    """
    if "optimised" not in request.keywords:
        jax.config.update("jax_disable_most_optimizations", True)
        yield
        return
    jax.clear_caches()
    jax.config.update("jax_disable_most_optimizations", False)
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "0")
    yield
    jax.clear_caches()
    jax.config.update("jax_disable_most_optimizations", True)  # for fixtures of modules
