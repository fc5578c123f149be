"""From the amortised posterior to the true one: a density for samplers, and if it is needed."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.handlers import seed, substitute, trace
from numpyro.infer.util import compute_log_probs

from probbp.checks import check_count, check_rng_key
from probbp.models.physics_vae.coordinates import constrain
from probbp.models.physics_vae.model import PhysicsVAE
from probbp.models.physics_vae.prediction import decode


class Refinement(NamedTuple):
    """The posterior of one record, for a sampler.

    Attributes:
        logdensity_fn: of unconstrained coordinates (dim,), up to a constant.
        position: the encoder's mean.
        inverse_mass_matrix: the encoder's covariance (dim, dim).
        constrain_fn: `(position) -> sites`: latents in their units, `physics`, `residual`,
            `prediction`.
    """

    logdensity_fn: Callable[[jax.Array], jax.Array]
    position: jax.Array
    inverse_mass_matrix: jax.Array
    constrain_fn: Callable[[jax.Array], dict[str, jax.Array]]


def refinement(
    vae: PhysicsVAE,
    params: Mapping[str, Any],
    x: jax.Array,
    c: jax.Array | None = None,
    y: jax.Array | None = None,
    *,
    known: jax.Array | None = None,
) -> Refinement:
    """Return the true posterior of one record, with the encoder's Gaussian as start and scale.

    The networks are frozen, the labels' training terms left out and no gradient is reversed. A
    sampler corrects what amortisation did to the posterior; it cannot correct a decoder whose
    physics is wrong. `probbp.mala(r.logdensity_fn, step_size, r.inverse_mass_matrix)`,
    `blackjax.nuts(...)` and `probbp.sample(..., postprocess_fn=r.constrain_fn)` take it as it is,
    and `jax.vmap` maps it over records.

    Args:
        vae: from `physics_vae`.
        params: of SVI.
        x: one response (outputs,).
        c: its domain; `None` if unknown.
        y: its class; `None` if unknown.
        known: inputs of the physics (n,).

    Returns:
        A `Refinement`. Labels that are missing and continuous follow as further coordinates.
    """
    given = {"c": c, "y": y}
    mean, factor = (a[0] for a in vae.encode(params, x[None]))
    position, covariance, starts = mean, factor @ factor.T, {}
    for name, label in vae.labels.items():
        if given[name] is not None or label.marginal.has_enumerate_support:
            continue
        z, _ = constrain(vae.latents[f"z_{name}"], mean[None])
        predicted = vae.predict_label(params, name, z)
        starts[name] = len(position)
        location, variance = (jnp.ravel(a) for a in (predicted.mean, predicted.variance))
        position = jnp.concatenate([position, location.astype(position.dtype)])
        covariance = jax.scipy.linalg.block_diag(covariance, jnp.diag(variance))

    rows = {name: None if v is None else jnp.asarray(v)[None] for name, v in given.items()}
    inputs = None if known is None else known[None]

    def logdensity_fn(position):
        values, log_det = dict(params), jnp.zeros((), position.dtype)
        for name, latent in vae.latents.items():
            values[name], term = constrain(latent, position[None])
            log_det = log_det + term[0]
        for name, start in starts.items():
            shape = vae.labels[name].marginal.event_shape
            part = position[start : start + math.prod(shape)]
            values[f"{name}_missing"] = part.reshape(1, *shape)
        options = {"known": inputs, "heads": False}
        log_probs, _ = compute_log_probs(
            vae.model, (x[None], rows["c"], rows["y"]), options, values
        )
        return jnp.asarray(log_det + sum(log_probs.values()))

    def constrain_fn(position):
        sites = decode(vae, params, position[None], inputs)
        return {name: site[0] for name, site in sites.items()}

    return Refinement(logdensity_fn, position, covariance, constrain_fn)


def pareto_k(
    vae: PhysicsVAE,
    rng_key: jax.Array,
    params: Mapping[str, Any],
    x: jax.Array,
    c: jax.Array | None = None,
    y: jax.Array | None = None,
    *,
    known: jax.Array | None = None,
    num_samples: int = 1000,
) -> np.ndarray:
    """Return, for each record, how far the amortised posterior is from the true one.

    The shape of the Pareto tail of the ratios of the two, by ArviZ. Below 0.7 the encoder's draws
    can stand for the posterior, or be reweighted to it; above they cannot, and `refinement` is
    needed. It is about amortisation: it does not know whether the physics is right.

    Args:
        vae: from `physics_vae`.
        rng_key: a key.
        params: of SVI.
        x: (records, outputs).
        c: (records, ...), `None` if unknown.
        y: (records, ...), `None` if unknown.
        known: inputs of the physics (records, n).
        num_samples: draws for each record, some hundreds at least.

    Returns:
        (records,).

    Example:
        >>> import jax, jax.numpy as jnp, numpyro.distributions as dist, optax
        >>> from probbp.models.physics_vae import continuous, physics_vae, svi
        >>> times = jnp.linspace(0, 3, 16)
        >>> physics = lambda parameters: jnp.exp(-parameters["rate"] * times)
        >>> rate, c = jnp.linspace(0.5, 2, 64), jnp.tile(jnp.array([0.0, 1.0]), 32)[:, None]
        >>> x = jax.vmap(physics)({"rate": rate}) + 0.2 * c
        >>> priors = {"rate": dist.LogNormal(0.0, 0.5)}
        >>> vae = physics_vae(physics, priors, x, domain=continuous(c), domain_dim=1)
        >>> optimizer = svi(vae, optax.adam(3e-3), strength=0.0)
        >>> result = optimizer.run(jax.random.key(0), 300, x, c, progress_bar=False)
        >>> pareto_k(vae, jax.random.key(1), result.params, x[:3], c[:3], num_samples=200).shape
        (3,)

    Reference:
        Yao, Vehtari, Simpson & Gelman, 2018, arXiv:1802.02538.
    """
    from probbp.inference_data import pareto_shapes

    check_rng_key("rng_key", rng_key)
    num_samples = check_count("num_samples", num_samples)
    options = {"known": known, "heads": False}

    def log_ratio(key):
        guide = trace(substitute(seed(vae.guide, key), dict(params)))
        sites = guide.get_trace(x, c, y, **options)
        sites = {name: site for name, site in sites.items() if site["type"] == "sample"}
        values = {name: site["value"] for name, site in sites.items()}
        log_q = sum(site["fn"].log_prob(site["value"]) for site in sites.values())
        log_p, _ = compute_log_probs(
            vae.model, (x, c, y), options, {**params, **values}, sum_log_prob=False
        )
        return sum(log_p.values()) - log_q

    keys = jax.random.split(rng_key, num_samples)
    ratios = jax.jit(lambda keys: jax.lax.map(log_ratio, keys))(keys)
    return pareto_shapes(np.asarray(ratios).T)
