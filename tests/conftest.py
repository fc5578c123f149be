"""Double precision everywhere; tests of single precision pass float32 positions."""

import os
from importlib.metadata import version

# Matplotlib needs no screen, and NumPyro's bar stays out of the log.
os.environ.setdefault("MPLBACKEND", "Agg")
# What modules compute on import and what processes of tests run is compiled in a hurry, as below.
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
if version("jax").startswith("0.10."):
    # XLA's older way to compile a fused loop for a CPU, in three fifths of the time; JAX 0.12
    # has no such flag. Read once, when JAX starts; processes that tests start inherit it.
    os.environ["XLA_FLAGS"] = (
        f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_use_fusion_emitters=false"
    )

import jax
import pytest

jax.config.update("jax_enable_x64", True)


@pytest.fixture(autouse=True, scope="module")
def _programs_are_dropped():
    """Every compiled program holds memory maps, and a process may have 65,530 of them."""
    yield
    jax.clear_caches()


@pytest.fixture(autouse=True)
def _what_llvm_leaves_out(request):
    """The suite compiles thousands of programs and runs most of them for an instant.

    So LLVM does what correct code takes and no more, in three quarters of the time; XLA's own
    passes, and with them memory and operations, are the same. Tests marked `optimised` have all.
    """
    if "optimised" not in request.keywords:
        jax.config.update("jax_disable_most_optimizations", True)
        yield
        return
    jax.clear_caches()
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.clear_caches()
