"""Dendrites whose weights are random, in NumPyro: their sites, and the models that have them."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist

from probbp.checks import check_number
from probbp.ops import dendrites as ops
from probbp.ops.dendrites import Dendrites
from probbp.ops.dendrites.layer import Layer

Sites = Mapping[str, tuple[str, int, np.ndarray]]
"""Layer, slot and neurons of each site."""


def with_dendrites(
    model: Callable[..., Any],
    dendrites: Mapping[str, Dendrites],
    *,
    prior_scale: float = 1.0,
    activation: Callable[[jax.Array], jax.Array] = jnp.tanh,
) -> Callable[..., Any]:
    """Return a NumPyro model whose layers have these dendrites, with random weights.

    For predictions, and for MCMC, to which frozen dendrites are basis functions: exact, given which
    ones there are. A guide such as `AutoNormal(grown)` is first called with the data that were
    fitted, since it takes what is not observed then for latent; `from_svi` has an example.

    Args:
        model: `(*args, layer, **kwargs)`, as for `from_svi`.
        dendrites: of `grow`; their masks must be concrete.
        prior_scale: as in `from_svi`.
        activation: as in `from_svi`.

    Returns:
        `(*args, **kwargs)`, a model.
    """
    check_number("prior_scale", prior_scale, "(0, inf)")
    sites, layer_fn = sites_of(masks_of(dendrites)), partial(ops.grown, activation=activation)

    def grown(*args, **kwargs):
        layer = random_layer(dendrites, sites, layer_fn, prior_scale)
        return model(*args, layer=layer, **kwargs)

    return grown


def random_layer(
    dendrites: Mapping[str, Dendrites],
    sites: Sites,
    layer_fn: Callable[..., Layer],
    prior_scale: float,
) -> Layer:
    """Sample the weights, and return the layer."""
    values = {}
    for site, (_, _, neurons) in sites.items():
        prior = dist.Normal(0, prior_scale).expand([len(neurons)]).to_event(1)
        values[site] = numpyro.sample(site, prior)
    return layer_fn(connected(dendrites, sites, values))


def connected(
    dendrites: Mapping[str, Dendrites], sites: Sites, values: Mapping[str, jax.Array]
) -> dict[str, Dendrites]:
    """Return the dendrites with the weights that their sites have."""
    weights = {name: jnp.zeros_like(there.weight) for name, there in dendrites.items()}
    for site, (name, k, neurons) in sites.items():
        weights[name] = weights[name].at[k, neurons].set(values[site])
    return {name: there._replace(weight=weights[name]) for name, there in dendrites.items()}


def sites_of(masks: Mapping[str, np.ndarray]) -> Sites:
    """Return the sites of the weights: layer, slot and neurons of each."""
    return {
        f"{name}_dendrite_{k}": (name, k, np.flatnonzero(row))
        for name, mask in masks.items()
        for k, row in enumerate(mask)
        if np.any(row)
    }


def masks_of(dendrites: Mapping[str, Dendrites]) -> dict[str, np.ndarray]:
    """Return the masks by name, concrete."""
    return {name: np.asarray(there.mask) for name, there in dendrites.items()}
