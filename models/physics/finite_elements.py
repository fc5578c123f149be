"""Bridges of two spans, by finite elements of a beam, while a vehicle crosses them."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist

from probbp.models.physics.cases import Case

NUM_ELEMENTS, ELEMENT, BENDING = 16, 2.5, 2e10
PIER, SENSOR = NUM_ELEMENTS // 2, 3
AXLES, AXLE_LOAD, SPEED, FIBRE = np.array([0.0, -4.0]), 1e5, 2.1, 1.0
WINDOW = np.linspace(1.0, 21.0, 64)
"""Times of the record, while the load crosses [s]."""

# Cubic elements; the degrees of freedom of a node are its deflection and its slope times the
# length. In units of the intact bending stiffness over the length cubed.
_ELEMENT_MATRIX = np.array(
    [[12.0, 6.0, -12.0, 6.0], [6.0, 4.0, -6.0, 2.0], [-12.0, -6.0, 12.0, -6.0], [6.0, 2.0, -6.0, 4]]
)


def bridges() -> Case:
    """Return the bridges: the stiffness of their supports is sought, damage is the class.

    The physics knows neither damage nor the vehicle's speed and weight; it is told how far the
    sensor is from its place.

    Returns:
        A `Case`.

    Example:
        >>> import jax
        >>> from probbp.models.physics import simulate
        >>> simulate(jax.random.key(0), bridges(), 3).x.shape
        (3, 64)
    """

    def parts(values):
        return jnp.stack([values["log_k1"], values["log_k2"]])

    def response(factors):
        return strain(
            parts(factors),
            jnp.stack([factors["damage1"], factors["damage2"]]),
            factors["speed"],
            factors["offset"],
            factors["load"],
        )

    return Case(
        physics=lambda parameters, known: strain(parts(parameters), jnp.zeros(2), offset=known[0]),
        priors={"log_k1": dist.Uniform(6.5, 9.5), "log_k2": dist.Uniform(6.5, 9.5)},
        factors={
            "log_k1": dist.Uniform(7.0, 9.0),
            "log_k2": dist.Uniform(7.0, 9.0),
            "damage1": dist.Uniform(0.0, 1.0),
            "damage2": dist.Uniform(0.0, 1.0),
            "speed": dist.Uniform(0.9, 1.1),
            "offset": dist.Uniform(-1.0, 1.0),
            "load": dist.Uniform(0.95, 1.05),
        },
        response=response,
        domain=("speed", "offset"),
        classes=("damage1", "damage2"),
        known=("offset",),
        noise=1e-4,
        reference={"speed": 1.0, "offset": 0.0, "damage1": 0.0, "damage2": 0.0},
    )


def strain(
    log_springs: jax.Array,
    damage: jax.Array,
    speed: Any = 1.0,
    offset: Any = 0.0,
    load: Any = 1.0,
) -> jax.Array:
    """Return the strain at a sensor while a vehicle crosses a bridge of two spans of 20 m.

    A beam of 16 finite elements on a rigid abutment and two springs; the vehicle, two axles, moves
    slowly enough for statics. By reciprocity the strain under a load at p is the deflection at p
    under a unit curvature at the sensor: one solve, for the sensor, gives all times.

    Args:
        log_springs: (2,), decimal logarithms of the vertical stiffness [N/m] of the pier and of the
            right abutment.
        damage: (2,), between 0 and 1: six tenths of it are lost in stiffness in the four elements
            around the sensor, and in the four around the pier.
        speed: of the vehicle, over 2.1 m/s.
        offset: of the sensor from its place [m], at most one to either side.
        load: of the vehicle, over its nominal one.

    Returns:
        (64,), at 1 to 21 s [permille].
    """
    element = jnp.arange(NUM_ELEMENTS)
    around = [(element >= i - 2) & (element < i + 2) for i in (SENSOR + 1, PIER)]
    lost = 0.6 * damage @ jnp.stack(around).astype(float)
    matrices = (1 - lost)[:, None, None] * _ELEMENT_MATRIX
    springs = 10 ** jnp.asarray(log_springs) * ELEMENT**3 / BENDING

    diagonal = jnp.zeros((NUM_ELEMENTS + 1, 2, 2))
    diagonal = diagonal.at[:-1].add(matrices[:, :2, :2]).at[1:].add(matrices[:, 2:, 2:])
    supports = jnp.array([0, PIER, NUM_ELEMENTS])
    diagonal = diagonal.at[supports, 0, 0].add(jnp.concatenate([jnp.array([1e3]), springs]))

    # Second derivatives of the shape functions, at the sensor.
    at = 0.5 + jnp.asarray(offset) / ELEMENT
    bent = jnp.stack([12 * at - 6, 6 * at - 4, 6 - 12 * at, 6 * at - 2])
    curvature = jnp.zeros((NUM_ELEMENTS + 1, 2))
    curvature = curvature.at[SENSOR].set(bent[:2]).at[SENSOR + 1].set(bent[2:])
    deflected = _solve_tridiagonal(diagonal, matrices[:, :2, 2:], curvature)

    place = SPEED * speed * WINDOW[:, None] + AXLES
    index = jnp.clip(jnp.floor(place / ELEMENT).astype(int), 0, NUM_ELEMENTS - 1)
    s = place / ELEMENT - index
    shapes = jnp.stack(
        [1 - 3 * s**2 + 2 * s**3, s - 2 * s**2 + s**3, 3 * s**2 - 2 * s**3, s**3 - s**2], -1
    )
    nodes = jnp.concatenate([deflected[index], deflected[index + 1]], -1)
    on_bridge = (place >= 0) & (place <= NUM_ELEMENTS * ELEMENT)
    influence = jnp.where(on_bridge, (shapes * nodes).sum(-1), 0.0).sum(-1)
    # A load is downwards, and what it bends downwards stretches the lower fibre.
    return -1e3 * FIBRE * load * AXLE_LOAD * ELEMENT / BENDING * influence


def _solve_tridiagonal(diagonal, upper, right):
    """Solve a symmetric block-tridiagonal system: (n, 2, 2), (n - 1, 2, 2), (n, 2) to (n, 2)."""

    def inverse(a):
        adjugate = jnp.array([[a[1, 1], -a[0, 1]], [-a[1, 0], a[0, 0]]])
        return adjugate / (a[0, 0] * a[1, 1] - a[0, 1] * a[1, 0])

    def eliminate(carry, block):
        inverted, reduced = carry
        diagonal, upper, right = block
        factor = upper.T @ inverted
        carry = inverse(diagonal - factor @ upper), right - factor @ reduced
        return carry, carry

    first = inverse(diagonal[0]), right[0]
    _, rest = jax.lax.scan(eliminate, first, (diagonal[1:], upper, right[1:]))
    inverted, reduced = jax.tree.map(lambda a, b: jnp.concatenate([a[None], b]), first, rest)

    def substitute(following, block):
        inverted, reduced, upper = block
        solved = inverted @ (reduced - upper @ following)
        return solved, solved

    last = inverted[-1] @ reduced[-1]
    _, solved = jax.lax.scan(substitute, last, (inverted[:-1], reduced[:-1], upper), reverse=True)
    return jnp.concatenate([solved, last[None]])
