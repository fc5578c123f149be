r"""Evidence for dendrites, in closed form: what to accept, what to prune, what the ELBO will do.

Around weights v of dendrites the log likelihood is, to second order,
:math:`g^T v - v^T M v / 2` with :math:`g = -\sum_p \delta_p d_p` and the Gauss-Newton matrix
:math:`M_{ij} = \sum_p r_{pi} d_{pi}\, r_{pj} d_{pj}`. With a prior :math:`v \sim N(0, \tau^2)` all
that follows is Gaussian algebra: exact for a likelihood that is quadratic in v, such as that of
Gaussian noise and dendrites of the output layer, and Laplace's approximation elsewhere.
"""

import jax
import jax.numpy as jnp

from probbp.checks import check_numbers


def log_evidence_gain(
    gradient: jax.Array, curvature: jax.Array, prior_scale: float | jax.Array
) -> jax.Array:
    r"""Return the log Bayes factor of each dendrite alone against none.

    .. math:: \Delta \log Z_i = \frac{g_i^2}{2 (H_i + \tau^{-2})} - \frac12 \log(1 + H_i \tau^2)

    Dendrites of one network chase the same residual: the sum overstates what they give together,
    which `joint_log_evidence_gain` says. Taken on the rows to which a dendrite was fitted it is too
    good as well.

    Args:
        gradient: g (n,), of the log likelihood with respect to v, at 0.
        curvature: H (n,), the diagonal of M.
        prior_scale: tau.

    Example:
        >>> import jax.numpy as jnp
        >>> gains = log_evidence_gain(jnp.array([10.0, 1.0]), jnp.array([10.0, 10.0]), 1.0)
        >>> [round(float(gain), 2) for gain in gains]
        [3.35, -1.15]
    """
    _check_prior(prior_scale)
    precision = curvature + 1 / jnp.square(prior_scale)
    return gradient**2 / (2 * precision) - jnp.log1p(curvature * jnp.square(prior_scale)) / 2


def joint_log_evidence_gain(
    gradient: jax.Array, curvature: jax.Array, prior_scale: float | jax.Array
) -> jax.Array:
    r"""Return the log Bayes factor of all dendrites together against none.

    .. math:: \frac12 g^T (M + \tau^{-2} I)^{-1} g - \frac12 \log\det(I + \tau^2 M)

    Args:
        gradient: g (n,).
        curvature: M (n, n).
        prior_scale: tau.

    Example:
        >>> import jax.numpy as jnp
        >>> alike = 10 * jnp.ones((2, 2))  # two dendrites that say the same
        >>> round(float(joint_log_evidence_gain(jnp.array([10.0, 10.0]), alike, 1.0)), 2)
        3.24
    """
    _check_prior(prior_scale)
    identity = jnp.eye(len(gradient), dtype=curvature.dtype)
    root = jnp.linalg.cholesky(identity + jnp.square(prior_scale) * curvature)
    white = jax.scipy.linalg.solve_triangular(root, prior_scale * gradient, lower=True)
    return white @ white / 2 - jnp.sum(jnp.log(jnp.diag(root)))


