"""Flax NNX models that grow, unedited."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp


def from_nnx(model: Any) -> tuple[Callable[..., Any], Any]:
    """Turn an NNX model into a function of its parameters that calls its layers by name.

    Every `nnx.Linear` and `nnx.Conv` in it, left as they are but for the product inside them,
    becomes a call of `layer`, named by its path, such as "blocks.0.dense".

    Args:
        model: an `nnx.Module`, which is not touched. What is no parameter in it (batch statistics,
            keys) stays as it is now.

    Returns:
        `apply(params, layer, *inputs) -> outputs`, and the parameters, a pytree.

    Raises:
        TypeError: for a module of Linen or Equinox.
        ValueError: for a model without such layers; on the call, for a convolution with groups.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from probbp.ops.dendrites import grown
        >>> model = nnx.Sequential(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.relu)
        >>> apply, params = from_nnx(model)
        >>> x = jnp.ones((4, 2))
        >>> bool(jnp.array_equal(apply(params, grown({}), x), model(x)))
        True
    """
    from flax import nnx

    from probbp.models.modules import check_module

    by_hand = "call layer(name, x, kernel, bias) in a function of your own (growth.from_loss)."
    check_module("model", model, "Write it with nnx.Linear and nnx.Conv, or " + by_hand)
    kinds = (nnx.Linear, nnx.Conv)
    if not any(isinstance(module, kinds) for _, module in nnx.iter_graph(model)):
        raise ValueError(
            "The model has no nnx.Linear and no nnx.Conv, so that nothing in it could grow: "
            f"{by_hand}"
        )
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def apply(params, layer, *inputs):
        copy = nnx.merge(graph, params, rest, copy=True)
        for path, module in nnx.iter_graph(copy):
            name = ".".join(str(part) for part in path)
            if isinstance(module, nnx.Linear):
                module.dot_general = _product(partial(layer, name))
            elif isinstance(module, nnx.Conv):
                module.conv_general_dilated = _convolution(partial(layer, name))
        return copy(*inputs)

    return apply, params


def _product(layer):
    def dot_general(x, kernel, dimension_numbers, **options):
        given = {name: value for name, value in options.items() if value is not None}
        return layer(x, kernel, linear=partial(jnp.matmul, **given) if given else jnp.matmul)

    return dot_general


def _convolution(layer):
    def conv_general_dilated(x, kernel, strides, padding, feature_group_count=1, **options):
        if feature_group_count != 1:
            raise ValueError(
                "A convolution with groups can't have dendrites here: a window alone does not say "
                "what a channel sees. Take one without groups, or several beside each other."
            )
        linear = partial(
            jax.lax.conv_general_dilated, window_strides=strides, padding=padding, **options
        )
        return layer(x, kernel, linear=linear)

    return conv_general_dilated
