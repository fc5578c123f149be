"""A damped oscillator, by its ordinary differential equation."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist

from probbp.models import runge_kutta
from probbp.models.physics.cases import Case

TIMES = np.linspace(0.0, 9.95, 64)
"""Of the records [s]."""


def oscillator() -> Case:
    """Return the oscillator: its mass is sought, the physics knows no damping.

    The physics is cos(t / sqrt(m)). The truth has damping (class), a spring that softens with the
    temperature, k = 1 + 0.01 (20 - T) (domain), and another start (observed by no one). Mass and
    temperature enter by m / k alone, and the damping multiplies the physics, which no added
    residual represents: what can be identified is m / k, where the damping is small.

    Returns:
        A `Case`. See `simulate` for an example.
    """

    def response(factors):
        spring = 1 + 0.01 * (20 - factors["temperature"])
        return oscillation(factors["m"], factors["damping"], spring, factors["initial"])

    return Case(
        physics=lambda parameters: jnp.cos(TIMES / jnp.sqrt(parameters["m"])),
        priors={"m": dist.Uniform(1.0, 2.0)},
        factors={
            "m": dist.Uniform(1.2, 1.8),
            "damping": dist.Uniform(0.0, 2.0),
            "temperature": dist.Uniform(0.01, 39.99),
            "initial": dist.Uniform(0.9, 1.1),
        },
        response=response,
        domain=("temperature",),
        classes=("damping",),
        known=(),
        noise=0.01,
        reference={"temperature": 20.0, "damping": 0.0},
    )


def oscillation(mass: jax.Array, damping: Any, spring: Any, initial: Any) -> jax.Array:
    """Return the displacement of m x'' + d x' + k x = 0 from rest, at 64 times up to 9.95 s.

    Args:
        mass: m [kg].
        damping: d [N s/m].
        spring: k [N/m].
        initial: displacement at the start [m].
    """

    def field(state):
        displacement, velocity = state
        return jnp.stack([velocity, -(damping * velocity + spring * displacement) / mass])

    start = jnp.stack([jnp.asarray(initial, float), jnp.zeros((), float)])
    return runge_kutta.solve(field, start, jnp.asarray(TIMES))[:, 0]
