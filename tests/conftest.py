"""Double precision everywhere; tests of single precision pass float32 positions."""

import os

# Matplotlib needs no screen, and NumPyro's bar stays out of the log.
os.environ.setdefault("MPLBACKEND", "Agg")

import jax
import pytest

jax.config.update("jax_enable_x64", True)


@pytest.fixture(autouse=True, scope="module")
def _programs_are_dropped():
    """Every compiled program holds memory maps, and a process may have 65,530 of them."""
    yield
    jax.clear_caches()
