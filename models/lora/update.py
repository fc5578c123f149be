"""The network with its update: factors beside the weights, or merged into them."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import quax

from probbp.checks import check_number
from probbp.models.lora.adapted import adapt
from probbp.models.lora.layout import Factors, Layout, name_of, named_leaves


def apply(
    apply_fn: Callable[..., Any],
    layouts: Mapping[str, Layout],
    scale: float,
    params: Any,
    factors: Mapping[str, Factors],
    *inputs: Any,
    materialise: bool = False,
) -> Any:
    """Evaluate the network with W + scale B A in the place of each weight W.

    Exact, and the network itself where B = 0. Beside the network's own products it costs two with
    the rank as inner or outer size, two more with signs. They are formed in the wider of the dtypes
    of factors and activations; the sum has the dtype of the network's own product.

    Args:
        apply_fn: `(params, *inputs) -> output`.
        layouts: from the function `layouts`.
        scale: of the update.
        params: pytree of arrays.
        factors: by name.
        inputs: as `apply_fn` takes them.
        materialise: whether dense weights are formed first, which every function accepts.

    Raises:
        ValueError: where a weight is used by something that has no rule.

    Example:
        >>> import jax.numpy as jnp
        >>> from probbp.models.lora import layouts
        >>> network = lambda params, x: x @ params["w"]
        >>> params, x = {"w": jnp.ones((3, 2))}, jnp.ones((1, 3))
        >>> factors = {"w": Factors(a=jnp.ones((1, 3)), b=jnp.ones((2, 1)))}
        >>> apply(network, layouts(network, params, "w", (x,)), 10.0, params, factors, x).tolist()
        [[33.0, 33.0]]
    """
    if materialise:
        return apply_fn(merge(params, layouts, factors, scale), *inputs)

    # Modules are put together inside: Flax NNX wants a current trace when it makes its variables.
    leaves, structure = named_leaves(params), jax.tree.structure(params)
    adapted = {
        name: adapt(name, jnp.asarray(leaves[name]), layout, factors[name], scale)
        for name, layout in layouts.items()
    }
    structures = []

    def network(adapted):
        out = apply_fn(jax.tree.unflatten(structure, (leaves | adapted).values()), *inputs)
        out, out_structure = jax.tree.flatten(out)
        structures.append(out_structure)
        return out

    out = quax.quaxify(network)(adapted)
    return jax.tree.unflatten(structures[0], out)


def merge(
    params: Any, layouts: Mapping[str, Layout], factors: Mapping[str, Factors], scale: float
) -> Any:
    """Return the weights W + scale B A, dense, in the dtype and layout of W.

    Args:
        params: pytree of arrays.
        layouts: from the function `layouts`.
        factors: by name.
        scale: of the update.

    Returns:
        A pytree like `params`.
    """
    check_number("scale", scale, "(-inf, inf)")

    def replace(path, leaf):
        name = name_of(path)
        if name not in layouts:
            return leaf
        update = scale * _dense(layouts[name], factors[name])
        return (leaf + update).astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(replace, params)


def _dense(layout, factors):
    a = factors.a
    if factors.delta is not None:
        a = a + factors.delta * factors.out_signs[..., :, None] * factors.in_signs[..., None, :]
    update = factors.b @ a
    update = update.reshape(*(size for role in "boi" for size in layout.sizes(role)))
    stands = [axis for role in "boi" for axis, r in enumerate(layout.roles) if r == role]
    return update.transpose([stands.index(axis) for axis in range(len(stands))])
