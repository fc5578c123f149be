r"""Langevin moves along a random tangent, with noise in all directions: FMALA and PC-FMALA.

Cobb & Jha, 2025, arXiv:2505.18081. The drift is the slope of the log density along one random
tangent, a Jacobian-vector product: no reverse pass, so that memory does not grow with the depth of
the model, and log densities with loops of dynamic length are accepted.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from blackjax.base import SamplingAlgorithm
from blackjax.mcmc.mala import MALAState
from blackjax.util import generate_unit_vector

from probbp.checks import check_choice, check_number, check_rng_key
from probbp.samplers import checks
from probbp.samplers.algorithm import Algorithm, top_level_api
from probbp.samplers.curvature import (
    FLOOR,
    Curvature,
    finite_or_plain,
    hessian,
    magnitude,
    no_curvature,
)
from probbp.samplers.mala import (
    KEY_POLICIES,
    KeyPolicy,
    Local,
    MALAInfo,
    key_of,
    langevin_step,
)
from probbp.samplers.whitening import whitening
from probbp.types import LogDensity, Tree, keyed, ways_out


def init(
    position: Tree,
    logdensity_fn: LogDensity,
    rng_key: jax.Array | None = None,
    *,
    inverse_mass_matrix: Any = None,
) -> MALAState:
    """Return the state at a position, with the estimate along a first random tangent.

    Without a key the tangent is hashed from the bits of the position. One Jacobian-vector product.

    Raises:
        TypeError: for integer positions, and a log density that is no scalar.
        ValueError: for a log density that is not finite at the position.
    """
    if rng_key is not None:
        check_rng_key("rng_key", rng_key)
    checks.check_position(position)
    position = jax.tree.map(jnp.asarray, position)
    rng_key = key_of(position) if rng_key is None else rng_key
    white = whitening(inverse_mass_matrix, position)
    tangent = generate_unit_vector(rng_key, position)
    fun = keyed(checks.scalar(logdensity_fn), op_key(rng_key))
    with ways_out():
        logdensity, slope = jax.jvp(fun, (position,), (white.unwhiten(tangent),))
    checks.check_start(logdensity)
    checks.check_key(logdensity_fn, position)
    return MALAState(position, logdensity, white.push(_scale(slope, tangent)))


def build_kernel(curvature: Curvature, key_policy: KeyPolicy) -> Callable:
    r"""Build the kernel of `fmala`, or of `pc_fmala`.

    With a unit tangent v, a the slope and eta the curvature along it (eta = 1 for `fmala`), and
    gamma the `drift_scale`,

    .. math::
        y = x + h \gamma\, (a/\eta)\, v + \sqrt{2 h / \eta}\, z,

    and the reverse move takes slope and curvature at y along the same tangent (`"shared"`), a fresh
    one (`"refreshed"`, as published), or one that then stays in the state (`"carried"`).
    """

    def kernel(
        rng_key: jax.Array,
        state: MALAState,
        logdensity_fn: LogDensity,
        step_size: float,
        inverse_mass_matrix: Any = None,
        *,
        key_policy: KeyPolicy = key_policy,
        drift_scale: float = 1.0,
        curvature: Curvature = curvature,
        floor: float = FLOOR,
    ) -> tuple[MALAState, MALAInfo]:
        check_policy(key_policy, curvature)
        white = whitening(inverse_mass_matrix, state.position)

        def local_fn(key, position):
            derivatives = curvature(keyed(logdensity_fn, op_key(key)))
            tangent = generate_unit_vector(key, position)
            direction = jax.tree.map(lambda leaf: leaf[None], white.unwhiten(tangent))
            logdensity, slope, second = derivatives(position, direction)
            slope, second, is_finite = finite_or_plain(slope, second)
            slope = jnp.where(is_finite, slope, jnp.nan)  # told, and taken for zero, by the step
            precision = 1.0 if second is None else magnitude(second[0, 0], floor)
            grad = _scale(slope[0], tangent)
            return Local(logdensity, grad, precision * jnp.ones_like(logdensity))

        return langevin_step(rng_key, state, local_fn, step_size, white, key_policy, drift_scale)

    return kernel


def _scale(slope, tangent):
    # Each leaf in its own dtype, that of the position.
    return jax.tree.map(lambda v: (slope * v).astype(v.dtype), tangent)


def op_key(rng_key: jax.Array) -> jax.Array:
    """Return the key of random operations in the log density: bound to the tangent's, not equal."""
    return jax.random.fold_in(rng_key, 0)


def check_policy(key_policy: str, curvature: Curvature) -> None:
    """Require a known policy; what is carried is a slope, and no curvature with it."""
    choices = ("refreshed", "shared") if curvature is not no_curvature else KEY_POLICIES
    check_choice("key_policy", key_policy, choices)


