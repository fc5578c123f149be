"""A run that is killed by the system, again and again, ends as if nothing had happened."""

import os
import random

import long_run
import numpy as np
import pytest


@pytest.mark.slow
def test_a_killed_run_ends_as_if_nothing_had_happened(tmp_path):
    """Draws and growth in other processes, beside this one, which nobody kills."""
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "programs"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "PYTHONWARNINGS": "error",
    }
    folder, parts = tmp_path / "run", ("draws", "growth")
    random_ = random.Random(0)
    kills = 0
    for _ in range(2):
        kills += long_run.killed_after(random_.uniform(0.5, 4.0), folder, 1, parts, environment)
    assert kills, "the runs were over before they were killed"
    long_run.killed_after(600.0, folder, 1, parts, environment)
    result = long_run.result_of(folder)
    for part in parts:
        for name, value in long_run.PARTS[part](None, 1).items():
            np.testing.assert_array_equal(result[f"{part}.{name}"], value, err_msg=name)
