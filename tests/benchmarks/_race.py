"""Time of several calls in one run, so that their ratios mean something."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np


def race(
    calls: Mapping[Any, Callable[[], Any]],
    num_rounds: int,
    clock: Callable[[], float] = time.perf_counter,
) -> np.ndarray:
    """Return seconds (rounds, calls). Each round makes every call once, in a new order."""
    functions = list(calls.values())
    if num_rounds > 1:
        for function in functions:
            jax.block_until_ready(function())
    rng = np.random.default_rng(0)
    times = np.zeros((num_rounds, len(functions)))
    for row in times:
        for i in rng.permutation(len(functions)):
            start = clock()
            jax.block_until_ready(functions[i]())
            row[i] = clock() - start
    return times
