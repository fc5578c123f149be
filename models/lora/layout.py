"""What the axes of a weight are for, its factors, and the name it goes by."""

import math
from typing import Any, NamedTuple

import jax

WAY_OUT = (
    "Narrow target, or pass materialise=True: dense weights are then formed, for every example of "
    "the batch, or once with noise='shared'."
)
# A weight stays itself through these, element by element.
ELEMENTWISE = ("convert_element_type", "copy", "copy_p", "stop_gradient")


class Layout(NamedTuple):
    """What the axes of a weight are for.

    Attributes:
        roles: a letter an axis: "i" for those that its product sums over, "o" for those that
            it leaves, "b" for those along which there are several weights, as in layers that
            `jax.lax.scan` or `jax.vmap` runs over.
        shape: of the weight.
        dtype: of the weight.
    """

    roles: str
    shape: tuple[int, ...]
    dtype: Any

    def sizes(self, role: str) -> tuple[int, ...]:
        """Return the sizes of the axes with this role."""
        return tuple(size for size, r in zip(self.shape, self.roles, strict=True) if r == role)

    @property
    def num_in(self) -> int:
        """Number of inputs, n."""
        return math.prod(self.sizes("i"))

    @property
    def num_out(self) -> int:
        """Number of outputs, m."""
        return math.prod(self.sizes("o"))

    def shape_of_a(self, rank: int) -> tuple[int, ...]:
        """Shape of the factor A: (..., rank, in), with what is stacked in front."""
        return (*self.sizes("b"), rank, self.num_in)

    def shape_of_b(self, rank: int) -> tuple[int, ...]:
        """Shape of the factor B: (..., out, rank), with what is stacked in front."""
        return (*self.sizes("b"), self.num_out, rank)


class Factors(NamedTuple):
    """The factors of one update, B A, or B (A + delta o t s^T) where signs are given.

    Attributes:
        a: (..., rank, in). Several input axes count as one, in the weight's order.
        b: (..., out, rank), likewise.
        delta: (..., rank, in), a deviation of `a` whose signs are flipped.
        in_signs: s, (..., in), +1 or -1.
        out_signs: t, (..., rank), +1 or -1.
    """

    a: Any
    b: Any
    delta: Any = None
    in_signs: Any = None
    out_signs: Any = None


def named_leaves(params: Any) -> dict[str, Any]:
    """Return the leaves of a pytree by the names that `target` is matched with.

    A name is the path joined by dots: `params.Dense_0.kernel` in Flax Linen, `attention.out.kernel`
    in Flax NNX, `layers.0.weight` in Equinox, the key itself in a flat dictionary.

    Raises:
        ValueError: where two leaves have one name.

    Args:
        params: pytree of arrays.

    Returns:
        Names to leaves.

    Example:
        >>> sorted(named_leaves({"layers": [{"kernel": 1}, {"kernel": 2}]}))
        ['layers.0.kernel', 'layers.1.kernel']
    """
    paths = jax.tree_util.tree_flatten_with_path(params)[0]
    leaves = {name_of(path): leaf for path, leaf in paths}
    if len(leaves) < len(paths):
        raise ValueError("Two leaves of params have the same name once their paths are joined.")
    return leaves


def name_of(path) -> str:
    """Return the keys of a path, joined by dots."""
    if len(path) > 1 and path[-1] == jax.tree_util.GetAttrKey("value"):
        path = path[:-1]  # a variable of Flax NNX
    return jax.tree_util.keystr(path, simple=True, separator=".")


def no_rule(name, primitive):
    """Return the error for a weight that enters what has no low-rank rule."""
    return ValueError(
        f"{name!r} enters {primitive}, for which there is no low-rank rule. {WAY_OUT}"
    )
