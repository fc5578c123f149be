r"""Fit the surrogate to every value of the log density that a warm-up has seen.

A weighted ridge regression of :math:`\ell(z) + |z|^2 / 2` on the monomials of squashed z. Values
are free of noise, so that each point evaluated, a rejected one too, is one exact equation.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from probbp.samplers.surrogate import ridges
from probbp.samplers.surrogate.polynomial import (
    Polynomial,
    from_coefficients,
    largest_degree,
    monomials,
    num_monomials,
    squash,
)
from probbp.samplers.surrogate.ridges import Ridges

RIDGE = 1e-7
NUM_ANCHORS = 1500
ANCHOR_WEIGHT = 0.05
CHUNK = 500
"""Points whose monomials are held at once."""

MIN_CURVATURE = 1e-4
"""Of a peak, relative to that of the location and factor which a regression starts from."""

FOLDS = 5
"""One in so many is held out."""

MAX_RIDGE_POINTS = 5000
"""Points that ridges are fitted to, the latest."""


class Fit(NamedTuple):
    """A surrogate and how good it is.

    Attributes:
        surrogate: the polynomial, or the ridges.
        degree: of the polynomial, the one chosen; coefficients beyond it are zero.
        held_out_std: standard deviation of l - g on points that the choice of coefficients did not
            see. It predicts the acceptance rate of independent proposals, 2 Phi(-std / sqrt 2).
    """

    surrogate: Polynomial | Ridges
    degree: jax.Array
    held_out_std: jax.Array


class Equations(NamedTuple):
    """Normal equations A c = b of a weighted regression.

    Attributes:
        gram: A, (p, p).
        moment: b, (p,).
        total: sum of the weights.
    """

    gram: jax.Array
    moment: jax.Array
    total: jax.Array


def fit(
    rng_key: jax.Array,
    whitened: jax.Array,
    logdensity: jax.Array,
    core: jax.Array,
    degree: int | None = None,
    anchor_weight: float = ANCHOR_WEIGHT,
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
        anchor_weight: of each anchor; without anchors a polynomial is recovered exactly.
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

    key_order, key_anchors = jax.random.split(rng_key)
    order = jax.random.permutation(key_order, num_points)
    whitened, target, weights, is_core = (
        leaf[order] for leaf in (whitened, target, weights, is_core)
    )
    zeros = jnp.zeros(NUM_ANCHORS, dtype)
    beyond = anchors(key_anchors, whitened, weights, NUM_ANCHORS), zeros, zeros + anchor_weight
    seen, everything = normal_equations((whitened, target, weights), degree, beyond)

    penalties = jnp.stack([ridge(dim, k, degree) for k in range(2, degree + 1)])
    candidates = jax.lax.map(lambda penalty: solve(seen, penalty), penalties)
    errors = predict(whitened, candidates.T, degree) - target[:, None]
    unseen = weights * is_core * is_held_out(num_points)
    stds = jax.vmap(lambda e: weighted_std(e, unseen), 1)(errors)
    num_useful = jnp.sum(weights > 0.1)
    is_feasible = jnp.sum(jnp.isfinite(penalties), axis=1) < 0.7 * num_useful
    # A base without error, of a Gaussian target, leaves nothing but rounding to fit.
    is_feasible = is_feasible & jnp.isfinite(stds) & (base_std > 1e-6)
    stds = jnp.where(is_feasible, stds, jnp.inf)
    best = jnp.argmin(stds)
    is_better = stds[best] < base_std
    coefficients = jnp.where(is_better, solve(everything, penalties[best]), 0)
    return Fit(
        from_coefficients(coefficients, dim, degree),
        jnp.where(is_better, 2 + best, 0),
        jnp.minimum(stds[best], base_std),
    )


def fit_ridges(
    rng_key: jax.Array,
    whitened: jax.Array,
    logdensity: jax.Array,
    slopes: jax.Array,
    core: jax.Array,
) -> Fit:
    """Fit ridges to values and gradients, to nine tenths of the points.

    Where they predict the rest no better than the Gaussian does, there are none.

    Args:
        rng_key: key of the tenth and of the ridges.
        whitened: z of all points, (n, d); the last ones are used, see `MAX_RIDGE_POINTS`.
        logdensity: l there, (n,); a point where it is not finite has no weight.
        slopes: gradient of l with respect to z, (n, d).
        core: as in `fit`.
    """
    whitened, logdensity, slopes = (
        leaf[-MAX_RIDGE_POINTS:] for leaf in (whitened, logdensity, slopes)
    )
    weights = point_weights(whitened, logdensity, core)
    weights = jnp.where(jnp.all(jnp.isfinite(slopes), axis=1), weights, 0)
    is_core = (weights > 0) & (logdensity > core)
    remainder = jnp.where(weights > 0, logdensity + jnp.sum(whitened**2, axis=1) / 2, 0)
    remainder = jnp.where(weights > 0, remainder - weighted_mean(remainder, weights), 0)
    key_unseen, key_fit = jax.random.split(rng_key)
    is_unseen = jax.random.bernoulli(key_unseen, 0.1, weights.shape)
    seen = jnp.where(is_unseen, 0, weights)
    fitted = ridges.fit(key_fit, whitened, remainder, slopes + whitened, seen)
    unseen = weights * is_core * is_unseen
    values, _ = fitted.value_and_grad(jnp.where(weights[:, None] > 0, whitened, 0))
    std, base_std = (weighted_std(error, unseen) for error in (values - remainder, remainder))
    is_better = std < base_std
    fitted = jax.tree.map(lambda leaf: jnp.where(is_better, leaf, 0), fitted)
    return Fit(fitted, jnp.zeros((), int), jnp.where(is_better, std, base_std))


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
    key_row, key_move = jax.random.split(rng_key)
    dim, dtype = whitened.shape[1], whitened.dtype
    is_core = weights > 0.5
    row = jax.random.categorical(key_row, jnp.where(is_core, 0.0, -jnp.inf), shape=(num,))
    low = jnp.min(jnp.where(is_core[:, None], whitened, jnp.inf), axis=0)
    high = jnp.max(jnp.where(is_core[:, None], whitened, -jnp.inf), axis=0)
    # Uniform numbers, drawn at once: each call of a generator is long to compile.
    axis, far, side, radius = jax.random.uniform(key_move, (4, num), dtype)
    axis, far = (dim * axis).astype(int), 0.3 + 1.7 * far
    beyond = jnp.where(side < 0.5, high[axis] + far, low[axis] - far)
    moved = whitened[row].at[jnp.arange(num), axis].set(beyond)
    radial = whitened[row] * (1.4 + 0.8 * radius)[:, None]
    points = jnp.where((jnp.arange(num) % 3 < 2)[:, None], moved, radial)
    return jnp.where(jnp.isfinite(points), points, 0)


def normal_equations(
    points: tuple[jax.Array, jax.Array, jax.Array],
    degree: int,
    always: tuple[jax.Array, jax.Array, jax.Array] | None = None,
    squashed: bool = True,
) -> tuple[Equations, Equations]:
    """Return the equations of the points that are seen, and of all points.

    A fifth of the chunks is held out, `is_held_out`; the order of the points decides which.

    Args:
        points: their coordinates (n, d), targets (n,) and weights (n,).
        degree: of the monomials.
        always: further points, of which none is held out.
        squashed: whether the monomials are those of squashed coordinates.
    """
    coordinates = points[0]
    size, dtype = num_monomials(coordinates.shape[1], degree), coordinates.dtype
    chunks = _chunks(points)
    is_unseen = jnp.arange(len(chunks[1])) % FOLDS == 0
    if always is not None:
        more = _chunks(always)
        chunks = jax.tree.map(lambda *parts: jnp.concatenate(parts), chunks, more)
        is_unseen = jnp.concatenate([is_unseen, jnp.zeros(len(more[1]), bool)])

    def body(sums, inputs):
        group, (z, t, w) = inputs
        features = monomials(squash(z) if squashed else z, degree)
        weighted = features * w[:, None]
        new = Equations(weighted.T @ features, weighted.T @ t, jnp.sum(w))
        return jax.tree.map(lambda sums, n: sums.at[group].add(n), sums, new), None

    zero = Equations(
        jnp.zeros((2, size, size), dtype), jnp.zeros((2, size), dtype), jnp.zeros(2, dtype)
    )
    sums, _ = jax.lax.scan(body, zero, (is_unseen.astype(int), chunks))
    return jax.tree.map(lambda leaf: leaf[0], sums), jax.tree.map(lambda leaf: leaf.sum(0), sums)


def is_held_out(num_points: int) -> jax.Array:
    """Say which points `normal_equations` holds out."""
    return jnp.arange(num_points) // CHUNK % FOLDS == 0


def predict(whitened: jax.Array, coefficients: jax.Array, degree: int) -> jax.Array:
    """Return the polynomials with these coefficients (p, k) at all points, (n, k)."""
    values = jax.lax.map(lambda z: monomials(squash(z), degree) @ coefficients, _chunks(whitened))
    return values.reshape(-1, coefficients.shape[1])[: len(whitened)]


def ridge(dim: int, degree: int, largest: int) -> jax.Array:
    """Return the penalty of each monomial up to the largest degree; infinite beyond `degree`."""
    penalty = np.full(num_monomials(dim, largest), np.inf)
    for k in range(degree, -1, -1):
        penalty[: num_monomials(dim, k)] = RIDGE * 10.0 ** max(0, k - 2)
    return jnp.asarray(penalty)


def solve(equations: Equations, penalty: jax.Array) -> jax.Array:
    """Solve the ridge regression; a monomial whose penalty is infinite takes no part."""
    gram, moment, total = equations
    is_used = jnp.isfinite(penalty)
    # Columns of unit length, so that rounding does not drown the small ones.
    scale = jnp.sqrt(jnp.diag(gram) + float(jnp.finfo(gram.dtype).tiny))
    penalty = jnp.where(is_used, penalty * total / scale**2, 1)
    floor = len(gram) * float(jnp.finfo(gram.dtype).eps)
    penalty = jnp.maximum(penalty, floor).astype(gram.dtype)
    is_joint = is_used[:, None] & is_used
    scaled = jnp.where(is_joint, gram / (scale[:, None] * scale), 0) + jnp.diag(penalty)
    factor = jax.scipy.linalg.cho_factor(scaled)
    return jax.scipy.linalg.cho_solve(factor, jnp.where(is_used, moment / scale, 0)) / scale


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
    _, equations = normal_equations((whitened, centered, weights), 2, squashed=False)
    fitted = from_coefficients(solve(equations, ridge(dim, 2, 2)), dim, 2)
    _, slope, quadratic = fitted.tensors
    precision = -2 * quadratic
    curvatures, directions = jnp.linalg.eigh(precision)
    covariance = (directions / jnp.maximum(curvatures, MIN_CURVATURE)) @ directions.T
    is_peak = (jnp.sum(weights > 0.1) >= 1.5 * size) & (curvatures[0] > MIN_CURVATURE)
    better = jnp.linalg.cholesky(factor @ covariance @ factor.T)
    is_peak = is_peak & jnp.all(jnp.isfinite(better))
    return (
        jnp.where(is_peak, loc + factor @ (covariance @ slope), loc).astype(dtype),
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
