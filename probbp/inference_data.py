"""ArviZ as it is installed: this file alone knows that ArviZ 0.23 and ArviZ 1 differ.

ArviZ 0.23 holds an `InferenceData`, ArviZ 1 an `xarray.DataTree`; their `from_dict` take different
arguments under one name, and the Pareto shape of a tail is elsewhere.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import arviz
import numpy as np

IS_TREE = int(arviz.__version__.split(".")[0]) >= 1

SAMPLE_DIMS = ("chain", "draw")

Group = Mapping[str, np.ndarray]


def from_groups(
    groups: Mapping[str, Group],
    coords: Mapping[str, Any] | None = None,
    dims: Mapping[str, Sequence[str | None]] | None = None,
) -> Any:
    """Return ArviZ's object.

    Args:
        groups: variables by group; the axes of chains and draws first, but for data.
        coords: labels, by the names of dimensions.
        dims: names of a variable's further dimensions.
    """
    coords, dims = dict(coords or {}), dict(dims or {})
    if IS_TREE:
        # Else it takes many short chains for a mistake in the axes, and warns.
        return arviz.from_dict(groups, coords=coords, dims=dims, check_conventions=False)
    datasets = {name: _dataset(name, group, coords, dims) for name, group in groups.items()}
    return arviz.InferenceData(None, False, **datasets)


def pareto_shapes(log_ratios: np.ndarray) -> np.ndarray:
    """Return the shapes of the tails of log ratios, (..., draws) to (...)."""
    if IS_TREE:
        # Python 3.11, for which types are checked, has no such package.
        from arviz_stats.base.array import array_stats  # pyright: ignore[reportMissingImports]

        # It takes log likelihoods, the negative log ratios of leaving one out.
        return np.asarray(array_stats.psislw(-log_ratios)[1])
    return np.asarray(arviz.psislw(log_ratios)[1])


def _dataset(group, variables, coords, dims):
    """Return what ArviZ 0.23's `from_dict` makes of a group.

    That takes many short chains for a mistake in the axes, and warns; with all dimensions named
    there is nothing to mistake. To silence it would not be safe with several threads.
    """
    first = () if group.endswith("_data") else SAMPLE_DIMS
    named = {}
    for name, value in variables.items():
        given = dims.get(name, [])
        given = [*given, *[None] * (value.ndim - len(first) - len(given))]
        rest = [f"{name}_dim_{i}" if dim is None else dim for i, dim in enumerate(given)]
        named[name] = [*first, *rest]
    return arviz.dict_to_dataset(dict(variables), coords=coords, dims=named, default_dims=[])
