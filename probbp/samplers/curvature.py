r"""Slope and curvature of a log density along tangents, in forward mode only.

A `Curvature` maps a log density to `(position, tangents) -> (logdensity, slopes, curvature)`, with
k tangents stacked along the first axis of every leaf, slopes of shape (k,) and a symmetric (k, k)
curvature.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from probbp.types import LogDensity, Tree, ways_out

FLOOR = 1e-3
"""Default floor of the curvature, in units of the inverse mass matrix."""

Curvature = Callable[[LogDensity], Callable[[Tree, Tree], tuple[jax.Array, jax.Array, jax.Array]]]


def magnitude(curvature: jax.Array, floor: float) -> jax.Array:
    """Return a smooth absolute value, at least `floor`; with `floor=0` the absolute value."""
    return jnp.sqrt(curvature**2 + floor**2)


def finite_or_plain(
    slope: jax.Array, second: jax.Array | None
) -> tuple[jax.Array, jax.Array | None, jax.Array]:
    """Return slopes and curvature, no slope and a curvature of one where any of it is no number.

    Given the tangents that is a fixed rule of the position, which a Metropolis test corrects. The
    third output says whether all of it is finite.
    """
    is_finite = jnp.all(jnp.isfinite(slope))
    if second is not None:
        is_finite &= jnp.all(jnp.isfinite(second))
        second = jnp.where(is_finite, second, jnp.eye(len(second), dtype=second.dtype))
    return jnp.where(is_finite, slope, jnp.zeros_like(slope)), second, is_finite


def no_curvature(logdensity_fn: LogDensity) -> Callable:
    """Return value and slopes, and `None` for the curvature: k Jacobian-vector products."""

    def derivatives(position, tangents):
        def pushforward(tangent):
            return jax.jvp(logdensity_fn, (position,), (tangent,))

        logdensity, slope = _over_tangents(pushforward, tangents)
        return logdensity, slope, None

    return derivatives


def hessian(logdensity_fn: LogDensity) -> Callable:
    r"""Return value, slopes and the Hessian on the plane, by nested Jacobian-vector products.

    The entries are :math:`v_i^\top \nabla^2 f(x)\, v_j`, k (k + 1) / 2 nested products.

    Args:
        logdensity_fn: f, a position to a scalar.

    Returns:
        `(position, tangents) -> (logdensity, slopes (k,), curvature (k, k))`.
    """

    def derivatives(position, tangents):
        num = jax.tree.leaves(tangents)[0].shape[0]
        rows, columns = np.triu_indices(num)

        def second(pair):
            v, w = pair
            (logdensity, _), (slope, curvature) = jax.jvp(
                lambda x: jax.jvp(logdensity_fn, (x,), (w,)), (position,), (v,)
            )
            return logdensity, (slope, curvature)

        pairs = [jax.tree.map(lambda leaf, i=i: leaf[i], tangents) for i in (rows, columns)]
        logdensity, (slope, upper) = _over_tangents(second, pairs)
        full = jnp.zeros((num, num), upper.dtype).at[rows, columns].set(upper)
        return logdensity, slope[rows == columns], full + jnp.triu(full, 1).T

    return derivatives


def gauss_newton(
    predict_fn: Callable[[Tree], Tree],
    loglikelihood_fn: Callable[[Tree], jax.Array],
    logprior_fn: LogDensity,
) -> Curvature:
    r"""Return Gauss-Newton curvature for a model that exposes its predictions.

    For :math:`f(x) = \ell(p(x)) + \log\pi_0(x)` with :math:`\ell` concave in the predictions p,

    .. math::
        (J v)^\top \nabla^2 \ell\, (J w) + v^\top \nabla^2 \log\pi_0\, w

    never changes its sign for a log-concave prior, and needs one Jacobian-vector product of
    `predict_fn` a tangent; second derivatives are taken of the two cheap functions only.

    Args:
        predict_fn: position to predictions (any pytree), the expensive part.
        loglikelihood_fn: predictions to the log likelihood, a scalar.
        logprior_fn: position to the log prior, a scalar. The sum of the two must be the sampler's
            log density up to a constant.

    Returns:
        What `pc_fmala` and `pc_line_fmala` take as `curvature`.

    Example:
        >>> import jax, jax.numpy as jnp, probbp
        >>> from probbp.samplers.curvature import gauss_newton
        >>> x, y = jnp.linspace(0, 1, 20), jnp.linspace(0, 2, 20)
        >>> predict = lambda p: jnp.tanh(p[0] * x) * p[1]
        >>> loglikelihood = lambda mean: -0.5 * jnp.sum((y - mean) ** 2)
        >>> logprior = lambda p: -0.5 * jnp.sum(p**2)
        >>> sampler = probbp.pc_line_fmala(
        ...     lambda p: loglikelihood(predict(p)) + logprior(p), step_size=1.28,
        ...     curvature=gauss_newton(predict, loglikelihood, logprior))
    """
    return partial(_gauss_newton, predict_fn, loglikelihood_fn, logprior_fn)


def _gauss_newton(predict_fn, loglikelihood_fn, logprior_fn, logdensity_fn):
    del logdensity_fn
    likelihood = hessian(loglikelihood_fn)
    prior = hessian(logprior_fn)

    def derivatives(position, tangents):
        predictions, directions = _over_tangents(
            lambda tangent: jax.jvp(predict_fn, (position,), (tangent,)), tangents
        )
        terms = zip(likelihood(predictions, directions), prior(position, tangents), strict=True)
        return tuple(a + b for a, b in terms)

    return derivatives


def principal_axes(matrix: jax.Array, num_sweeps: int = 5) -> tuple[jax.Array, jax.Array]:
    """Diagonalise a small symmetric matrix by Jacobi's rotations.

    In JAX's own operations: LAPACK's batched calls wait for each other's threads on XLA's CPU
    backend, and thousands of chains may lock up for good. The axes are orthonormal whatever the
    number of sweeps, so that a sampler is exact with them.

    Args:
        matrix: (k, k), symmetric.
        num_sweeps: rounds over all pairs of axes; one is exact for k = 2.

    Returns:
        The eigenvalues (k,), in no order, and the axes (k, k) as columns; NaN for NaN.
    """
    size = matrix.shape[0]
    pairs = np.stack(np.triu_indices(size, 1), axis=1)
    pairs = np.tile(pairs, (num_sweeps if size > 2 else 1, 1))

    def rotate(carry, pair):
        matrix, axes = carry
        p, q = pair
        # The smaller of the two angles that make the entry (p, q) zero: tan, then cos and sin.
        twice = 2 * matrix[p, q]
        difference = matrix[q, q] - matrix[p, p]
        length = jnp.hypot(twice, difference)
        denominator = jnp.abs(difference) + length
        tan = jnp.where(difference < 0, -twice, twice) / jnp.where(denominator == 0, 1, denominator)
        cos = 1 / jnp.sqrt(1 + tan**2)
        sin = tan * cos
        rotation = jnp.eye(size, dtype=matrix.dtype)
        rotation = rotation.at[p, p].set(cos).at[q, q].set(cos)
        rotation = rotation.at[p, q].set(sin).at[q, p].set(-sin)
        return (rotation.T @ matrix @ rotation, axes @ rotation), None

    carry = matrix, jnp.eye(size, dtype=matrix.dtype)
    (matrix, axes), _ = jax.lax.scan(rotate, carry, pairs, unroll=min(len(pairs), 6))
    return jnp.diag(matrix), axes


def _over_tangents(fun: Callable, tangents: Tree) -> tuple:
    """Map over the tangents a function whose first output is the same for all of them.

    One tangent is not vectorised: in a long scan of small operations that costs half as much again.
    """
    with ways_out():
        if jax.tree.leaves(tangents)[0].shape[0] > 1:
            return jax.vmap(fun, out_axes=(None, 0))(tangents)
        value, derivative = fun(jax.tree.map(lambda leaf: leaf[0], tangents))
    return value, jax.tree.map(lambda leaf: leaf[None], derivative)
