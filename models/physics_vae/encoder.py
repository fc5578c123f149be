"""The guide of `physics_vae`: a Gaussian in unconstrained coordinates, read off the responses."""

import math

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist

from probbp.models.physics_vae.coordinates import constrain
from probbp.models.physics_vae.records import records_plate, rows_of


def blocks_of(latents, priors, guide):
    """Return the networks of the encoder by name: first coordinate and dimension of each."""
    num_latent = sum(math.prod(latent.shape) for latent in latents.values())
    if guide == "joint":
        return {"encoder": (0, num_latent)}
    of_labels = {
        name.removeprefix("z_"): (latent.start, latent.shape[0])
        for name, latent in latents.items()
        if name not in priors
    }
    num_physics = num_latent - sum(size for _, size in of_labels.values())
    blocks = {"x": (0, num_physics)} | of_labels
    return {f"encoder_{name}": block for name, block in blocks.items()}


def gaussian_of(net, blocks, loc, scale, spread_of_u):
    """Return the encoder's Gaussian: responses (records, outputs) to mean and Cholesky factor.

    Args:
        net: the name of a network to the network.
        blocks: from `blocks_of`.
        loc: location (outputs,) of the responses.
        scale: their scale.
        spread_of_u: middle and spread (2, d) of the prior, in unconstrained coordinates.
    """
    num_latent, dtype = spread_of_u.shape[1], spread_of_u.dtype

    def gaussian(x):
        standardised = (x - loc) / scale
        mean = jnp.zeros((*x.shape[:-1], num_latent), dtype)
        factor = jnp.zeros((*mean.shape, num_latent), dtype)
        for name, (start, d) in blocks.items():
            outputs = net(name)(standardised)
            mean = mean.at[..., start : start + d].set(outputs[..., :d])
            diagonal = jnp.arange(start, start + d)
            # A wide posterior drowns what a new network tells of the labels: it starts narrow.
            scales = jnp.exp(jnp.clip(outputs[..., d : 2 * d] - 2.0, -7.0, 3.0))
            factor = factor.at[..., diagonal, diagonal].set(scales)
            rows, columns = (start + index for index in np.tril_indices(d, -1))
            factor = factor.at[..., rows, columns].set(outputs[..., 2 * d :])
        # In units of the prior's spread, so that a new network's guess lies in its middle.
        shift, spread = spread_of_u
        return shift + spread * jnp.clip(mean, -50.0, 50.0), spread[:, None] * factor

    return gaussian


def guide_of(gaussian, net, labels, latents):
    """Return the NumPyro guide: draws of the Gaussian, mapped onto the supports of the latents."""

    def amortised(
        x,
        c=None,
        y=None,
        *,
        known=None,
        has_c=None,
        has_y=None,
        subsample_size=None,
        **of_the_model,
    ):
        if x is None:
            raise ValueError("The guide reads the responses: pass x.")
        rows = rows_of(labels, x, c, y, known, has_c, has_y, None)
        with records_plate(rows, subsample_size) as rows:
            mean, factor = gaussian(rows["x"])
            standard = dist.Normal(jnp.zeros_like(mean), 1.0).to_event(1)
            noise = numpyro.sample("noise", standard, infer={"is_auxiliary": True})
            u = mean + (factor @ noise[..., None])[..., 0]
            log_diagonal = jnp.log(jnp.diagonal(factor, axis1=-2, axis2=-1))
            for name, latent in latents.items():
                value, log_det = constrain(latent, u)
                log_det = log_det + log_diagonal[..., latent.coordinates].sum(-1)
                value = numpyro.sample(name, dist.Delta(value, -log_det, latent.event_dim))
                label = name.removeprefix("z_")
                has = rows[f"has_{label}"] if label in labels else None
                if has is None or labels[label].marginal.has_enumerate_support:
                    continue
                likelihood = labels[label].likelihood(net(f"head_{label}")(value))
                numpyro.sample(f"{label}_missing", likelihood.mask(~has))

    return amortised