def greedy(
    gradient: jax.Array, curvature: jax.Array, prior_scale: float | jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Accept the best dendrite, then the best given it, and so on, until the evidence would fall.

    Exact: with each acceptance gradient and curvature are conditioned on it (a sweep of one row),
    so that the gains add up to the joint one. n steps of n^2, no factorisation.

    Args:
        gradient: g (n,).
        curvature: M (n, n).
        prior_scale: tau, one number.

    Returns:
        The mask (n,) of the accepted, and the gain (n,) that each brought when it came, 0 for the
        others.

    Example: of two equal dendrites one is enough.
        >>> import jax.numpy as jnp
        >>> mask, gains = greedy(jnp.array([9.0, 9.0, 1.0]), 10 * jnp.array(
        ...     [[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]), 1.0)
        >>> mask.tolist()
        [True, False, False]
    """
    _check_prior(prior_scale)

    def step(carry, _):
        gradient, curvature, mask, gains = carry
        # What is left of the curvature is not negative but for rounding.
        left = jnp.maximum(jnp.diag(curvature), 0)
        alone = log_evidence_gain(gradient, left, prior_scale)
        alone = jnp.where(mask, -jnp.inf, alone)
        best = jnp.argmax(alone)
        is_taken = alone[best] > 0
        row = curvature[best] / (left[best] + 1 / jnp.square(prior_scale))
        gradient = jnp.where(is_taken, gradient - row * gradient[best], gradient)
        curvature = jnp.where(is_taken, curvature - row[:, None] * curvature[best][None], curvature)
        mask = mask.at[best].set(mask[best] | is_taken)
        gains = gains.at[best].add(jnp.where(is_taken, alone[best], 0))
        return (gradient, curvature, mask, gains), None

    none = jnp.zeros(gradient.shape, bool), jnp.zeros_like(gradient)
    carry, _ = jax.lax.scan(step, (gradient, curvature, *none), None, length=len(gradient))
    return carry[2:]


def prune(
    gradient: jax.Array,
    curvature: jax.Array,
    weight: jax.Array,
    prior_scale: float | jax.Array,
) -> jax.Array:
    """Return the mask (n,) of the dendrites that the evidence keeps.

    `greedy`, at the weights that the dendrites have now: there the quadratic has its gradient at
    v = 0, g + M v, and those are kept whose evidence is above that of their absence.

    Args:
        gradient: g (n,), at the present weights; 0 where they are the best.
        curvature: M (n, n), at the present weights.
        weight: v (n,).
        prior_scale: tau.

    Example:
        >>> import jax.numpy as jnp
        >>> curvature = 10 * jnp.eye(2)
        >>> prune(jnp.zeros(2), curvature, jnp.array([1.0, 0.1]), 1.0).tolist()
        [True, False]
    """
    return greedy(gradient + curvature @ weight, curvature, prior_scale)[0]


def laplace(
    gradient: jax.Array, curvature: jax.Array, prior_scale: float | jax.Array
) -> tuple[jax.Array, jax.Array]:
    r"""Return location and scale of each weight's posterior, given that the others are 0.

    .. math:: N\big(g_i / (H_i + \tau^{-2}),\; (H_i + \tau^{-2})^{-1}\big)

    A guide that starts there has gained `log_evidence_gain` of ELBO at once.

    Args:
        gradient: g (n,), of the log likelihood at 0.
        curvature: H (n,), minus its second derivative.
        prior_scale: tau, the prior's standard deviation.

    Example:
        >>> import jax.numpy as jnp
        >>> loc, scale = laplace(jnp.array([10.0]), jnp.array([3.0]), 1.0)
        >>> float(loc[0]), float(scale[0])
        (2.5, 0.5)
    """
    _check_prior(prior_scale)
    precision = curvature + 1 / jnp.square(prior_scale)
    return gradient / precision, jax.lax.rsqrt(precision)


def elbo_change(
    loc: jax.Array,
    scale: jax.Array,
    gradient: jax.Array,
    curvature: jax.Array,
    prior_scale: float | jax.Array,
) -> jax.Array:
    r"""Return what the ELBO changes by when weights with a normal posterior are added, for each.

    .. math:: g m - \frac{H}{2} (m^2 + s^2) - \mathrm{KL}(N(m, s^2) \,\|\, N(0, \tau^2))

    With m = 0 it is the price of a function-preserving start, which is not small: H is large. At
    `laplace` it is `log_evidence_gain`, its largest value.

    Args:
        loc: m (n,).
        scale: s (n,).
        gradient: g (n,), the expectation under the rest of the posterior.
        curvature: H (n,), likewise.
        prior_scale: tau.

    Example:
        >>> import jax.numpy as jnp
        >>> zero, curvature = jnp.zeros(1), jnp.array([3.0])
        >>> change = elbo_change(zero, jnp.array([0.5]), zero, curvature, 1.0)
        >>> round(float(change[0]), 3)
        -0.693
    """
    _check_prior(prior_scale)
    check_numbers("scale", scale, "(0, inf)")
    variance, prior = scale**2, jnp.square(prior_scale)
    divergence = (variance + loc**2) / (2 * prior) - 0.5 - jnp.log(scale) + jnp.log(prior) / 2
    return gradient * loc - curvature * (loc**2 + variance) / 2 - divergence


def _check_prior(prior_scale):
    check_numbers("prior_scale", prior_scale, "(0, inf)")
