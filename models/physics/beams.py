"""A beam of Euler and Bernoulli's, 1 m long, on two supports, under one load."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist

from probbp.checks import check_choice
from probbp.models.physics.cases import Case

POINTS = np.linspace(0.0, 1.0, 32)
"""Where the deflection is measured [m]."""

LOAD, INERTIA = 1.0, 2e-6


def beam(confounder: str = "springs") -> Case:
    """Return the beam: its stiffness and the load's position are sought.

    Args:
        confounder: "springs", of the paper: vertical and rotational, at the right support. The
            others add a term that depends on the labels alone to the deflection, so that it is
            known what can be identified. "offset": a rigid rotation with the spring's compliance
            and a bow sin(3 pi x) with the temperature, which no simply supported beam imitates; the
            physics is exact at the reference. "bow": x (1 - x) with the temperature, which lies
            almost in the physics' span: it cannot be told from a change of stiffness.

    Raises:
        ValueError: for another confounder.

    Returns:
        A `Case`.

    Example:
        >>> import jax
        >>> from probbp.models.physics import simulate
        >>> simulate(jax.random.key(0), beam("offset"), 3).x.shape
        (3, 32)
    """
    check_choice("confounder", confounder, ("springs", "offset", "bow"))

    def response(factors):
        e, x_f = factors["E"], factors["x_F"]
        log_spring, temperature = factors["log_k"], factors["T"]
        if confounder == "springs":
            return sprung_deflection(e, x_f, log_spring, temperature)
        sunk = 500 * (jnp.exp(-log_spring) - jnp.exp(-8.0)) * POINTS
        shape = jnp.sin(3 * jnp.pi * POINTS) if confounder == "offset" else POINTS * (1 - POINTS)
        return deflection(e, x_f) - sunk - 0.1 * temperature * shape

    return Case(
        physics=lambda parameters: deflection(parameters["E"], parameters["x_F"]),
        priors={
            "E": dist.TruncatedNormal(4.0, 1.0, low=2.0, high=6.0),
            "x_F": dist.TruncatedNormal(0.5, 0.2, low=0.01, high=0.99),
        },
        factors={
            "E": dist.Uniform(2.5, 4.5),
            "x_F": dist.Uniform(0.3, 0.7),
            "log_k": dist.Uniform(6.0, 8.0),
            "T": dist.Uniform(-11.0, 5.0),
        },
        response=response,
        domain=("T",),
        classes=("log_k",),
        known=(),
        noise=0.02,
        reference={"T": 5.0 if confounder == "springs" else 0.0, "log_k": 8.0},
    )


def deflection(stiffness: jax.Array, position: jax.Array) -> jax.Array:
    """Return the deflection of a simply supported beam, at 32 points.

    Args:
        stiffness: Young's modulus [MPa].
        position: of the load [m], between 0 and 1.

    Returns:
        (32,), upwards [mm].
    """
    ei, b = 1e6 * stiffness * INERTIA, 1 - position
    behind = jnp.maximum(POINTS - position, 0.0)
    w = LOAD * (b * POINTS * (1 - b**2 - POINTS**2) + behind**3) / (6 * ei)
    return -1e3 * w


def sprung_deflection(
    stiffness: jax.Array, position: jax.Array, log_spring: jax.Array, temperature: jax.Array
) -> jax.Array:
    """Return the deflection of a beam whose right support gives way, and freezes.

    Args:
        stiffness: Young's modulus [MPa].
        position: of the load [m].
        log_spring: natural logarithm of the vertical stiffness of the right support [N/m].
        temperature: [deg C]. Below zero the right bearing resists rotation: the logarithm of its
            rotational stiffness [N m/rad] is a sigmoid of the temperature.

    Returns:
        (32,), upwards [mm].
    """
    ei = 1e6 * stiffness * INERTIA
    rotational = 10 ** (-0.9 + 3.2 * jax.nn.sigmoid((1.1 - temperature) / 1.4))
    # The moment at the support closes the gap between its rotation and the free beam's.
    free_rotation = LOAD * position * (1 - position**2) / (6 * ei)
    moment = free_rotation / (1 / rotational + 1 / (3 * ei))
    reaction = LOAD * position + moment
    bent = moment * POINTS * (1 - POINTS**2) / (6 * ei)
    sunk = reaction / jnp.exp(log_spring) * POINTS
    return deflection(stiffness, position) + 1e3 * (bent - sunk)
