"""Labels of ArviZ's object that it would refuse without naming the variable, or take amiss.

ArviZ drops a variable with the name of a dimension, fills up with NaN where two variables give one
dimension two lengths, and takes tuples in some places only. All of it raises an error here.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from probbp.inference_data import SAMPLE_DIMS


def checked_dims(
    dims: Mapping[str, Any] | None, groups: Mapping[str, Mapping[str, np.ndarray]]
) -> dict[str, list[str]]:
    """Return the names of dimensions as the lists that every ArviZ takes.

    Args:
        dims: name of a variable to the names of its dimensions after (chain, draw).
        groups: the variables by group and name, (chain, draw, ...).

    Raises:
        TypeError: if `dims` is no mapping, or a dimension's name is no text.
        ValueError: if a variable has fewer axes than dimensions, or a name stands twice.
    """
    if not isinstance(dims, Mapping | None):
        raise TypeError(f"dims must map names of variables to lists of dimensions, got {dims!r}.")
    lists = {}
    for name, given in (dims or {}).items():
        names = [given] if isinstance(given, str) else () if given is None else given
        names = list(names) if isinstance(names, Iterable) else [names]
        if not all(isinstance(dim, str | None) for dim in names):
            raise TypeError(f"dims[{name!r}] must be a list of texts, got {given!r}.")
        if tuple(names[:2]) == SAMPLE_DIMS:
            names = names[2:]
        lists[name] = names
    for variables in groups.values():
        for name, value in variables.items():
            _check_dims_of(name, lists.get(name, []), value.shape[2:])
    return lists


def checked_coords(
    coords: Mapping[str, Any] | None,
    dims: Mapping[str, list[str]],
    groups: Mapping[str, Mapping[str, np.ndarray]],
) -> dict[str, Any]:
    """Return the labels as every ArviZ takes them, with one length for each dimension.

    Args:
        coords: name of a dimension to its labels.
        dims: from `checked_dims`.
        groups: the variables by group and name, (chain, draw, ...).

    Raises:
        TypeError: if `coords` is no mapping.
        ValueError: if labels are no list, or a dimension's length isn't that of its labels, or not
            the same in all variables.
    """
    if not isinstance(coords, Mapping | None):
        raise TypeError(f"coords must map names of dimensions to lists of labels, got {coords!r}.")
    labels = {k: list(v) if isinstance(v, tuple) else v for k, v in (coords or {}).items()}
    for dim, given in labels.items():
        if isinstance(given, str) or np.ndim(given) != 1:
            raise ValueError(f"coords[{dim!r}] must be a list of labels, got {given!r}.")
    for variables in groups.values():
        lengths = {dim: (len(given), f"coords[{dim!r}]") for dim, given in labels.items()}
        for name, value in variables.items():
            named = [*SAMPLE_DIMS, *dims.get(name, [])]
            for dim, size in zip(named, value.shape, strict=False):
                length, whose = lengths.setdefault(dim, (size, repr(name)))
                if dim is not None and length != size:
                    raise ValueError(
                        f"{name!r} has length {size} along its dimension {dim!r}, but {whose} has "
                        f"{length}: give {size} labels, or the variables dimensions of their own."
                    )
    return labels


def check_slashes(
    dims: Mapping[str, list[str]], groups: Mapping[str, Mapping[str, np.ndarray]]
) -> None:
    """Require names without "/", which separates the groups of ArviZ 1's object.

    Raises:
        ValueError: naming the variable or the dimension.
    """
    for variables in groups.values():
        for name in variables:
            kinds = {"variable": [name], "dimension": dims.get(name, [])}
            for kind, names in kinds.items():
                for bad in (text for text in names if text is not None and "/" in text):
                    raise ValueError(
                        f"The installed ArviZ takes no name with '/', and the {kind} {bad!r} has "
                        "one: rename it, variables in the position or by postprocess_fn."
                    )


def check_all_there(data: Any, groups: Mapping[str, Mapping[str, np.ndarray]]) -> None:
    """Require that each variable is in ArviZ's object, with its shape.

    Raises:
        ValueError: naming one that is not, because a dimension has its name.
    """
    for group, variables in groups.items():
        kept = data[group].data_vars if group in _groups(data) else {}
        for name, value in variables.items():
            if name in kept and kept[name].shape == value.shape:
                continue
            if name in kept:
                raise ValueError(
                    f"{name!r} has shape {value.shape}, and ArviZ would make it {kept[name].shape} "
                    f"with dimensions {kept[name].dims}: name them by dims, none for two lengths."
                )
            reserved = name in SAMPLE_DIMS
            whose = "ArviZ keeps that name for itself" if reserved else "a dimension has that name"
            raise ValueError(
                f"The variable {name!r} would be lost: {whose}. Rename the variable, in the "
                f"position or by postprocess_fn{'' if reserved else ', or the dimension by dims'}."
            )


def _groups(data):
    return data.children if hasattr(data, "children") else data.groups()


def _check_dims_of(name, dims, shape):
    if len(dims) > len(shape):
        raise ValueError(
            f"dims gives {name!r} the dimensions {dims}, but a draw of it has shape {shape}: name "
            f"{len(shape)} at most, without chain and draw."
        )
    named = [*SAMPLE_DIMS, *(dim for dim in dims if dim is not None)]
    twice = [dim for i, dim in enumerate(named) if dim in named[:i]]
    if twice:
        raise ValueError(
            f"dims gives {name!r} the dimension {twice[0]!r} twice (chain and draw are there "
            "already): take another name."
        )
