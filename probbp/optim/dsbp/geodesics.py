r"""Exact Metropolis moves on rotations, orthonormal frames and spheres.

The sampling side of `rotations`, and of the Lie-algebra extension of dynamic spectral
backpropagation (Muthuraman, 2025, arXiv:2505.23369), which gives no algorithm; the moves are the
known ones. A position X of shape (n, k) with orthonormal columns moves to :math:`e^{\Omega} X`,
along a geodesic of the rotations, so that it stays where it belongs up to rounding: k = n are
rotations, k < n is the Stiefel manifold, k = 1 the sphere. Densities are with respect to the
uniform distribution, which every rotation keeps.

A chain on square matrices keeps the sign of the determinant: it samples the rotations, or the
reflections, from where it starts.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer

from probbp.checks import check_count, check_number
from probbp.optim.dsbp.rotations import skew
from probbp.types import LogDensity, Tree


class GeodesicState(NamedTuple):
    """Where a chain is.

    Attributes:
        position: pytree of (..., n, k).
        logdensity: there.
        logdensity_grad: its gradient with respect to the entries of the matrices.
    """

    position: Tree
    logdensity: jax.Array
    logdensity_grad: Tree


class GeodesicInfo(NamedTuple):
    """What a step did.

    Attributes:
        acceptance_rate: the probability with which the proposal was accepted.
        is_accepted: whether it was.
        energy: of the proposal, minus its log density plus its kinetic energy.
    """

    acceptance_rate: jax.Array
    is_accepted: jax.Array
    energy: jax.Array


def random_rotation(
    scale: float, retraction: Callable[[jax.Array], jax.Array] = jax.scipy.linalg.expm
) -> Callable[[jax.Array, Tree], Tree]:
    r"""Return the random-walk proposal :math:`X' = \exp(s \Xi) X`, for `blackjax.rmh`.

    :math:`\Xi` is skew-symmetric with standard normal entries. As :math:`-\Xi` is as likely and the
    uniform distribution is kept by every rotation, the proposal is symmetric, and Metropolis needs
    the ratio of densities alone. `rotations.cayley` in the place of the exponential is symmetric
    too, and cheaper.

    Args:
        scale: s, radians for each pair of axes.
        retraction: makes a rotation from a skew-symmetric matrix.

    Returns:
        `(rng_key, position) -> position`, for pytrees of (..., n, k).

    Example:
        A von Mises-Fisher density on the sphere:

        >>> import blackjax, jax, jax.numpy as jnp
        >>> logdensity_fn = lambda x: 2.0 * x[2, 0]
        >>> algorithm = blackjax.rmh(logdensity_fn, random_rotation(0.8))
        >>> state = algorithm.init(jnp.eye(3)[:, :1])
        >>> for key in jax.random.split(jax.random.key(0), 5):
        ...     state, info = algorithm.step(key, state)
        >>> round(float(jnp.linalg.norm(state.position)), 5)
        1.0
    """
    check_number("scale", scale, "(0, inf)")

    def propose(rng_key, position):
        omega = _random_velocity(rng_key, position)
        return _turned(retraction, jax.tree.map(lambda o: scale * o, omega), position)

    return propose


def geodesic_hmc(
    logdensity_fn: LogDensity, step_size: float, num_integration_steps: int
) -> tuple[Callable, Callable]:
    r"""Return `init` and `step` of Hamiltonian Monte Carlo along geodesics.

    The velocity V is skew-symmetric, and X moves by :math:`\dot X = V X`. With the bi-invariant
    metric a free velocity is constant, so that the leapfrog step

    .. math:: V \leftarrow V + \tfrac{\epsilon}{2} (G X^\top - X G^\top), \qquad
        X \leftarrow e^{\epsilon V} X, \qquad
        V \leftarrow V + \tfrac{\epsilon}{2} (G X^\top - X G^\top),

    with G the gradient of the log density in the entries of X, is reversible and keeps the volume
    (Byrne & Girolami, 2013, for embedded manifolds). Metropolis makes it exact. On frames, k < n,
    it is the chain on all rotations of X, of which X is what we see.

    Args:
        logdensity_fn: of pytrees of (..., n, k), with respect to the uniform distribution. It is
            evaluated and differentiated at orthonormal X alone.
        step_size: epsilon.
        num_integration_steps: leapfrog steps, with one gradient and one exponential, O(n^3), each.

    Returns:
        `init(position, rng_key=None) -> GeodesicState` and
        `step(rng_key, state) -> (GeodesicState, GeodesicInfo)`, which
        `blackjax.SamplingAlgorithm(*geodesic_hmc(...))` takes. A proposal with an energy that is
        not a number is rejected.

    Raises:
        ValueError: in `init`, for a position whose columns are not orthonormal.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> init, step = geodesic_hmc(lambda x: 2.0 * jnp.trace(x), 0.3, 4)
        >>> state, info = step(jax.random.key(0), init(jnp.eye(3)))
        >>> round(float(jnp.linalg.det(state.position)), 5)
        1.0
    """
    check_number("step_size", step_size, "(0, inf)")
    if not isinstance(num_integration_steps, Tracer):
        num_integration_steps = check_count("num_integration_steps", num_integration_steps)
    value_and_grad = jax.value_and_grad(logdensity_fn)

    def init(position, rng_key=None):
        del rng_key
        _check_orthonormal(position)
        return GeodesicState(position, *value_and_grad(position))

    def leapfrog(_, carry):
        state, velocity = carry
        velocity = _kicked(velocity, state, step_size / 2)
        omega = jax.tree.map(lambda v: step_size * v, velocity)
        position = _turned(jax.scipy.linalg.expm, omega, state.position)
        state = GeodesicState(position, *value_and_grad(position))
        return state, _kicked(velocity, state, step_size / 2)

    def step(rng_key, state):
        key_velocity, key_accept = jax.random.split(rng_key)
        velocity = _random_velocity(key_velocity, state.position)
        start = state, velocity
        proposal, end = jax.lax.fori_loop(0, num_integration_steps, leapfrog, start)
        energy = _kinetic(end) - proposal.logdensity
        gain = _kinetic(velocity) - state.logdensity - energy
        rate = jnp.minimum(1.0, jnp.exp(jnp.where(jnp.isnan(gain), -jnp.inf, gain)))
        is_accepted = jax.random.uniform(key_accept, dtype=rate.dtype) < rate
        new = jax.tree.map(lambda a, b: jnp.where(is_accepted, a, b), proposal, state)
        return new, GeodesicInfo(rate, is_accepted, energy)

    return init, step


def _random_velocity(rng_key, position):
    """Draw skew-symmetric matrices, standard normal above the diagonal, for each leaf."""

    def draw(key, x):
        noise = jax.random.normal(key, (*x.shape[:-1], x.shape[-2]), x.dtype)
        return 2**0.5 * skew(noise)

    keys = jax.random.split(rng_key, len(jax.tree.leaves(position)))
    return jax.tree.map(draw, jax.tree.unflatten(jax.tree.structure(position), keys), position)


def _turned(retraction, omega, position):
    return jax.tree.map(lambda o, x: retraction(o) @ x, omega, position)


def _kicked(velocity, state, time):
    """Add the force, d/dt log density(exp(t V) X) in the coordinates V_ij with i < j."""

    def kicked(v, g, x):
        return v + 2 * time * skew(g @ jnp.swapaxes(x, -1, -2))

    return jax.tree.map(kicked, velocity, state.logdensity_grad, state.position)


def _kinetic(velocity):
    """Return half the sum of squares of the coordinates, each of which is in V twice."""
    return optax.tree.norm(velocity, squared=True) / 4


def _check_orthonormal(position):
    for x in jax.tree.leaves(position):
        if jnp.ndim(x) < 2 or x.shape[-2] < x.shape[-1]:
            raise ValueError(
                f"Positions are matrices with orthonormal columns, got shape {jnp.shape(x)}. A "
                "unit vector is (n, 1); give a wide matrix transposed."
            )
        if isinstance(x, Tracer):
            continue
        with jax.ensure_compile_time_eval():  # a constant is one where the rest is traced
            gram = jnp.swapaxes(x, -1, -2) @ x
            error = float(jnp.max(jnp.abs(gram - jnp.eye(x.shape[-1]))))
        if not error < 1e3 * float(jnp.finfo(x.dtype).eps):
            raise ValueError(
                f"The position's columns are not orthonormal: X^T X is off by {error:.1e}. "
                "Start from jnp.linalg.qr(x)[0]."
            )
