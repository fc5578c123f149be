"""Whether rates are enough: the cosine between the gradient by rates and through time."""

import warnings
from collections.abc import Callable

import jax
import jax.numpy as jnp

from probbp.types import Tree


def agreement(loss_fn: Callable[[Tree, str], jax.Array], params: Tree) -> Tree:
    """Return the cosine between the gradients by rates and through time, for each array.

    It is 1 where errors and spikes do not vary together in time, as with rates for a code. Where
    spikes are timed it falls, and training by rates does not learn from the times: with one spike
    for each input, at a time that tells its value, all inputs have the same rate, and all rows of
    the first layer's gradient are equal.

    Args:
        loss_fn: parameters, and the word to hand to `simulate` as `gradient`, to a scalar.
        params: pytree of floating-point arrays, as trained so far; the untrained are a good start.

    Returns:
        Cosines, in the structure of `params`; not a number where a gradient is zero. Cost: one
        gradient through time, and its memory; a few examples and steps tell enough.

    Warns:
        UserWarning: where a cosine is below 0.9.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> x = jax.random.normal(jax.random.key(0), (8, 5))
        >>> def loss_fn(weights, gradient):
        ...     def network(spike, x):
        ...         return spike(x @ weights["in"]) @ weights["out"]
        ...     return jnp.mean(simulate(network, constant(x), 16, gradient=gradient) ** 2)
        >>> from probbp.ops.rate import constant, simulate
        >>> weights = {"in": jnp.ones((5, 4)), "out": jnp.ones((4, 1))}
        >>> cosines = agreement(loss_fn, weights)
        >>> bool(cosines["in"] > 0.999)
        True
    """
    by_rates, through_time = (jax.grad(loss_fn)(params, gradient) for gradient in ("rate", "bptt"))

    def cosine(a, b):
        return jnp.vdot(a, b) / (jnp.linalg.norm(jnp.ravel(a)) * jnp.linalg.norm(jnp.ravel(b)))

    cosines = jax.tree.map(cosine, by_rates, through_time)
    low = [
        f"{jax.tree_util.keystr(path)} {float(value):.2f}"
        for path, value in jax.tree_util.tree_leaves_with_path(cosines)
        if value < 0.9
    ]
    if low:
        warnings.warn(
            f"The gradient by rates is not that through time, cosines: {', '.join(low)}. Spikes "
            "seem to be timed, which rates don't see. gradient='bptt' does, at its memory.",
            stacklevel=2,
        )
    return cosines
