"""Dendrites that training has made superfluous."""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from probbp.models.growth.acceptance import by_layer
from probbp.ops import dendrites as ops
from probbp.ops.dendrites import Dendrites
from probbp.ops.dendrites.layer import Layer


def prune(
    loss: Callable[[Layer], jax.Array],
    dendrites: Mapping[str, Dendrites],
    *,
    prior_scale: float = 1.0,
    activation: Callable[[jax.Array], jax.Array] = jnp.tanh,
) -> dict[str, Dendrites]:
    """Mask the dendrites that the evidence would not accept again, at the weights they have now.

    The network is observed once, and `probbp.ops.dendrites.prune` decides for all layers at once,
    with the empirical Fisher information for the curvature: good at a fit, to second order in the
    weights. That a later dendrite hears an earlier one is left out, and so is what the network
    could do to make up for a loss; train it a little afterwards.

    Args:
        loss: `layer -> negative log likelihood`, summed over examples; of held-out rows, because
            those that dendrites were fitted to flatter them.
        dendrites: of each layer, by name.
        prior_scale: tau.
        activation: phi.

    Returns:
        The dendrites, with masks that are 0 in more places.
    """
    seen = ops.observe(loss, ops.grown(dendrites, activation=activation))[1]
    parts, weights = {}, {}
    for name, there in dendrites.items():
        said = ops.outputs(seen[name].inputs, ops.flat(there), activation=activation)
        each = jax.vmap(ops.contributions, (0, None), 1)(said, seen[name].errors)
        parts[name] = each.reshape(len(each), -1)
        weights[name] = there.weight.reshape(-1)
    names = sorted(parts)
    joined = jnp.concatenate([parts[name] for name in names], 1)
    weight = jnp.concatenate([weights[name] for name in names])
    keep = by_layer(ops.prune(-joined.sum(0), joined.T @ joined, weight, prior_scale), parts)
    return {
        name: there._replace(mask=there.mask * keep[name].reshape(there.mask.shape))
        for name, there in dendrites.items()
    }
