"""What a fitted autoencoder says of new responses, and of what they would be elsewhere."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.handlers import seed, substitute, trace
from numpyro.infer import Predictive

from probbp.checks import check_count, check_rng_key
from probbp.models.physics_vae.coordinates import constrain
from probbp.models.physics_vae.model import PhysicsVAE


def predict(
    vae: PhysicsVAE,
    rng_key: jax.Array,
    params: Mapping[str, Any],
    x: jax.Array,
    c: jax.Array | None = None,
    y: jax.Array | None = None,
    *,
    known: jax.Array | None = None,
    num_samples: int = 100,
) -> dict[str, jax.Array]:
    """Return draws of the amortised posterior of new responses, and what they predict.

    With c, z_c is drawn from p(z_c | c) instead of from the encoder, as the paper does: this is
    prediction where the domain is known, and if c is not that of x, an answer to "what if": what
    the same structure would respond in that domain. The other latents, and with them `physics`, are
    those that the same key gives without c, to the bit, unless `known` is changed as well. In the
    same way with y.

    The class or domain of x is predicted by the draws of `c` and `y`, or the mean over draws of
    `c_mean` and `y_mean`: locations or probabilities.

    Args:
        vae: from `physics_vae`.
        rng_key: a key.
        params: of SVI.
        x: (records, outputs).
        c: (records, ...), the domain to be in.
        y: (records, ...), the class to be in.
        known: inputs of the physics (records, n).
        num_samples: draws.

    Returns:
        Sites, with the draws on their first axis and the records on the second.
    """
    check_rng_key("rng_key", rng_key)
    num_samples = check_count("num_samples", num_samples)
    key_guide, key_model = jax.random.split(rng_key)
    draws = Predictive(vae.guide, params=dict(params), num_samples=num_samples)(key_guide, x)
    given = {name for name, value in (("c", c), ("y", y)) if value is not None}
    dropped = {"noise"} | {f"z_{name}" for name in given} | {f"{name}_missing" for name in given}
    latents = {name: draw for name, draw in draws.items() if name not in dropped}
    model = Predictive(vae.model, posterior_samples=latents, params=dict(params))
    drawn = model(key_model, None, c, y, known=known, num_records=len(x))
    sites = {name: draw for name, draw in (latents | drawn).items() if "missing" not in name}
    return {name: jnp.asarray(draw) for name, draw in sites.items()}


def decode(
    vae: PhysicsVAE,
    params: Mapping[str, Any],
    position: jax.Array,
    known: jax.Array | None = None,
) -> dict[str, jax.Array]:
    """Return the sites at unconstrained coordinates: latents, `physics`, `residual`, `prediction`.

    Args:
        vae: from `physics_vae`.
        params: of SVI.
        position: (records, d), such as the encoder's mean.
        known: inputs of the physics (records, n).
    """
    values = {name: constrain(latent, position)[0] for name, latent in vae.latents.items()}
    # Labels that are missing are drawn, but do not enter, given z_c and z_y.
    model = substitute(seed(vae.model, 0), {**params, **values})
    traced = trace(model).get_trace(num_records=len(position), known=known, heads=False)
    sites = ("physics", "residual", "prediction")
    return values | {name: traced[name]["value"] for name in sites}


def to_arviz(draws: Mapping[str, Any], observed: Mapping[str, Any] | None = None) -> Any:
    """Turn draws of `predict` into ArviZ's object, one chain.

    Args:
        draws: sites with the draws on the first axis.
        observed: data under the names of their sites, `x`, `c`, `y`.

    Returns:
        An `arviz.InferenceData` (ArviZ 0.x) or `xarray.DataTree` (ArviZ 1.x): `x`, `c` and `y` in
        `posterior_predictive`, latents and the split of the response in `posterior`.
    """
    from probbp.inference_data import from_groups

    groups: dict[str, Any] = {"posterior": {}, "posterior_predictive": {}}
    for name, draw in draws.items():
        group = "posterior_predictive" if name in ("x", "c", "y") else "posterior"
        groups[group][name] = np.asarray(draw)[None]
    if observed:
        groups["observed_data"] = {name: np.asarray(value) for name, value in observed.items()}
    return from_groups({name: group for name, group in groups.items() if group})
