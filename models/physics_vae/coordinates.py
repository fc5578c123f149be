"""Latents without constraints: where each lies, and how it is mapped to its support."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from numpyro.distributions import biject_to


class Latent(NamedTuple):
    """Where a latent site lies among the unconstrained coordinates.

    Attributes:
        start: its first coordinate.
        shape: unconstrained.
        transform: from unconstrained to the site's values.
        event_dim: of the site.
    """

    start: int
    shape: tuple[int, ...]
    transform: Any
    event_dim: int

    @property
    def coordinates(self) -> slice:
        """The coordinates of the site."""
        return slice(self.start, self.start + math.prod(self.shape))


def latents_of(priors, dims):
    """Return the latent sites, and location and scale of u, and of the physics' parameters."""
    latents, start, of_u, of_z = {}, 0, [], []
    for name, prior in priors.items():
        transform = biject_to(prior.support)
        # By quantiles of draws, as some priors have no moments.
        values = prior.sample(jax.random.key(0), (1000,))
        u = transform.inv(values)
        latents[name] = Latent(start, u.shape[1:], transform, len(prior.event_shape))
        start += math.prod(u.shape[1:])
        of_u.append(_middle(u))
        of_z.append(_middle(values))
    for name, dim in dims.items():
        identity = biject_to(dist.constraints.real_vector)
        latents[f"z_{name}"] = Latent(start, (dim,), identity, 1)
        start += dim
        of_u.append(jnp.stack([jnp.zeros(dim), jnp.ones(dim)]))
    return latents, jnp.concatenate(of_u, 1), jnp.concatenate(of_z, 1)


def constrain(latent, position):
    """Return a site's values, and the logarithm of the Jacobian, of coordinates (records, d)."""
    u = position[..., latent.coordinates].reshape(*position.shape[:-1], *latent.shape)
    value = latent.transform(u)
    log_det = latent.transform.log_abs_det_jacobian(u, value)
    return value, log_det.reshape(*position.shape[:-1], -1).sum(-1)


def _middle(draws):
    """Return median and spread (2, n) of draws (draws, ...)."""
    quantiles = jnp.array([0.25, 0.5, 0.75])
    low, middle, high = jnp.quantile(draws.reshape(len(draws), -1), quantiles, axis=0)
    return jnp.stack([middle, (high - low) / 1.349])
