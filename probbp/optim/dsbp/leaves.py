"""Which arrays of a pytree are matrices, and how each is seen as one.

Optax says it with `weight_dimension_numbers` (`optax.contrib.muon`), and so does this: axes that a
layer sums over, axes of its output, and the rest, which are layers stacked one upon another.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from optax.contrib import MuonDimensionNumbers

from probbp.types import Tree


class View(NamedTuple):
    """An array as matrices (*batch, m, n), with the axis that is tracked first.

    Attributes:
        batch: sizes of the stacked axes.
        size: m.
        other: n.
        to_matrix: the array's shape to (*batch, m, n).
        from_matrix: and back.
    """

    batch: tuple[int, ...]
    size: int
    other: int
    to_matrix: Callable[[jax.Array], jax.Array]
    from_matrix: Callable[[jax.Array], jax.Array]


class Matrices(NamedTuple):
    """The matrices in a pytree, as a list, and the way back.

    Attributes:
        treedef: of the pytree.
        positions: of the matrices among its leaves.
        views: one for each matrix.
    """

    treedef: Any
    positions: list[int]
    views: list[View]

    def of(self, tree: Tree) -> list[jax.Array]:
        """Return the matrices of a tree, in single precision at least."""
        return [
            view.to_matrix(leaf).astype(precision(leaf.dtype))
            for view, leaf in zip(self.views, self.at(tree), strict=True)
        ]

    def at(self, tree: Tree) -> list:
        """Return what a tree has in the matrices' places, arrays or not."""
        nodes = self.treedef.flatten_up_to(tree)
        return [nodes[i] for i in self.positions]

    def put(self, values: list, tree: Tree | None = None) -> Tree:
        """Return the tree with other values in the matrices' places; None elsewhere if no tree."""
        leaves = [None] * self.treedef.num_leaves if tree is None else jax.tree.leaves(tree)
        for i, value in zip(self.positions, values, strict=True):
            leaves[i] = value
        return jax.tree.unflatten(self.treedef, leaves)

    def put_back(self, values: list, tree: Tree) -> Tree:
        """Return the tree with matrices (*batch, m, n) in their places, shaped as its arrays."""
        shaped = [
            view.from_matrix(value).astype(leaf.dtype)
            for view, value, leaf in zip(self.views, values, self.at(tree), strict=True)
        ]
        return self.put(shaped, tree)


def matrix_axes(params: Tree) -> Tree:
    """Return the default of `weight_dimension_numbers`, a tree of `MuonDimensionNumbers` and None.

    Two axes: (in, out). More: a convolution's kernel, (*size, channels, out), as (in, out). One or
    none, or nothing in it: not a matrix.
    """

    def axes(leaf: jax.Array) -> MuonDimensionNumbers | None:
        if jnp.ndim(leaf) < 2 or not jnp.size(leaf):
            return None
        return MuonDimensionNumbers(tuple(range(jnp.ndim(leaf) - 1)), jnp.ndim(leaf) - 1)

    return jax.tree.map(axes, params)


def matrices(
    params: Tree, weight_dimension_numbers: Tree | Callable[[Tree], Tree] | None, side: str
) -> Matrices:
    """Find the matrices of a pytree.

    Args:
        params: arrays.
        weight_dimension_numbers: as for `optax.contrib.muon`: one `MuonDimensionNumbers` for all
            leaves with two axes or more, a tree of them with None for leaves that are left alone,
            or a function of the parameters that returns such a tree; `matrix_axes` if not given.
        side: "in" or "out", the axis that comes first.

    Raises:
        ValueError: where axes are out of range, or taken twice.

    Example:
        >>> import jax.numpy as jnp
        >>> found = matrices({"bias": jnp.zeros(4), "conv": jnp.zeros((3, 3, 2, 4))}, None, "in")
        >>> [(view.size, view.other) for view in found.views]
        [(18, 4)]
    """
    numbers = matrix_axes if weight_dimension_numbers is None else weight_dimension_numbers
    if callable(numbers):
        numbers = numbers(params)
    leaves, treedef = jax.tree.flatten(params)
    if isinstance(numbers, MuonDimensionNumbers):
        numbers = [numbers if jnp.ndim(leaf) >= 2 else None for leaf in leaves]
    else:
        numbers = treedef.flatten_up_to(numbers)
    positions = [i for i, number in enumerate(numbers) if number is not None]
    return Matrices(
        treedef, positions, [_view(jnp.shape(leaves[i]), numbers[i], side) for i in positions]
    )


def precision(dtype: Any) -> Any:
    """Return the dtype of eigenpairs: float32 for shorter ones."""
    return jnp.promote_types(dtype, jnp.float32)


def _view(shape: tuple[int, ...], numbers: MuonDimensionNumbers, side: str) -> View:
    inputs, outputs = _axes(shape, numbers)
    stacked = [axis for axis in range(len(shape)) if axis not in (*inputs, *outputs)]
    first, last = (inputs, outputs) if side == "in" else (outputs, inputs)
    order = (*stacked, *first, *last)
    transposed = tuple(shape[axis] for axis in order)
    back = tuple(order.index(axis) for axis in range(len(shape)))
    batch = tuple(shape[axis] for axis in stacked)
    size, other = (math.prod(shape[axis] for axis in axes) for axes in (first, last))
    return View(
        batch,
        size,
        other,
        lambda array: array.transpose(order).reshape(*batch, size, other),
        lambda matrix: matrix.reshape(transposed).transpose(back),
    )


def _axes(shape: tuple[int, ...], numbers: MuonDimensionNumbers) -> tuple[list[int], list[int]]:
    """Return the axes of the inputs and of the outputs, counted from the first."""
    given = [
        (axes,) if isinstance(axes, int) else tuple(axes)
        for axes in (numbers.reduction_axis, numbers.output_axis)
    ]
    if any(not -len(shape) <= axis < len(shape) for axes in given for axis in axes):
        raise ValueError(f"{numbers} names axes that an array of shape {shape} does not have.")
    inputs, outputs = ([axis % len(shape) for axis in axes] for axes in given)
    if len({*inputs, *outputs}) < len(inputs) + len(outputs):
        raise ValueError(f"{numbers} takes an axis twice, for an array of shape {shape}.")
    return inputs, outputs
