"""Chains of any BlackJAX sampler as the object that the installed ArviZ reads."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import numpy as np

from probbp.checks import check_function
from probbp.diagnostics.labels import (
    check_all_there,
    check_slashes,
    checked_coords,
    checked_dims,
)
from probbp.diagnostics.names import leaf_names
from probbp.inference_data import IS_TREE, from_groups
from probbp.types import Tree

# A BlackJAX info's field, and the name under which ArviZ knows it.
_STATISTICS = {
    "acceptance_rate": "acceptance_rate",
    "is_accepted": "accepted",
    "is_divergent": "diverging",
    "energy": "energy",
    "num_integration_steps": "n_steps",
    "step_size": "step_size",
    "log_weight": "log_weight",
}


def from_blackjax(
    states: Any,
    infos: Any = None,
    *,
    postprocess_fn: Callable[[Tree], Tree] | None = None,
    sample_stats: Mapping[str, Any] | None = None,
    coords: Mapping[str, Any] | None = None,
    dims: Mapping[str, Any] | None = None,
) -> Any:
    """Turn the chains of a BlackJAX sampler into ArviZ's object.

    Args:
        states: states of the kernel (anything with a `position`) or positions, every leaf with
            leading axes (chain, draw).
        infos: infos of the kernel with the same axes; what ArviZ knows of them (acceptance rate,
            divergences, energy, steps) goes to `sample_stats`.
        postprocess_fn: applied to each position, e.g. from unconstrained to constrained space.
        sample_stats: further statistics (chain, draw), which win over those of `infos`.
        coords: names of the values along a dimension, as ArviZ takes them.
        dims: names of the dimensions of a variable, as ArviZ takes them.

    Returns:
        An `arviz.InferenceData` (ArviZ 0.x) or `xarray.DataTree` (ArviZ 1.x) with `posterior` and
        `sample_stats`. A position that is one array is called "x"; nested names are joined by dots.

    Raises:
        TypeError: if `dims` or `coords` is no mapping.
        ValueError: if there is no leaf, a leaf lacks the axes (chain, draw), two have one name, the
            name is that of a dimension, or has a "/" where ArviZ 1 is installed, or labels or names
            of dimensions don't fit.

    Example:
        >>> import blackjax, jax, jax.numpy as jnp
        >>> from probbp.diagnostics import from_blackjax
        >>> nuts = blackjax.nuts(lambda x: -0.5 * x["a"] ** 2, 0.5, jnp.ones(1))
        >>> run = lambda key: blackjax.util.run_inference_algorithm(
        ...     key, nuts, 10, initial_position={"a": 0.0})[1]
        >>> states, infos = jax.vmap(run)(jax.random.split(jax.random.key(0), 4))
        >>> from_blackjax(states, infos).posterior["a"].shape
        (4, 10)
    """
    positions = getattr(states, "position", states)
    posterior_positions = positions
    if not isinstance(sample_stats, Mapping | None):
        raise TypeError(f"sample_stats must map names to arrays, got {sample_stats!r}.")
    if postprocess_fn is not None:
        check_function("postprocess_fn", postprocess_fn, "Pass one that maps a position to a tree.")
        # One draw after the other, as in NumPyro: XLA's CPU backend may lock up for good where two
        # triangular solves with thousands of matrices each wait for the same few threads.
        postprocess = jax.vmap(partial(jax.lax.map, postprocess_fn))
        posterior_positions = jax.jit(postprocess)(positions)
    posterior = _named(posterior_positions)
    statistics = {}
    if hasattr(states, "logdensity"):
        statistics["lp"] = np.asarray(states.logdensity)
    for field, name in _STATISTICS.items():
        if hasattr(infos, field):
            statistics[name] = np.asarray(getattr(infos, field))
    statistics |= {name: np.asarray(value) for name, value in (sample_stats or {}).items()}

    posterior, statistics = (
        {name: _known_to_numpy(value) for name, value in group.items()}
        for group in (posterior, statistics)
    )
    if not posterior:
        raise ValueError(
            "There is no variable to name: states must hold positions, and postprocess_fn return a "
            "tree with at least one array."
        )
    shape = next(iter(posterior.values())).shape[:2]
    whose = dict.fromkeys(statistics, "sample_stats or infos") | dict.fromkeys(posterior, "states")
    for name, value in {**posterior, **statistics}.items():
        if value.ndim < 2 or value.shape[:2] != shape:
            raise ValueError(
                f"{name!r} of {whose[name]} has shape {value.shape}, but needs leading axes "
                f"(chain, draw) = {shape}. Stack the chains with jax.vmap; give a single chain a "
                "first axis of one."
            )
    groups: dict[str, Any] = {"posterior": posterior, "sample_stats": statistics}
    return _converted({k: v for k, v in groups.items() if v}, coords, dims)


def _converted(groups, coords, dims):
    """Hand variables to the installed ArviZ; nothing that it is given is lost."""
    dims = checked_dims(dims, groups)
    coords = checked_coords(coords, dims, groups)
    if IS_TREE:
        check_slashes(dims, groups)
    data = from_groups(groups, coords, dims)
    check_all_there(data, groups)
    return data


def _known_to_numpy(value: np.ndarray) -> np.ndarray:
    """Return a value in a dtype of NumPy's own: `bfloat16` and its like in single precision."""
    return value if value.dtype.isbuiltin == 1 else value.astype(np.float32)


def _named(positions: Tree) -> dict[str, np.ndarray]:
    """Name the leaves of a pytree by their paths."""
    leaves = map(np.asarray, jax.tree.leaves(positions))
    return dict(zip(leaf_names(positions), leaves, strict=True))
