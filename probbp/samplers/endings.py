"""What a run says at a bad end: out of memory, or under no proper density."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from probbp.samplers.progress import STUCK
from probbp.types import Tree

TOO_FAR = 1e10
"""A chain that comes farther than this many times the start's scale is called lost.

So is a step size that grew or shrank by its square, as that is the square of a length.
"""

COARSE = 0.5
"""Of a log density that is rounded by more a run warns: its differences decide on acceptance."""

FEW_DRAWS, FEW_TO_MOVE = 10, 100
"""Of fewer draws it is not said that all diverged, or that their chain stood still."""


@contextmanager
def advice_on_memory() -> Iterator[None]:
    """Add what helps to JAX's error where memory does not suffice."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" in str(error):
            error.add_note(
                "The chains do not fit into memory together. `probbp.sample` takes a `batch_size`, "
                "how many of them run at once; for draws that do not fit, `stream` and `every`. An "
                "estimator of many tangents has a `batch_size` of its own."
            )
        raise


def warn_of_a_run(sample_stats: Any, growth: np.ndarray, reach: float) -> None:
    """Warn of what an improper density, or one that is broken, makes of a run.

    Args:
        sample_stats: ArviZ's group, whose `diverging` and `acceptance_rate`, (chain, draw), are
            read where they are there.
        growth: (chain,), by what warm-up multiplied the step size.
        reach: where the chains ended, over the scale of where they started.
    """
    seen, num_chains = [], len(growth)
    num_lost, num_stuck = _lost_and_stuck(sample_stats)
    if num_lost:
        seen.append(
            f"all proposals of {num_lost} of {num_chains} chains diverged (the log density is NaN "
            "or infinite there)"
        )
    if num_stuck:
        seen.append(
            f"{num_stuck} of {num_chains} chains stood still (fewer than {STUCK:.0%} of their "
            "proposals were accepted)"
        )
    for bound, words in ((growth >= TOO_FAR**2, "grew"), (growth <= TOO_FAR**-2, "shrank")):
        if np.any(bound):
            factor = np.median(growth[bound])
            seen.append(f"the step size of {np.sum(bound)} chains {words} to {factor:.0e} times")
    if not reach < TOO_FAR:
        seen.append(f"the chains are {reach:.0e} times as far out as they started")
    if seen:
        warnings.warn(
            f"This run saw that {' and that '.join(seen)}. Is the density improper? Look for a "
            "parameter without a prior, a direction in which it is constant or grows, and overflow "
            "far out. If not, give more num_warmup, or starts where its mass is.",
            stacklevel=4,
        )


def _lost_and_stuck(sample_stats):
    """Count chains whose proposals all diverged, and others that hardly accepted one."""
    num_draws, is_lost, is_stuck = sample_stats.sizes["draw"], np.zeros(1, bool), np.zeros(1, bool)
    if "diverging" in sample_stats and num_draws >= FEW_DRAWS:
        is_lost = np.all(sample_stats["diverging"].values, axis=1)
    if "acceptance_rate" in sample_stats and num_draws >= FEW_TO_MOVE:
        is_stuck = ~(np.mean(sample_stats["acceptance_rate"].values, axis=1) >= STUCK) & ~is_lost
    return int(np.sum(is_lost)), int(np.sum(is_stuck))


def warn_of_rounding(logdensity: np.ndarray) -> None:
    """Warn of a log density whose dtype is too coarse for its size, as constants may make it.

    Args:
        logdensity: (chain,), in the dtype in which it was computed.
    """
    dtype = logdensity.dtype
    size = float(np.max(np.abs(logdensity.astype(float))))
    error = float(jnp.finfo(dtype).eps) * size
    if error >= COARSE:
        warnings.warn(
            f"The log density is about {size:.1e}, and in {dtype} known to {error:.1g} only: fewer "
            "proposals are accepted, and above one the draws are biased. Leave constants out of "
            "it, compute it in a wider dtype, or use double precision "
            "(jax.config.update('jax_enable_x64', True)).",
            stacklevel=5,
        )


def distance(position: Tree, start: Tree, dispersion: float) -> float:
    """Return the largest entry of a position over that of a start, or the dispersion around it."""

    def largest(tree):
        return max(float(np.max(np.abs(leaf), initial=0.0)) for leaf in jax.tree.leaves(tree))

    scale = max(largest(start), float(dispersion))
    return largest(position) / scale if scale > 0 else 0.0
