r"""The transitions of a step that cost no evaluation: Hamiltonian Monte Carlo on the surrogate.

With the surrogate :math:`g(z) = -|z|^2 / 2 + r(z)`, the Gaussian part of the dynamics is a rotation
and is integrated exactly; only the remainder r is split off in kicks. Kick, rotation and kick
preserve volume and are undone by reversing the momentum, so that with a Metropolis test each
transition is reversible with respect to :math:`e^{g}`.

Shahbaba, Lan, Johnson & Neal, 2014 (split Hamiltonian Monte Carlo).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from blackjax.mcmc.proposal import static_binomial_sampling


class Point(NamedTuple):
    """What the surrogate knows of a whitened point.

    Attributes:
        whitened: z.
        remainder: g(z) + |z|^2 / 2, the surrogate beyond its Gaussian.
        grad: of the remainder.
    """

    whitened: jax.Array
    remainder: jax.Array
    grad: jax.Array


Predict = Callable[[jax.Array], tuple[jax.Array, jax.Array]]
"""The remainder of the surrogate and its gradient."""


def predictor(surrogate: Any) -> Predict:
    """Return what predicts the remainder; `None` predicts none."""
    if surrogate is None:
        return lambda whitened: (jnp.zeros((), whitened.dtype), jnp.zeros_like(whitened))
    # Without the barrier XLA, on a CPU, turns products with a tensor of zeros that it knows at
    # compile time, that of a degree which was not chosen, into memory that was never written.
    return jax.lax.optimization_barrier(surrogate).value_and_grad


def point_at(predict: Predict, whitened: jax.Array) -> Point:
    """Evaluate the surrogate."""
    return Point(whitened, *predict(whitened))


def surrogate_logdensity(point: Point) -> jax.Array:
    """Return g(z)."""
    return point.remainder - point.whitened @ point.whitened / 2


def inner_transitions(
    rng_key: jax.Array,
    predict: Predict,
    point: Point,
    step_size: jax.Array,
    num_transitions: int,
    num_steps: int,
) -> tuple[Point, jax.Array]:
    """Apply one reversible transition of the surrogate several times.

    All have the same step size: a product of different kernels would not be reversible.
    """

    def body(point, key):
        return inner_transition(key, predict, point, step_size, num_steps)

    point, rates = jax.lax.scan(body, point, jax.random.split(rng_key, num_transitions))
    return point, jnp.mean(rates)


def inner_transition(
    rng_key: jax.Array, predict: Predict, point: Point, step_size: jax.Array, num_steps: int
) -> tuple[Point, jax.Array]:
    """Make one Hamiltonian transition that leaves the surrogate invariant."""
    key_momentum, key_accept = jax.random.split(rng_key)
    momentum = jax.random.normal(key_momentum, point.whitened.shape, point.whitened.dtype)

    def body(carry, _):
        point, momentum = carry
        return leapfrog(predict, point, momentum, step_size), None

    (end, last), _ = jax.lax.scan(body, (point, momentum), length=num_steps)
    return accept_inner(key_accept, energy(point, momentum) - energy(end, last), point, end)


def leapfrog(
    predict: Predict, point: Point, momentum: jax.Array, step_size: jax.Array
) -> tuple[Point, jax.Array]:
    """Half a kick by the remainder, an exact rotation under the Gaussian, half a kick."""
    momentum = momentum + step_size / 2 * point.grad
    cos, sin = jnp.cos(step_size), jnp.sin(step_size)
    rotated = cos * point.whitened + sin * momentum
    momentum = cos * momentum - sin * point.whitened
    point = point_at(predict, rotated)
    return point, momentum + step_size / 2 * point.grad


def energy(point: Point, momentum: jax.Array) -> jax.Array:
    """Return the Hamiltonian of the surrogate."""
    return momentum @ momentum / 2 - surrogate_logdensity(point)


def accept_inner(
    rng_key: jax.Array, log_ratio: jax.Array, point: Point, end: Point
) -> tuple[Point, jax.Array]:
    """Make the Metropolis test of an inner transition."""
    log_ratio = jnp.where(jnp.isnan(log_ratio), -jnp.inf, log_ratio)
    point, (_, acceptance_rate, _) = static_binomial_sampling(rng_key, log_ratio, point, end)
    return point, acceptance_rate
