"""Flax networks as they are, whose errors go back through feedback weights.

The layers of NNX and Linen let their product be replaced from outside; what replaces it is in
`probbp.ops.feedback`. Dense and convolutional layers take part (`Linear`, `LinearGeneral`, `Dense`,
`DenseGeneral`, `Conv`, and with them attention's projections). All others keep their gradient.
Lillicrap et al., 2014, arXiv:1411.0247.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from flax import linen, nnx, traverse_util

from probbp.checks import check_rng_key
from probbp.models.modules import check_module
from probbp.ops import feedback

Rule = Callable[[jax.Array, jax.Array], jax.Array]
"""`(kernel, stored) -> feedback weights`, such as `feedback.fixed_magnitude`."""


def stored(kernel: jax.Array, weights: jax.Array) -> jax.Array:
    """The rule of feedback alignment: the stored weights, whatever the kernel has become.

    Args:
        kernel: not looked at.
        weights: of the same shape.

    Returns:
        The weights.
    """
    return weights


class Feedback(nnx.Variable):
    """Feedback weights. Not an `nnx.Param`, so that optimisers leave them alone."""


class LearntFeedback(nnx.Param):
    """Feedback weights that learn, as in Kolen & Pollack."""


def with_feedback(
    model: nnx.Module, rng_key: jax.Array, *, rule: Rule = stored, learns: bool = False
) -> Any:
    """Return a copy of an NNX network whose errors go back through feedback weights.

    Exact: its values, and each layer's gradient given the error that arrives there.

    Args:
        model: any NNX module.
        rng_key: each layer's weights are drawn by `feedback.normal` with a key of its own.
        rule: makes the feedback weights from kernel and stored weights, in each call.
        learns: whether the stored weights are parameters and get the kernel's gradient
            (`feedback.kolen_pollack`). Train both by one optimiser.

    Returns:
        The copy. Its layers' products hold the weights, as `Feedback` or, where they learn,
        `LearntFeedback`.

    Raises:
        ValueError: for a network without a layer that could take part.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import optax
        >>> from flax import nnx
        >>> from probbp.ops import feedback
        >>> network = nnx.Sequential(
        ...     nnx.Linear(3, 8, rngs=nnx.Rngs(0)), jnp.tanh, nnx.Linear(8, 1, rngs=nnx.Rngs(1))
        ... )
        >>> random = with_feedback(network, jax.random.key(0))
        >>> signs = with_feedback(
        ...     network, jax.random.key(0), rule=lambda kernel, _: feedback.uniform_sign(kernel)
        ... )
        >>> x = jnp.ones((5, 3))
        >>> bool(jnp.all(random(x) == network(x)))
        True
        >>> optimiser = nnx.Optimizer(random, optax.adam(1e-3), wrt=nnx.Param)
    """
    check_rng_key("rng_key", rng_key)
    check_module("model", model, "For Linen: linen_weights and linen_interceptor.")
    model = nnx.clone(model)
    layers: list[Any] = [
        (layer, *_NNX[kind])
        for _, layer in nnx.iter_modules(model)
        for kind in _NNX
        if isinstance(layer, kind)
    ]
    if not layers:
        raise ValueError(
            "The network has no Linear, LinearGeneral or Conv. For layers of your own call "
            "`feedback.dense` or `feedback.through` in them."
        )
    keys = jax.random.split(rng_key, len(layers))
    for key, (layer, attribute, product) in zip(keys, layers, strict=True):
        weights = feedback.normal(key, layer.kernel[...])
        weights = LearntFeedback(weights) if learns else Feedback(weights)
        setattr(layer, attribute, nnx.data(_Product(product, weights, rule)))
    return model


class _Product(nnx.Module):
    def __init__(self, product, weights, rule):
        self.product, self.weights, self.rule = product, weights, rule

    def __call__(self, lhs, rhs, *args, **options):
        weights, learns = self.weights[...], isinstance(self.weights, LearntFeedback)
        return _product(self.product, self.rule, learns, weights, lhs, rhs, *args, **options)


def linen_weights(rng_key: jax.Array, params: Any) -> dict[str, Any]:
    """Draw feedback weights for all kernels of a Linen network.

    Args:
        rng_key: a key.
        params: the collection "params" of the network's variables.

    Returns:
        `params` without anything but kernels, drawn by `feedback.normal`.
    """
    check_rng_key("rng_key", rng_key)
    flat = traverse_util.flatten_dict(params)
    kernels = {path: leaf for path, leaf in flat.items() if path[-1] == "kernel"}
    return traverse_util.unflatten_dict(feedback.normal(rng_key, kernels))


def linen_interceptor(weights: Any, *, rule: Rule = stored, learns: bool = False) -> Callable:
    """Make the interceptor under which a Linen network sends errors through feedback weights.

    Args:
        weights: as `linen_weights` draws them. Layers that are not in it keep their gradient.
        rule: as in `with_feedback`.
        learns: whether `weights` get the kernels' gradients; they are to be differentiated then.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flax import linen as nn
        >>> network = nn.Sequential([nn.Dense(8), jnp.tanh, nn.Dense(1)])
        >>> x = jnp.ones((5, 3))
        >>> params = network.init(jax.random.key(0), x)
        >>> interceptor = linen_interceptor(linen_weights(jax.random.key(1), params["params"]))
        >>> def loss(params):
        ...     with nn.intercept_methods(interceptor):
        ...         return jnp.sum(network.apply(params, x) ** 2)
        >>> grad = jax.grad(loss)(params)
    """

    def interceptor(next_fun, args, kwargs, context):
        layer = context.module
        attribute, product = next((_LINEN[k] for k in _LINEN if isinstance(layer, k)), (None, None))
        if context.method_name != "__call__" or attribute is None:
            return next_fun(*args, **kwargs)
        # A product is set where the user has set one, and in the call below.
        if layer.is_initializing() or getattr(layer, attribute) is not None:
            return next_fun(*args, **kwargs)
        b = weights
        for name in layer.path:
            b = b.get(name, {})
        if "kernel" not in b:
            return next_fun(*args, **kwargs)
        product = partial(_product, product, rule, learns, b["kernel"])
        replaced = layer.clone(parent=None, **{attribute: product})
        return replaced.apply({"params": layer.variables["params"]}, *args, **kwargs)

    return interceptor


def _product(product, rule, learns, weights, lhs, rhs, *args, **options):
    if learns:
        rhs = feedback.kolen_pollack(rhs, weights)
    return product(lhs, rhs, *args, feedback=rule(rhs, weights), **options)


_NNX = {
    nnx.Linear: ("dot_general", feedback.dot_general),
    nnx.LinearGeneral: ("dot_general", feedback.dot_general),
    nnx.Conv: ("conv_general_dilated", feedback.conv_general_dilated),
}
_LINEN = {
    linen.Dense: ("dot_general", feedback.dot_general),
    linen.DenseGeneral: ("dot_general", feedback.dot_general),
    linen.Conv: ("conv_general_dilated", feedback.conv_general_dilated),
}
