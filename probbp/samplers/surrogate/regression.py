r"""Fit the surrogate to every value of the log density that a warm-up has seen.

A weighted ridge regression of :math:`\ell(z) + |z|^2 / 2` on the monomials of squashed z. Values
are free of noise, so that each point evaluated, a rejected one too, is one exact equation.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from probbp.samplers.surrogate.polynomial import (
    Polynomial,
    from_coefficients,
    largest_degree,
    monomials,
    num_monomials,
    squash,
)

RIDGE = 1e-7
NUM_ANCHORS = 1500
ANCHOR_WEIGHT = 0.05
CHUNK = 1000


class Fit(NamedTuple):
    """A surrogate and how good it is.

    Attributes:
        surrogate: the polynomial.
        degree: the one chosen; coefficients beyond it are zero.
        held_out_std: standard deviation of l - g on points that the choice of coefficients did not
            see. It predicts the acceptance rate of independent proposals, 2 Phi(-std / sqrt 2).
    """

    surrogate: Polynomial
    degree: jax.Array
    held_out_std: jax.Array


def fit(
    rng_key: jax.Array,
    whitened: jax.Array,
    logdensity: jax.Array,
    core: jax.Array,
    degree: int | None = None,
) -> Fit:
    """Fit a polynomial by weighted ridge regression, of the degree that predicts best.

    Degrees compete on a fifth of the points; the winner is fitted to all of them. Where nothing is
    known, beyond the range of the data, anchors pull the remainder to zero.

    In single precision the normal equations bear a ridge of 1e-4 in place of 1e-7, and a log
    density of 1e4 is known to 1e-3 only: the surrogate is coarser, what the sampler leaves
    invariant is the same.

    Cost: with p monomials and n points, n p^2 + p^3 / 3 operations and p^2 numbers of memory.

    Args:
        rng_key: key of the anchors and of the fifth.
        whitened: z of all points, (n, d).
        logdensity: l there, (n,); a point where it is not finite has no weight.
        core: the log density above which points count in full; below, the weight decays.
        degree: the largest to try; by default what d and n allow.
    """
    num_points, dim = whitened.shape
    dtype = whitened.dtype
    if degree is None:
        degree = affordable_degree(dim, num_points)
    weights = point_weights(whitened, logdensity, core)
    target = jnp.where(weights > 0, logdensity + jnp.sum(whitened**2, axis=1) / 2, 0)
    target = jnp.where(weights > 0, target - weighted_mean(target, weights), 0)
    is_core = (weights > 0) & (logdensity > core)
    whitened = jnp.where(weights[:, None] > 0, whitened, 0)
    base_std = weighted_std(target, weights * is_core)
    if degree < 2:
        none = jnp.zeros(num_monomials(dim, 0), dtype)
        return Fit(from_coefficients(none, dim, 0), jnp.zeros((), int), base_std)

    key_fifth, key_anchors = jax.random.split(rng_key)
    is_held_out = jax.random.uniform(key_fifth, (num_points,)) < 0.2
    sums = normal_equations(whitened, target, weights, is_held_out, degree)
    extra = anchors(key_anchors, whitened, weights, NUM_ANCHORS)
    # The factor of the base is wrong by a constant which the fit may choose; anchors know of none.
    anchor_sums = normal_equations(
        extra,
        jnp.zeros(NUM_ANCHORS, dtype),
        jnp.full(NUM_ANCHORS, ANCHOR_WEIGHT, dtype),
        jnp.zeros(NUM_ANCHORS, bool),
        degree,
    )
    seen, held_out = sums
    seen = jax.tree.map(jnp.add, seen, anchor_sums[0])
    everything = jax.tree.map(jnp.add, seen, held_out)

    num_useful = jnp.sum(weights > 0.1)
    tried = [k for k in (2, 3, 4) if k <= degree]
    size = num_monomials(dim, degree)

    def padded(equations, k):
        solution = solve(*equations, dim, k)
        return jnp.zeros(size, dtype).at[: solution.size].set(solution)

    candidates = [padded(seen, k) for k in tried]
    errors = predict(whitened, jnp.stack(candidates, axis=1), degree) - target[:, None]
    stds = jax.vmap(lambda e: weighted_std(e, weights * is_core * is_held_out), 1)(errors)
    is_feasible = jnp.array([num_monomials(dim, k) for k in tried]) < 0.7 * num_useful
    stds = jnp.where(is_feasible & jnp.isfinite(stds), stds, jnp.inf)
    stds = jnp.concatenate([base_std[None], stds])
    # A base without error, a Gaussian target, leaves nothing but rounding to fit.
    stds = stds.at[1:].add(jnp.where(base_std < 1e-6, jnp.inf, 0))
    best = jnp.argmin(stds)
    branches = [lambda: jnp.zeros(size, dtype), *(lambda k=k: padded(everything, k) for k in tried)]
    coefficients = jax.lax.switch(best, branches)
    chosen = jnp.array([0, *tried])[best]
    return Fit(from_coefficients(coefficients, dim, degree), chosen, stds[best])


def affordable_degree(dim: int, num_points: int) -> int:
    """Return the largest degree with fewer coefficients than 0.7 points."""
    for degree in range(largest_degree(dim), 1, -1):
        if num_monomials(dim, degree) < 0.7 * num_points:
            return degree
    return 0


def point_weights(
    whitened: jax.Array, logdensity: jax.Array, core: jax.Array, reach: float = 12.0
) -> jax.Array:
    """Return one above the core, an exponential below, zero where a point says nothing.

    Points with a coordinate beyond `reach` say nothing.
    """
    dim = whitened.shape[1]
    decay = jnp.exp(jnp.minimum(logdensity - core, 0) / max(2.0, 0.5 * dim**0.5))
    is_valid = jnp.isfinite(logdensity) & jnp.all(jnp.abs(whitened) < reach, axis=1)
    return jnp.where(is_valid & (decay > 1e-6), decay, 0)


def anchors(rng_key: jax.Array, whitened: jax.Array, weights: jax.Array, num: int) -> jax.Array:
    """Return points past the range of the data, in one coordinate (two thirds) or radially."""
    key_row, key_axis, key_side, key_far, key_radius = jax.random.split(rng_key, 5)
    dim, dtype = whitened.shape[1], whitened.dtype
    is_core = weights > 0.5
    row = jax.random.categorical(key_row, jnp.where(is_core, 0.0, -jnp.inf), shape=(num,))
    low = jnp.min(jnp.where(is_core[:, None], whitened, jnp.inf), axis=0)
    high = jnp.max(jnp.where(is_core[:, None], whitened, -jnp.inf), axis=0)
    axis = jax.random.randint(key_axis, (num,), 0, dim)
    far = jax.random.uniform(key_far, (num,), dtype, 0.3, 2.0)
    side = jax.random.bernoulli(key_side, shape=(num,))
    beyond = jnp.where(side, high[axis] + far, low[axis] - far)
    moved = whitened[row].at[jnp.arange(num), axis].set(beyond)
    radial = whitened[row] * jax.random.uniform(key_radius, (num, 1), dtype, 1.4, 2.2)
    points = jnp.where((jnp.arange(num) % 3 < 2)[:, None], moved, radial)
    return jnp.where(jnp.isfinite(points), points, 0)


def normal_equations(
    whitened: jax.Array,
    target: jax.Array,
    weights: jax.Array,
    is_held_out: jax.Array,
    degree: int,
    squashed: bool = True,
) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
    """Return (A, b, total weight) of the points seen and of those held out, chunk by chunk."""
    size = num_monomials(whitened.shape[1], degree)
    dtype = whitened.dtype

    def body(carry, chunk):
        z, t, w, held = chunk
        features = monomials(squash(z) if squashed else z, degree)

        def add(sums, w):
            gram, moment, total = sums
            weighted = features * w[:, None]
            return gram + weighted.T @ features, moment + weighted.T @ t, total + jnp.sum(w)

        seen, held_out = carry
        return (add(seen, jnp.where(held, 0, w)), add(held_out, jnp.where(held, w, 0))), None

    zero = jnp.zeros((size, size), dtype), jnp.zeros(size, dtype), jnp.zeros((), dtype)
    chunks = _chunks((whitened, target, weights, is_held_out))
    return jax.lax.scan(body, (zero, zero), chunks)[0]


def predict(whitened: jax.Array, coefficients: jax.Array, degree: int) -> jax.Array:
    """Return the polynomials with these coefficients (p, k) at all points, (n, k)."""
    values = jax.lax.map(lambda z: monomials(squash(z), degree) @ coefficients, _chunks(whitened))
    return values.reshape(-1, coefficients.shape[1])[: len(whitened)]


def solve(gram: jax.Array, moment: jax.Array, total: jax.Array, dim: int, degree: int) -> jax.Array:
    """Solve the ridge regression of a degree; its monomials are the first of the equations'."""
    size = num_monomials(dim, degree)
    gram, moment = gram[:size, :size], moment[:size]
    ridge = [RIDGE] * num_monomials(dim, min(degree, 2))
    for k in range(3, degree + 1):
        ridge += [RIDGE * 10.0 ** (k - 2)] * (num_monomials(dim, k) - len(ridge))
    # Columns of unit length, so that rounding does not drown the small ones.
    scale = jnp.sqrt(jnp.diag(gram) + jnp.finfo(gram.dtype).tiny)
    penalty = jnp.asarray(ridge, gram.dtype) * total / scale**2
    penalty = jnp.maximum(penalty, size * jnp.finfo(gram.dtype).eps)
    scaled = gram / (scale[:, None] * scale) + jnp.diag(penalty)
    factor = jax.scipy.linalg.cho_factor(scaled)
    return jax.scipy.linalg.cho_solve(factor, moment / scale) / scale


