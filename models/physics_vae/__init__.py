r"""A variational autoencoder whose decoder is a physical model plus a residual, kept apart.

Koune & Cicirello, 2025, arXiv:2506.13658. A response x is what an incomplete physical model makes
of its parameters, plus what a network makes of two further latents that know about the domain c
(temperature, speed) and the class y (damage):

.. math::
    x \sim N(g(z_x) + h(z_c, z_y),\ \sigma_x^2), \qquad
    z_c \sim p(z_c \mid c), \qquad z_y \sim p(z_y \mid y)

A flexible h would explain what the physics could. Hence the gradient of the response is reversed,
or cut, on its way from h into the encoder: the latents of the residual are left to what predicts c
and y.

    vae = physics_vae(physics, priors, x, domain=continuous(c), classes=continuous(y))
    result = svi(vae, optax.adam(1e-3), strength=0.0).run(rng_key, 10_000, x, c, y)
    draws = predict(vae, rng_key, result.params, x_test)
"""

from probbp.models.physics_vae.coordinates import Latent
from probbp.models.physics_vae.labels import Label, categorical, continuous
from probbp.models.physics_vae.model import PhysicsVAE, physics_vae
from probbp.models.physics_vae.networks import MLP
from probbp.models.physics_vae.posterior import Refinement, pareto_k, refinement
from probbp.models.physics_vae.prediction import decode, predict, to_arviz
from probbp.models.physics_vae.separation import disentanglement, leakage
from probbp.models.physics_vae.training import cyclical_schedule, dann_schedule, roles, svi

__all__ = [
    "MLP",
    "Label",
    "Latent",
    "PhysicsVAE",
    "Refinement",
    "categorical",
    "continuous",
    "cyclical_schedule",
    "dann_schedule",
    "decode",
    "disentanglement",
    "leakage",
    "pareto_k",
    "physics_vae",
    "predict",
    "refinement",
    "roles",
    "svi",
    "to_arviz",
]