def as_top_level_api(
    logdensity_fn: LogDensity,
    step_size: float,
    inverse_mass_matrix: Any = None,
    *,
    key_policy: KeyPolicy = "carried",
    drift_scale: float = 1.0,
) -> SamplingAlgorithm:
    """FMALA: MALA whose drift is the slope along one random unit tangent.

    Exact: the invariant distribution. Estimated: the drift, one direction of d at a time, so that
    it mixes like a random walk when d is large (best acceptance 0.234; MALA's is 0.574). One
    Jacobian-vector product a step carried, two otherwise; noise in all directions.

    Args:
        logdensity_fn: log density up to a constant; a position to a scalar.
        step_size: BlackJAX's h. The paper's epsilon is sqrt(2 h).
        inverse_mass_matrix: `None` for the identity, or (d,), (d, d) or low rank, as in BlackJAX.
            The tangent is uniform on the sphere of its coordinates.
        key_policy: where the tangents of a move come from: `"carried"` keeps the current point's,
            with its slope, until a move is accepted (one JVP a step); `"refreshed"` draws both in
            each step, as published; `"shared"` uses one for both ends.
        drift_scale: gamma. 1 as published; d makes the drift unbiased for the gradient, which
            mixes far worse.

    Returns:
        A `blackjax.SamplingAlgorithm`.

    Raises:
        ValueError: for a step size that is not positive and finite, or an unknown policy.

    Example:
        >>> import jax, jax.numpy as jnp, probbp
        >>> fmala = probbp.fmala(lambda x: -0.5 * jnp.sum(x**2), step_size=0.5)
        >>> state = fmala.init(jnp.zeros(2), jax.random.key(1))
        >>> state, info = jax.jit(fmala.step)(jax.random.key(0), state)

    Reference:
        Cobb & Jha, 2025, arXiv:2505.18081 (FMALA; the carried and shared policies are ours).
    """
    check_policy(key_policy, no_curvature)
    check_number("drift_scale", drift_scale, "(-inf, inf)")
    return top_level_api(
        build_fmala_kernel,
        init,
        logdensity_fn,
        step_size,
        inverse_mass_matrix,
        key_policy=key_policy,
        drift_scale=drift_scale,
    )


def pc_as_top_level_api(
    logdensity_fn: LogDensity,
    step_size: float,
    inverse_mass_matrix: Any = None,
    *,
    key_policy: KeyPolicy = "shared",
    drift_scale: float = 1.0,
    curvature: Curvature = hessian,
    floor: float = FLOOR,
) -> SamplingAlgorithm:
    """PC-FMALA: FMALA whose step follows the curvature along the tangent.

    Exact: the invariant distribution. Estimated: drift, and an isotropic scale that varies with the
    position. Two nested Jacobian-vector products a step.

    With a fresh tangent at the far end, as published, the scales of the two ends do not agree even
    as the step goes to zero, and the acceptance rate has a ceiling below one. The shared tangent
    has none, hence the default.

    Args:
        logdensity_fn: log density up to a constant; a position to a scalar.
        step_size: BlackJAX's h, in units of the inverse curvature. The paper's epsilon is
            sqrt(2 h) with its D = 1; its D = d is `drift_scale=d` with epsilon sqrt(2 h d).
        inverse_mass_matrix: as in `fmala`.
        key_policy: `"shared"` or `"refreshed"` (as published).
        drift_scale: gamma, as in `fmala`.
        curvature: `hessian`, or `gauss_newton(...)` for models that expose their predictions.
        floor: the curvature is sqrt(c^2 + floor^2), in units of the inverse mass matrix; 0 as
            published, where an inflection of the density sends the chain arbitrarily far.

    Returns:
        A `blackjax.SamplingAlgorithm`.

    Raises:
        ValueError: for a step size that is not positive and finite, or an unknown policy.

    Example:
        >>> import jax, jax.numpy as jnp, probbp
        >>> pc_fmala = probbp.pc_fmala(lambda x: -0.5 * jnp.sum(x**2), step_size=0.5)
        >>> state = pc_fmala.init(jnp.zeros(2))
        >>> state, info = jax.jit(pc_fmala.step)(jax.random.key(0), state)

    Reference:
        Cobb & Jha, 2025, arXiv:2505.18081 (PC-FMALA; shared tangent and floor are ours).
    """
    check_policy(key_policy, curvature)
    check_number("drift_scale", drift_scale, "(-inf, inf)")
    check_number("floor", floor, "[0, inf)", "0 takes the curvature as it is.")
    return top_level_api(
        build_pc_fmala_kernel,
        init,
        logdensity_fn,
        step_size,
        inverse_mass_matrix,
        key_policy=key_policy,
        drift_scale=drift_scale,
        curvature=curvature,
        floor=floor,
    )


def target_acceptance_rate(**options) -> float:
    """Return the acceptance rate to tune `fmala` for, that of a random walk."""
    del options
    return 0.234


def pc_target_acceptance_rate(key_policy: KeyPolicy = "shared", **options) -> float:
    """Return the acceptance rate to tune `pc_fmala` for.

    Best on Gaussians: 0.25 in many dimensions, 0.47 in two (`tests/benchmarks/scaling.py`).

    Raises:
        ValueError: for fresh tangents, whose ceiling may lie below any rate that is asked for.
    """
    del options
    if key_policy == "refreshed":
        raise ValueError(
            "pc_fmala with key_policy='refreshed' has no acceptance rate to tune for: it has a "
            "ceiling that depends on the density, below which a step size would shrink to zero. "
            "Use key_policy='shared', or pass target_acceptance_rate."
        )
    return 0.3


build_fmala_kernel = partial(build_kernel, no_curvature, "carried")
build_pc_fmala_kernel = partial(build_kernel, hessian, "shared")

fmala = Algorithm(as_top_level_api, init, build_fmala_kernel, target_acceptance_rate)
pc_fmala = Algorithm(pc_as_top_level_api, init, build_pc_fmala_kernel, pc_target_acceptance_rate)
