"""Whether physics and residual are kept apart: who takes what, and what can be read off where."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from probbp.models.physics_vae.model import PhysicsVAE
from probbp.models.physics_vae.prediction import decode


def leakage(
    vae: PhysicsVAE,
    params: Mapping[str, Any],
    x: jax.Array,
    known: jax.Array | None = None,
) -> dict[str, jax.Array]:
    """Return the shares of a variation that the physics and the residual take for theirs.

    Give it responses in groups, within which one cause alone varies. Where it is the physics'
    parameters (many structures, one domain and class), the share of the residual is leakage. Where
    it is domain and class (one structure), the share of the physics is: far above zero the
    confounder lies in the span of the physics, or the decoder has not been told otherwise, and
    parameters are not identified under it, whatever the posterior's width.

    Args:
        vae: from `physics_vae`.
        params: of SVI.
        x: (groups, members, outputs), best without noise.
        known: inputs of the physics (groups, members, n).

    Returns:
        "physics" and "residual": variance within groups of each, at the encoder's mean, over that
        of x. They may add up to more than one where they cancel.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import optax
        >>> from numpyro import distributions as dist
        >>> from probbp.models.physics_vae import continuous, physics_vae, svi
        >>> times = jnp.linspace(0, 3, 8)
        >>> def physics(parameters):
        ...     return jnp.exp(-parameters["rate"] * times)
        >>> c = jnp.tile(jnp.array([[0.0], [1.0]]), (8, 1))
        >>> x = jax.vmap(physics)({"rate": jnp.linspace(0.5, 2, 16)}) + 0.2 * c
        >>> vae = physics_vae(
        ...     physics, {"rate": dist.LogNormal(0.0, 0.5)}, x, domain=continuous(c), domain_dim=1
        ... )
        >>> optimiser = svi(vae, optax.adam(1e-3), strength=0.0)
        >>> result = optimiser.run(jax.random.key(0), 2, x, c, progress_bar=False)
        >>> shares = leakage(vae, result.params, x.reshape(2, 8, 8))  # two groups of eight
        >>> sorted(shares)
        ['physics', 'residual']
    """
    flat = x.reshape(-1, x.shape[-1])
    inputs = None if known is None else known.reshape(-1, known.shape[-1])
    sites = decode(vae, params, vae.encode(params, flat)[0], inputs)
    total = jnp.var(x, axis=1).mean()
    return {
        name: jnp.var(sites[name].reshape(x.shape), axis=1).mean() / total
        for name in ("physics", "residual")
    }


def disentanglement(
    latents: Mapping[str, Any], factors: Mapping[str, Any]
) -> dict[str, dict[str, float]]:
    """Return how well each factor is predicted from each group of latents, linearly.

    Args:
        latents: group to (records,) or (records, n): one draw of each record's posterior, or its
            mean.
        factors: true ones by name, each (records,).

    Returns:
        Group to factor to R^2 of the second half of the records, by least squares on the first.

    Example:
        >>> import numpy as np
        >>> z = np.random.default_rng(0).normal(size=(100, 2))
        >>> table = disentanglement({"z": z}, {"a": z[:, 0] - 2 * z[:, 1]})
        >>> round(table["z"]["a"], 6)
        1.0
    """
    table = {}
    for group, values in latents.items():
        values = np.asarray(values, float)
        design = np.column_stack([np.ones(len(values)), values.reshape(len(values), -1)])
        half = len(design) // 2
        table[group] = {}
        for name, factor in factors.items():
            factor = np.asarray(factor, float)
            weights, *_ = np.linalg.lstsq(design[:half], factor[:half])
            errors = factor[half:] - design[half:] @ weights
            table[group][name] = float(1 - np.mean(errors**2) / np.var(factor[half:]))
    return table
