r"""Langevin moves on a random line or plane: Line-FMALA and PC-Line-FMALA.

Cobb & Jha, 2025, arXiv:2505.18081, for the line; the plane of several tangents is ours. The chain
stays on the line for the step, so that slope and curvature along it are all that a move needs:
forward mode only, and an acceptance rate that does not fall with the dimension.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from blackjax.base import SamplingAlgorithm
from blackjax.mcmc.mala import MALAState
from blackjax.util import generate_unit_vector
from jax.flatten_util import ravel_pytree

from probbp.checks import check_count, check_number
from probbp.samplers.algorithm import Algorithm, top_level_api
from probbp.samplers.curvature import (
    FLOOR,
    Curvature,
    finite_or_plain,
    hessian,
    magnitude,
    no_curvature,
    principal_axes,
)
from probbp.samplers.fmala import init, op_key
from probbp.samplers.mala import MALAInfo, accept_or_reject
from probbp.samplers.whitening import whitening
from probbp.types import LogDensity, Tree, keyed


def build_kernel(curvature: Curvature) -> Callable:
    r"""Build the kernel of `line_fmala`, or of `pc_line_fmala`.

    With k orthonormal tangents V, the slopes :math:`a = V^\top \nabla f` and the metric M (the
    identity, or the absolute value of the curvature :math:`V^\top \nabla^2 f\, V`),

    .. math::
        s = h M^{-1} a + \sqrt{2h}\, M^{-1/2} z, \quad z \in R^k, \qquad y = x + V s,

    and the reverse move is judged on the same plane, a k-dimensional density in s.
    """

    def kernel(
        rng_key: jax.Array,
        state: MALAState,
        logdensity_fn: LogDensity,
        step_size: float,
        inverse_mass_matrix: Any = None,
        *,
        num_tangents: int = 1,
        num_inner_steps: int = 1,
        curvature: Curvature = curvature,
        floor: float = FLOOR,
    ) -> tuple[MALAState, MALAInfo]:
        key_plane, key_steps = jax.random.split(rng_key)
        white = whitening(inverse_mass_matrix, state.position)
        tangents = orthonormal_tangents(key_plane, state.position, num_tangents)
        directions = jax.vmap(white.unwhiten)(tangents)
        # One key for the whole move: both ends must see the same field.
        derivatives = curvature(keyed(logdensity_fn, op_key(key_plane)))

        def local_fn(position):
            logdensity, slope, second = derivatives(position, directions)
            slope, second, is_finite = finite_or_plain(slope, second)
            if second is None:
                point = PlanePoint(position, logdensity, slope, jnp.ones_like(slope), None)
            elif num_tangents == 1:  # spares an eigendecomposition
                point = PlanePoint(position, logdensity, slope, magnitude(second[0], floor), None)
            else:
                eigenvalues, axes = principal_axes(second)
                point = PlanePoint(position, logdensity, slope, magnitude(eigenvalues, floor), axes)
            return point, is_finite

        def inner_step(here, key):
            key_noise, key_accept = jax.random.split(key)
            noise = jax.random.normal(key_noise, (num_tangents,), here.slope.dtype)
            drift, precision = here.principal_drift(), here.precision
            move = here.from_principal(
                step_size / precision * drift + jnp.sqrt(2 * step_size / precision) * noise
            ).astype(noise.dtype)
            position = jax.tree.map(
                lambda x, v: x + jnp.tensordot(move, v, axes=1).astype(x.dtype),
                here.position,
                directions,
            )
            there, is_finite = local_fn(position)
            residual = (
                there.to_principal(move) + step_size / there.precision * there.principal_drift()
            )
            log_ratio = (
                there.logdensity
                - here.logdensity
                - jnp.sum(there.precision * residual**2) / (4 * step_size)
                + jnp.sum(noise**2) / 2
                + jnp.sum(jnp.log(there.precision) - jnp.log(precision)) / 2
            )
            return accept_or_reject(key_accept, log_ratio, here, there, is_finite)

        here, _ = local_fn(state.position)
        if num_inner_steps == 1:
            here, info = inner_step(here, key_steps)
        else:
            here, infos = jax.lax.scan(
                inner_step, here, jax.random.split(key_steps, num_inner_steps)
            )
            info = MALAInfo(
                jnp.mean(infos.acceptance_rate),
                jnp.any(infos.is_accepted),
                jnp.any(infos.is_divergent),
            )
        estimate = jax.tree.map(
            lambda v: jnp.tensordot(here.slope.astype(v.dtype), v, axes=1), tangents
        )
        return MALAState(here.position, here.logdensity, white.push(estimate)), info

    return kernel


def as_top_level_api(
    logdensity_fn: LogDensity,
    step_size: float,
    inverse_mass_matrix: Any = None,
    *,
    num_tangents: int = 1,
    num_inner_steps: int = 1,
) -> SamplingAlgorithm:
    """Line-FMALA: MALA along one random line, or on the random plane of several tangents.

    Exact: the invariant distribution. Estimated: nothing on the line itself; each step moves in one
    direction (or `num_tangents`) of d. With as many tangents as parameters it is MALA. Two
    Jacobian-vector products a step and tangent; `1 + 1/m` an inner step when a line is held for m.

    Args:
        logdensity_fn: log density up to a constant; a position to a scalar.
        step_size: BlackJAX's h, the same on every line. The paper's epsilon is sqrt(2 h).
        inverse_mass_matrix: `None` for the identity, or (d,), (d, d) or low rank, as in BlackJAX.
            Tangents are orthonormal in its coordinates.
        num_tangents: k, the dimension of the plane. Best acceptance 0.70, 0.62, 0.56, 0.54 for
            k = 1, 2, 4, 8.
        num_inner_steps: moves on the same plane before the next is drawn; the step reports the mean
            of their acceptance rates.

    Returns:
        A `blackjax.SamplingAlgorithm`.

    Raises:
        ValueError: for a step size that is not positive and finite, or more tangents than
            parameters.

    Example:
        >>> import jax, jax.numpy as jnp, probbp
        >>> line = probbp.line_fmala(lambda x: -0.5 * jnp.sum(x**2), step_size=1.28)
        >>> state = line.init(jnp.zeros(5))
        >>> state, info = jax.jit(line.step)(jax.random.key(0), state)

    Reference:
        Cobb & Jha, 2025, arXiv:2505.18081 (Line-FMALA; the plane and the held line are ours).
    """
    check_count("num_tangents", num_tangents)
    check_count("num_inner_steps", num_inner_steps)
    return top_level_api(
        build_line_kernel,
        init,
        logdensity_fn,
        step_size,
        inverse_mass_matrix,
        num_tangents=num_tangents,
        num_inner_steps=num_inner_steps,
    )


def pc_as_top_level_api(
    logdensity_fn: LogDensity,
    step_size: float,
    inverse_mass_matrix: Any = None,
    *,
    num_tangents: int = 1,
    num_inner_steps: int = 1,
    curvature: Curvature = hessian,
    floor: float = FLOOR,
) -> SamplingAlgorithm:
    """PC-Line-FMALA: Line-FMALA in units of the curvature along each line.

    Exact: the invariant distribution. On any Gaussian, in any dimension, with `floor=0` and one
    tangent its acceptance rate is 1 - (2 / pi) arctan((epsilon / 2)^3), so that h = 1.28 (0.70)
    needs no tuning. Two nested Jacobian-vector products a step for one tangent, k (k + 1) for k.

    Args:
        logdensity_fn: log density up to a constant; a position to a scalar.
        step_size: BlackJAX's h, in units of the inverse curvature. The paper's epsilon is
            sqrt(2 h); best near h = 1.28.
        inverse_mass_matrix: as in `line_fmala`.
        num_tangents: k, the dimension of the plane; for k > 1 the metric is the absolute value of
            the Hessian on the plane.
        num_inner_steps: as in `line_fmala`.
        curvature: `hessian`, or `gauss_newton(...)` for models that expose their predictions.
        floor: the curvature is sqrt(c^2 + floor^2), in units of the inverse mass matrix; 0 as
            published, where an inflection of the density sends the chain arbitrarily far.

    Returns:
        A `blackjax.SamplingAlgorithm`.

    Raises:
        ValueError: for a step size that is not positive and finite, or more tangents than
            parameters.

    Example:
        >>> import jax, jax.numpy as jnp, probbp
        >>> pc_line = probbp.pc_line_fmala(lambda x: -0.5 * jnp.sum(x**2), step_size=1.28)
        >>> state = pc_line.init(jnp.zeros(5))
        >>> state, info = jax.jit(pc_line.step)(jax.random.key(0), state)

    Reference:
        Cobb & Jha, 2025, arXiv:2505.18081 (PC-Line-FMALA; plane, floor and held line are ours).
    """
    check_count("num_tangents", num_tangents)
    check_count("num_inner_steps", num_inner_steps)
    check_number("floor", floor, "[0, inf)", "0 takes the curvature as it is.")
    return top_level_api(
        build_pc_line_kernel,
        init,
        logdensity_fn,
        step_size,
        inverse_mass_matrix,
        num_tangents=num_tangents,
        num_inner_steps=num_inner_steps,
        curvature=curvature,
        floor=floor,
    )


def target_acceptance_rate(num_tangents: int = 1, **options) -> float:
    """Return the acceptance rate at the largest jump distance on a plane of k directions.

    Measured on Gaussians by `tests/benchmarks/scaling.py`; MALA's 0.574 as k grows.
    """
    del options
    best = {1: 0.70, 2: 0.62, 4: 0.56}
    return best[max(k for k in best if k <= num_tangents)] if num_tangents < 8 else 0.55


build_line_kernel = partial(build_kernel, no_curvature)
build_pc_line_kernel = partial(build_kernel, hessian)

line_fmala = Algorithm(as_top_level_api, init, build_line_kernel, target_acceptance_rate)
pc_line_fmala = Algorithm(pc_as_top_level_api, init, build_pc_line_kernel, target_acceptance_rate)


class PlanePoint(NamedTuple):
    """What a plane move knows of a point.

    Attributes:
        position: the point, a pytree.
        logdensity: the exact log density.
        slope: (k,), derivatives along the tangents.
        precision: (k,), eigenvalues of the metric on the plane.
        axes: (k, k), its eigenvectors as columns; `None` where it is diagonal.
    """

    position: Tree
    logdensity: jax.Array
    slope: jax.Array
    precision: jax.Array
    axes: jax.Array | None

    def to_principal(self, vector: jax.Array) -> jax.Array:
        """Turn plane coordinates into those of the metric's axes."""
        return vector if self.axes is None else self.axes.T @ vector

    def from_principal(self, vector: jax.Array) -> jax.Array:
        """Turn coordinates of the metric's axes into plane coordinates."""
        return vector if self.axes is None else self.axes @ vector

    def principal_drift(self) -> jax.Array:
        """Return the slopes along the metric's axes."""
        return self.to_principal(self.slope)


def orthonormal_tangents(rng_key: jax.Array, position: Tree, num_tangents: int) -> Tree:
    """Draw a uniformly random orthonormal k-frame, stacked along a first axis of every leaf."""
    flat, unravel = ravel_pytree(position)
    if not 1 <= num_tangents <= flat.size:
        raise ValueError(
            f"num_tangents={num_tangents} does not fit a position of {flat.size} parameters: "
            f"choose 1 to {flat.size}."
        )
    if num_tangents == 1:
        tangent = generate_unit_vector(rng_key, position)
        return jax.tree.map(lambda leaf: leaf[None], tangent)
    dtype = jnp.promote_types(flat.dtype, jnp.float32)  # LAPACK knows no half precision
    frame, _ = jnp.linalg.qr(jax.random.normal(rng_key, (flat.size, num_tangents), dtype))
    return jax.vmap(unravel, in_axes=1)(frame.astype(flat.dtype))
