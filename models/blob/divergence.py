"""How far the posterior of a factor is from its prior, and what its scale is made of."""

import jax
import jax.numpy as jnp


def std(g: jax.Array) -> jax.Array:
    """Return the posterior's standard deviation, G o G, kept off zero by the dtype's epsilon.

    Args:
        g: G, any shape.

    Example:
        >>> import jax.numpy as jnp
        >>> std(jnp.array([0.5, -2.0])).round(3).tolist()
        [0.25, 4.0]
    """
    return g * g + jnp.finfo(g.dtype).eps


def root_of_std(std: jax.Array) -> jax.Array:
    """Return G for a posterior's standard deviation, the inverse of `std`.

    Args:
        std: any shape, not negative.

    Example:
        >>> import jax.numpy as jnp
        >>> root_of_std(jnp.array([0.25, 4.0])).round(3).tolist()
        [0.5, 2.0]
    """
    return jnp.sqrt(jnp.maximum(std - jnp.finfo(std.dtype).eps, 0))


def divergence(loc: jax.Array, g: jax.Array, prior_scale: float) -> jax.Array:
    """Return the divergence of N(loc, std(g)^2) from N(0, prior_scale^2), summed over entries."""
    omega = std(g)
    terms = jnp.log(prior_scale / omega) + (omega**2 + loc**2) / (2 * prior_scale**2) - 0.5
    return terms.sum()