def curvature(
    loc: jax.Array,
    factor: jax.Array,
    points: jax.Array,
    logdensity: jax.Array,
    core: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Improve a location and a factor of the covariance by a quadratic regression.

    Exact where the log density is quadratic and there are more points than coefficients. As given
    where the points are too few, or the curvature is not that of a peak.

    Args:
        loc: (d,), to start from.
        factor: (d, d), lower triangular.
        points: (n, d).
        logdensity: f there; a point where it is not finite has no weight.
        core: as in `fit`.
    """
    dim, dtype = loc.size, loc.dtype
    size = num_monomials(dim, 2)
    if len(points) < 1.5 * size:
        return loc, factor
    whitened = jax.scipy.linalg.solve_triangular(factor, (points - loc).T, lower=True).T
    weights = point_weights(whitened, logdensity, core, reach=jnp.inf)
    centered = jnp.where(weights > 0, logdensity, 0)
    centered = centered - weighted_mean(centered, weights)
    whitened = jnp.where(weights[:, None] > 0, whitened, 0)
    nobody = jnp.zeros(len(points), bool)
    equations, _ = normal_equations(whitened, centered, weights, nobody, 2, squashed=False)
    fitted = from_coefficients(solve(*equations, dim, 2), dim, 2)
    precision = -2 * fitted.quadratic
    curvatures, directions = jnp.linalg.eigh(precision)
    covariance = (directions / jnp.maximum(curvatures, 0.05)) @ directions.T
    is_peak = (jnp.sum(weights > 0.1) >= 1.5 * size) & (curvatures[0] > 0.05)
    better = jnp.linalg.cholesky(factor @ covariance @ factor.T)
    is_peak = is_peak & jnp.all(jnp.isfinite(better))
    return (
        jnp.where(is_peak, loc + factor @ (covariance @ fitted.linear), loc).astype(dtype),
        jnp.where(is_peak, better, factor).astype(dtype),
    )


def weighted_mean(values: jax.Array, weights: jax.Array) -> jax.Array:
    """Return the mean; zero where there is no weight."""
    return jnp.sum(values * weights) / jnp.maximum(jnp.sum(weights), 1e-30)


def weighted_std(values: jax.Array, weights: jax.Array) -> jax.Array:
    """Return the standard deviation; zero where there is no weight."""
    centered = values - weighted_mean(values, weights)
    return jnp.sqrt(weighted_mean(centered**2, weights))


def _chunks(tree):
    """Cut the leading axis into pieces of equal length, the last padded with zeros."""

    def cut(leaf):
        missing = -len(leaf) % CHUNK
        padded = jnp.pad(leaf, [(0, missing)] + [(0, 0)] * (leaf.ndim - 1))
        return padded.reshape(-1, CHUNK, *leaf.shape[1:])

    return jax.tree.map(cut, tree)
