"""Structures whose physical model is incomplete: a beam, an oscillator, a population of bridges.

The case studies of Koune & Cicirello, 2025, arXiv:2506.13658, simulated from equations. In each a
`Case` holds the physics that is known and a simulator that knows more: supports that give, damping,
temperature, damage. `bridges` has a beam finite-element model of its own.

    case = beam()
    records = simulate(jax.random.key(0), case, 1024)
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpyro.distributions as dist

Values = Mapping[str, Any]


class Case(NamedTuple):
    """A physical model, and a simulator of what is measured.

    Attributes:
        physics: `(parameters) -> response`, or `(parameters, known) -> response`, for one record.
        priors: of the physics' parameters, by name.
        factors: distributions of all that the simulator varies, by name.
        response: `(factors) -> response` of one record, without noise.
        domain: the factors observed as c, environment and operation.
        classes: the factors observed as y, condition.
        known: those of the domain that are inputs of the physics.
        noise: standard deviation of the noise of x, c and y.
        reference: factors of domain and class at which the physics comes closest to the response.
    """

    physics: Callable[..., jax.Array]
    priors: dict[str, dist.Distribution]
    factors: dict[str, dist.Distribution]
    response: Callable[[Values], jax.Array]
    domain: tuple[str, ...]
    classes: tuple[str, ...]
    known: tuple[str, ...]
    noise: float
    reference: dict[str, float]


class Records(NamedTuple):
    """What was measured, and the truth behind it.

    Attributes:
        x: responses (records, outputs).
        c: domain (records, domain factors).
        y: classes (records, class factors).
        known: inputs of the physics (records, known factors), `None` where it has none.
        factors: the simulator's, each (records,).
    """

    x: jax.Array
    c: jax.Array
    y: jax.Array
    known: jax.Array | None
    factors: dict[str, jax.Array]


def simulate(
    rng_key: jax.Array, case: Case, num_records: int, factors: Values | None = None
) -> Records:
    """Draw factors, responses and labels, all with the case's noise; known inputs without.

    Args:
        rng_key: a key.
        case: the case.
        num_records: how many.
        factors: values of some factors, broadcast to (num_records,), instead of draws.

    Example:
        >>> import jax
        >>> records = simulate(jax.random.key(0), oscillator(), 5, {"temperature": 20.0})
        >>> records.x.shape, records.c.shape, records.y.shape
        ((5, 64), (5, 1), (5, 1))
    """
    key_factors, key_x, key_c, key_y = jax.random.split(rng_key, 4)
    keys = jax.random.split(key_factors, len(case.factors))
    values = {
        name: prior.sample(key, (num_records,))
        for key, (name, prior) in zip(keys, case.factors.items(), strict=True)
    }
    for name, value in (factors or {}).items():
        values[name] = jnp.broadcast_to(jnp.asarray(value, float), (num_records,))

    def noisy(key, clean):
        return clean + case.noise * jax.random.normal(key, clean.shape, clean.dtype)

    def columns(names):
        return jnp.stack([values[name] for name in names], -1)

    return Records(
        noisy(key_x, jax.vmap(case.response)(values)),
        noisy(key_c, columns(case.domain)),
        noisy(key_y, columns(case.classes)),
        columns(case.known) if case.known else None,
        values,
    )


# ---------------------------------------------------------------------------------------
# Beam: Euler and Bernoulli's, 1 m long, on two supports, under one load.

POINTS = jnp.linspace(0.0, 1.0, 32)
LOAD, INERTIA = 1.0, 2e-6


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
    """
    if confounder not in ("springs", "offset", "bow"):
        raise ValueError(f"confounder must be 'springs', 'offset' or 'bow', got {confounder!r}.")

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


# ---------------------------------------------------------------------------------------
# Oscillator: an ordinary differential equation.

TIMES = jnp.linspace(0.0, 9.95, 64)


def rk4(
    field: Callable[[jax.Array], jax.Array],
    initial: jax.Array,
    times: jax.Array,
    num_substeps: int = 4,
) -> jax.Array:
    """Solve an autonomous differential equation by Runge and Kutta's method of fourth order.

    A scan, so that both AD modes, `jit` and `vmap` go through; the error falls with the fourth
    power of the step. For stiff or long problems take a solver such as diffrax's.

    Args:
        field: `state -> derivative`.
        initial: state (dim,) at the first of the times.
        times: (times,).
        num_substeps: steps between two times.

    Returns:
        States (times, dim).
    """

    def interval(state, duration):
        h = duration / num_substeps

        def step(state, _):
            k1 = field(state)
            k2 = field(state + h / 2 * k1)
            k3 = field(state + h / 2 * k2)
            k4 = field(state + h * k3)
            return state + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4), None

        state, _ = jax.lax.scan(step, state, length=num_substeps)
        return state, state

    _, states = jax.lax.scan(interval, initial, jnp.diff(times))
    return jnp.concatenate([initial[None], states])


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
    return rk4(field, start, TIMES)[:, 0]


def oscillator() -> Case:
    """Return the oscillator: its mass is sought, the physics knows no damping.

    The physics is cos(t / sqrt(m)). The truth has damping (class), a spring that softens with the
    temperature, k = 1 + 0.01 (20 - T) (domain), and another start (observed by no one). Mass and
    temperature enter by m / k alone, and the damping multiplies the physics, which no added
    residual represents: what can be identified is m / k, where the damping is small.
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


# ---------------------------------------------------------------------------------------
# Bridges: two spans, finite elements.

NUM_ELEMENTS, ELEMENT, BENDING = 16, 2.5, 2e10
PIER, SENSOR = NUM_ELEMENTS // 2, 3
AXLES, AXLE_LOAD, SPEED, FIBRE = jnp.array([0.0, -4.0]), 1e5, 2.1, 1.0
WINDOW = jnp.linspace(1.0, 21.0, 64)

# Cubic elements; the degrees of freedom of a node are its deflection and its slope times the
# length. In units of the intact bending stiffness over the length cubed.
_ELEMENT_MATRIX = jnp.array(
    [[12.0, 6.0, -12.0, 6.0], [6.0, 4.0, -6.0, 2.0], [-12.0, -6.0, 12.0, -6.0], [6.0, 2.0, -6.0, 4]]
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


def bridges() -> Case:
    """Return the bridges: the stiffness of their supports is sought, damage is the class.

    The physics knows neither damage nor the vehicle's speed and weight; it is told how far the
    sensor is from its place.
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
