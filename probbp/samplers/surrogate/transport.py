r"""A transport map between a standard Gaussian and draws of a posterior, closed form both ways.

In coordinates whose location and scale are the draws',

.. math::
    y = \mu + L z, \qquad w_i = \xi_i + \lambda_i \sinh((\operatorname{arsinh} y_i +
    \varepsilon_i) / \delta_i), \qquad
    x_i = w_i \;\text{(drivers)}, \quad
    x_i = m_i(u) + e^{c_i \cdot u} w_i \;\text{(the others)},

where u are the whitened drivers, a few coordinates on which the means (quadratically) and the log
scales (linearly) of the others depend. L does not mix drivers with the others. A funnel, a centered
hierarchy and a banana become Gaussian: a non-centered parameterization found from draws. With no
driver it is an affine map with sinh-arcsinh marginals.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.linalg import solve_triangular

from probbp.samplers.surrogate.least_squares import least_squares

MAX_DRIVERS = 6
INFLATION = 1.1
"""The Gaussian is a little wider than the draws: too wide costs less than too narrow."""

FOLDS = 5
"""Of the values that refine a map, one in so many is held out."""

CLOSE = 0.25
"""Standard deviation of the log density beyond a map's Gaussian where the map is good."""


class Transport(NamedTuple):
    """The parameters of a map; d coordinates, k slots for drivers, q = (k + 1) (k + 2) / 2.

    Attributes:
        loc, scale: (d,), of the draws.
        shift: (d,), mu.
        factor: (d, d), L, lower triangular, without entries between drivers and the others.
        inverse_factor: its inverse.
        marginals: (4, d), xi, lambda, epsilon, delta.
        drivers: (k,) integers, the coordinate in each slot.
        is_used: (k,) booleans, whether the slot is.
        mean: (q, d), coefficients of 1, u and the products of u.
        log_scale: (k, d).
    """

    loc: jax.Array
    scale: jax.Array
    shift: jax.Array
    factor: jax.Array
    inverse_factor: jax.Array
    marginals: jax.Array
    drivers: jax.Array
    is_used: jax.Array
    mean: jax.Array
    log_scale: jax.Array


def forward(transport: Transport | None, whitened: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Map a whitened point z to x; `None` is the identity.

    Returns:
        x (d,), and log |det dx / dz|.
    """
    if transport is None:
        return whitened, jnp.zeros((), whitened.dtype)
    t = transport
    w, log_slope = _sinh_arcsinh(t.marginals, t.shift + t.factor @ whitened)
    mean, log_scale = _conditional(t, whitened)
    x = t.loc + t.scale * (mean + jnp.exp(log_scale) * w)
    return x, _log_det(t, log_slope, log_scale)


def inverse(transport: Transport | None, position: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Map x to its whitened point z; `None` is the identity.

    Returns:
        z (d,), and log |det dx / dz| there, as `forward` does.
    """
    if transport is None:
        return position, jnp.zeros((), position.dtype)
    t = transport
    x = (position - t.loc) / t.scale
    # First as if all were drivers: right for those that are, and the factor keeps them apart.
    as_drivers = t.inverse_factor @ (_inverse_sinh_arcsinh(t.marginals, x) - t.shift)
    mean, log_scale = _conditional(t, as_drivers)
    y = _inverse_sinh_arcsinh(t.marginals, (x - mean) * jnp.exp(-log_scale))
    _, log_slope = _sinh_arcsinh(t.marginals, y)
    return t.inverse_factor @ (y - t.shift), _log_det(t, log_slope, log_scale)


def affine(loc: jax.Array, factor: jax.Array) -> Transport:
    """Return the map x = loc + factor z, with a lower triangular factor."""
    dim, dtype = loc.size, loc.dtype
    scale = jnp.sqrt(jnp.sum(factor**2, axis=1))
    factor = factor / scale[:, None]
    return Transport(
        loc,
        scale,
        jnp.zeros(dim, dtype),
        factor,
        _inverse(factor),
        _no_marginals(dim, dtype),
        jnp.zeros(0, int),
        jnp.zeros(0, bool),
        jnp.zeros((1, dim), dtype),
        jnp.zeros((0, dim), dtype),
    )


def identity(dim: int, num_slots: int, dtype: jnp.dtype) -> Transport:
    """Return the map x = z, with slots for drivers, none of them used."""
    num_features = (num_slots + 1) * (num_slots + 2) // 2
    return affine(jnp.zeros(dim, dtype), jnp.eye(dim, dtype=dtype))._replace(
        drivers=jnp.zeros(num_slots, int),
        is_used=jnp.zeros(num_slots, bool),
        mean=jnp.zeros((num_features, dim), dtype),
        log_scale=jnp.zeros((num_slots, dim), dtype),
    )


def fit(
    draws: jax.Array,
    *,
    max_drivers: int = MAX_DRIVERS,
    threshold: float = 0.1,
    inflation: float = INFLATION,
) -> Transport:
    """Fit a map to draws, (n, d), by regressions.

    Drivers are chosen one after the other: each time the coordinate that explains most of how the
    others' scales and curvature vary, until that is less than `threshold` or what chance explains.
    Cost: some d^2 n operations per driver; shapes are static, so that it can be compiled.

    Args:
        draws: of the posterior, correlated ones too.
        max_drivers: slots for drivers, at most d / 2 of them.
        threshold: the least gain in log density per draw that makes a driver.
        inflation: factor of all scales.
    """
    dim = draws.shape[1]
    loc, scale = jnp.mean(draws, axis=0), jnp.std(draws, axis=0) + _tiny(draws.dtype)
    x = (draws - loc) / scale
    drivers, is_used, is_driver = select_drivers(x, min(max_drivers, dim // 2), threshold)

    def body(residuals, _):
        # Drivers are their own residuals, so that both passes find the same for them.
        marginals = fit_marginals(residuals)
        y = _inverse_sinh_arcsinh(marginals, residuals)
        shift, factor = _moments(y, is_driver)
        u = _driver_values((y - shift) @ _inverse(factor).T, drivers, is_used)
        mean, log_scale = regress(u, x, is_used)
        mean, log_scale = (jnp.where(is_driver, 0, leaf) for leaf in (mean, log_scale))
        residuals = (x - _features(u) @ mean) * jnp.exp(-u @ log_scale)
        return residuals, (shift, factor, marginals, mean, log_scale)

    # The first pass finds what depends on the drivers, the second what is left of the others.
    _, found = jax.lax.scan(body, x, length=2)
    shift, factor, marginals, mean, log_scale = (leaf[-1] for leaf in found)
    none = jnp.zeros_like(factor)
    fitted = Transport(
        loc, scale, shift, factor, none, marginals, drivers, is_used, mean, log_scale
    )
    return inflate(fitted, inflation)


def inflate(transport: Transport, size: float | jax.Array) -> Transport:
    """Return the map z -> T(size z)."""
    t = transport
    powers = _features(jnp.full(t.drivers.size, size, t.loc.dtype))
    factor = t.factor * size
    return t._replace(
        factor=factor,
        inverse_factor=_inverse(factor),
        mean=t.mean * powers[:, None],
        log_scale=t.log_scale * size,
    )


def refine(
    transport: Transport, points: jax.Array, logdensity: jax.Array, weights: jax.Array
) -> Transport:
    r"""Improve a map by values of the log density, which have no noise, as draws have.

    Minimizes a robust spread of :math:`f(T(z)) + \log|\det T'(z)| + |z|^2 / 2`, which is constant
    where the map makes the target Gaussian, over all of the map's numbers; its drivers stay. A
    target of the map's family, a funnel or a banana, is found to rounding, also where no chain has
    been. A fifth of the points is held out: where what is left at them is neither small nor half of
    what was, the map stays as it was, for that of draws has better tails. What is left says how
    much wider than the fit the Gaussian should be.

    Args:
        transport: to start from.
        points: x, (n, d).
        logdensity: f there.
        weights: of the points; zero leaves one out.
    """
    is_driver = _is_driver(transport)
    same_block = jnp.tril(is_driver[:, None] == is_driver)
    points = jnp.where(weights[:, None] > 0, points, transport.loc)
    logdensity = jnp.where(weights > 0, logdensity, 0)
    is_held_out = jnp.arange(len(weights)) % FOLDS == 0
    seen, held_out = (_sum_to_one(jnp.where(k, weights, 0)) for k in (~is_held_out, is_held_out))

    def with_numbers(numbers):
        shift, factor, (xi, log_lambda, epsilon, log_delta), mean, log_scale = numbers
        factor = jnp.where(same_block, factor, 0)
        return transport._replace(
            shift=shift,
            factor=factor,
            inverse_factor=_inverse(factor),
            marginals=jnp.stack([xi, jnp.exp(log_lambda), epsilon, jnp.exp(log_delta)]),
            mean=jnp.where(is_driver, 0, mean),
            log_scale=jnp.where(is_driver | ~transport.is_used[:, None], 0, log_scale),
        )

    def remainder(numbers, point):
        x, value, weight = point
        whitened, log_det = inverse(with_numbers(numbers), x)
        return jnp.where(weight > 0, value + log_det + whitened @ whitened / 2, 0)

    xi, scale, epsilon, delta = transport.marginals
    logs = jnp.stack([xi, jnp.log(scale), epsilon, jnp.log(delta)])
    first = transport.shift, transport.factor, logs, transport.mean, transport.log_scale
    refined, *remainders = least_squares(remainder, first, (points, logdensity, weights), seen)
    before, left = (jnp.sqrt(held_out @ (r - held_out @ r) ** 2) for r in remainders)
    is_better = left < jnp.maximum(CLOSE, before / 2)
    numbers = jax.tree.map(partial(jnp.where, is_better), refined, first)
    left = jnp.where(is_better, left, before)
    return inflate(with_numbers(numbers), 1 + jnp.clip(left / 2, 0, INFLATION - 1))


def select_drivers(
    x: jax.Array, num_slots: int, threshold: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Choose drivers greedily; returns their coordinates, which slots are used, and a mask (d,)."""
    dim = x.shape[1]
    ordered = jnp.sort(x[:, 0])
    num_distinct = 1 + jnp.sum(ordered[1:] != ordered[:-1])
    # Three times what chance explains, a tenth of the distinct draws taken for independent.
    floor = 1.5 / jnp.maximum(10.0, num_distinct / 10) + 0.005

    def body(carry, slot):
        drivers, is_used, is_driver, residuals = carry
        scores = jax.lax.map(lambda k: _score(residuals, k, is_driver, floor), jnp.arange(dim))
        best = jnp.argmax(jnp.where(is_driver, -jnp.inf, scores))
        is_found = (scores[best] >= threshold) & (jnp.sum(is_used) == slot)
        drivers = drivers.at[slot].set(jnp.where(is_found, best, 0))
        is_used = is_used.at[slot].set(is_found)
        is_driver = is_driver | (is_found & (jnp.arange(dim) == best))
        # What the drivers explain is taken out of the others before the next is sought.
        shift, factor = _moments(x, is_driver)
        u = _driver_values((x - shift) @ _inverse(factor).T, drivers, is_used)
        mean, log_scale = regress(u, x, is_used)
        explained = (x - _features(u) @ mean) * jnp.exp(-u @ log_scale)
        return (drivers, is_used, is_driver, jnp.where(is_driver, x, explained)), None

    none = jnp.zeros(num_slots, int), jnp.zeros(num_slots, bool), jnp.zeros(dim, bool)
    if num_slots == 0:
        return none
    carry = (*none, x)
    (drivers, is_used, is_driver, _), _ = jax.lax.scan(body, carry, jnp.arange(num_slots))
    return drivers, is_used, is_driver


def regress(
    u: jax.Array, x: jax.Array, is_used: jax.Array, num_iterations: int = 3
) -> tuple[jax.Array, jax.Array]:
    """Regress means (quadratically) and log scales (linearly) of `x` on drivers, in turn.

    Returns:
        Coefficients of the means (q, d) and of the log scales (k, d), zero for unused slots.
    """
    if u.shape[1] == 0:
        return jnp.mean(x, axis=0, keepdims=True), jnp.zeros((0, x.shape[1]), x.dtype)
    features = _features(u)
    linear = features[:, : 1 + u.shape[1]]
    products = (features[:, :, None] * features[:, None]).reshape(len(x), -1)
    shape = (x.shape[1], features.shape[1], features.shape[1])
    # Scales are relative to one: the residuals' own scale goes into the marginals.
    noise_floor = 1e-12 if x.dtype == jnp.float64 else 1e-8

    def body(weights, _):
        squared = weights**2
        gram = (squared.T @ products).reshape(shape)
        mean = _solve(gram, (features.T @ (squared * x)).T).T
        residuals = x - features @ mean
        log_squares = jnp.log(residuals**2 + noise_floor)
        slopes = _solve(linear.T @ linear, linear.T @ log_squares)[1:] / 2
        log_scale = jnp.where(is_used[:, None], slopes, 0)
        return jnp.exp(-jnp.clip(u @ log_scale, -10, 10)), (mean, log_scale)

    _, (mean, log_scale) = jax.lax.scan(body, jnp.ones_like(x), length=num_iterations)
    return mean[-1], log_scale[-1]


def fit_marginals(x: jax.Array, num_points: int = 1000, num_iterations: int = 20) -> jax.Array:
    """Fit a sinh-arcsinh transform to each column by damped Newton steps on the likelihood.

    A little shrunk to no transform at all, and none where it gains less than 0.01 per draw.

    Returns:
        (4, d): xi, lambda, epsilon, delta.
    """
    some = x[:: -(-len(x) // num_points)]
    lower = jnp.array([-4.0, -2.5, -2.0, np.log(0.4)], x.dtype)
    upper = jnp.array([4.0, 2.5, 2.0, np.log(2.0)], x.dtype)
    fractions = jnp.asarray(0.5 ** np.arange(8), x.dtype)

    def one_column(column):
        loc, scale = jnp.mean(column), jnp.std(column) + _tiny(x.dtype)
        cost = partial(_marginal_cost, (column - loc) / scale)
        twice = lambda fun: lambda params: (fun(params),) * 2

        def improved(params):
            hessian, grad = jax.jacfwd(twice(jax.grad(cost)), has_aux=True)(params)
            curvatures, directions = jnp.linalg.eigh(hessian)
            curvatures = jnp.maximum(jnp.abs(curvatures), 1e-3)
            move = directions @ (directions.T @ grad / curvatures)
            trials = jnp.clip(params - fractions[:, None] * move, lower, upper)
            trials = jnp.concatenate([params[None], trials])
            costs = jax.vmap(cost)(trials)
            return trials[jnp.argmin(jnp.where(jnp.isnan(costs), jnp.inf, costs))]

        def body(carry):
            i, _, params = carry
            new = improved(params)
            return i + 1, jnp.any(new != params), new

        none = jnp.zeros(4, x.dtype)
        first = jnp.zeros((), int), jnp.ones((), bool), none
        # Where no trial costs less, none ever will.
        goes_on = lambda carry: carry[1] & (carry[0] < num_iterations)
        *_, best = jax.lax.while_loop(goes_on, body, first)
        params = jnp.where(cost(none) - cost(best) > 0.01, best, none)
        xi, log_lambda, epsilon, log_delta = params
        return jnp.stack(
            [loc + scale * xi, scale * jnp.exp(log_lambda), epsilon, jnp.exp(log_delta)]
        )

    return jax.vmap(one_column, in_axes=1, out_axes=1)(some)


def _marginal_cost(x, params):
    """Return the negative mean log likelihood of a sinh-arcsinh transform, with a penalty."""
    xi, log_lambda, epsilon, log_delta = params
    w = (x - xi) * jnp.exp(-log_lambda)
    t = jnp.clip(jnp.exp(log_delta) * jnp.arcsinh(w) - epsilon, -30, 30)
    log_likelihood = (
        -(jnp.sinh(t) ** 2) / 2 + _log_cosh(t) + log_delta - log_lambda - jnp.log1p(w**2) / 2
    )
    return -jnp.mean(log_likelihood) + 0.01 * (epsilon**2 + log_delta**2)


def _score(x, k, is_driver, floor):
    """Say how much of the others' log density driver k explains, by scales and by means."""
    others = ~is_driver & (jnp.arange(x.shape[1]) != k)
    u = (x[:, k] - jnp.mean(x[:, k])) / (jnp.std(x[:, k]) + _tiny(x.dtype))
    # Orthogonal polynomials of the draws.
    square = u**2 - 1 - jnp.mean(u**3) * u
    square = square / (jnp.sqrt(jnp.mean(square**2)) + _tiny(x.dtype))
    centered = x - jnp.mean(x, axis=0)
    straight = centered - u[:, None] * jnp.mean(u[:, None] * x, axis=0)
    bent = straight - square[:, None] * jnp.mean(square[:, None] * straight, axis=0)
    tiny = 1e-12 if x.dtype == jnp.float64 else 1e-8
    variance = jnp.var(bent, axis=0) + tiny
    curve = jnp.log((jnp.var(straight, axis=0) + tiny) / variance) / 2
    slope = jnp.mean(u[:, None] * jnp.log(bent**2 + tiny), axis=0) / 2
    gain = jnp.maximum(slope**2 - 2.5 * floor, 0) + jnp.maximum(curve - floor, 0)
    return jnp.sum(jnp.where(others, gain, 0))


def _is_driver(t):
    """Say which coordinates are drivers, (d,)."""
    slots = t.is_used[:, None] & (t.drivers[:, None] == jnp.arange(t.loc.size))
    return jnp.any(slots, axis=0)


def _conditional(t, whitened):
    """Return the means and the log scales that the drivers give to all coordinates."""
    u = _driver_values(whitened, t.drivers, t.is_used)
    return _features(u) @ t.mean, u @ t.log_scale


def _driver_values(whitened, drivers, is_used):
    return jnp.where(is_used, whitened[..., drivers], 0)


def _features(u):
    i, j = np.triu_indices(u.shape[-1])
    ones = jnp.ones((*u.shape[:-1], 1), u.dtype)
    return jnp.concatenate([ones, u, u[..., i] * u[..., j]], axis=-1)


def _log_det(t, log_slope, log_scale):
    diagonal = jnp.log(jnp.diag(t.factor)) + jnp.log(t.scale)
    return jnp.sum(diagonal + log_slope + log_scale)


def _sinh_arcsinh(marginals, y):
    xi, scale, epsilon, delta = marginals
    t = (jnp.arcsinh(y) + epsilon) / delta
    log_slope = jnp.log(scale / delta) + _log_cosh(t) - jnp.log1p(y**2) / 2
    return xi + scale * jnp.sinh(t), log_slope


def _inverse_sinh_arcsinh(marginals, w):
    xi, scale, epsilon, delta = marginals
    return jnp.sinh(delta * jnp.arcsinh((w - xi) / scale) - epsilon)


def _no_marginals(dim, dtype):
    return jnp.tile(jnp.array([[0.0], [1.0], [0.0], [1.0]], dtype), (1, dim))


def _log_cosh(t):
    return jnp.logaddexp(t, -t) - float(np.log(2))


def _moments(y, is_driver):
    """Return the mean and the factor of the covariance, without what joins drivers to the rest."""
    mean = jnp.mean(y, axis=0)
    covariance = (y - mean).T @ (y - mean) / len(y)
    covariance = jnp.where(is_driver[:, None] == is_driver, covariance, 0)
    jitter = 1e-10 if y.dtype == jnp.float64 else 1e-6
    size = jnp.mean(jnp.diag(covariance))
    return mean, jnp.linalg.cholesky(covariance + jitter * size * jnp.eye(len(mean), dtype=y.dtype))


def _inverse(factor):
    return solve_triangular(factor, jnp.eye(len(factor), dtype=factor.dtype), lower=True)


def _solve(gram, target):
    """Solve normal equations, columns of zeros among them."""
    ridge = 1e-9 if gram.dtype == jnp.float64 else 1e-5
    size = jnp.trace(gram, axis1=-2, axis2=-1)[..., None, None] / gram.shape[-1]
    gram = gram + ridge * size * jnp.eye(gram.shape[-1], dtype=gram.dtype)
    is_vector = target.ndim < gram.ndim
    factor = jax.scipy.linalg.cho_factor(gram)
    solution = jax.scipy.linalg.cho_solve(factor, target[..., None] if is_vector else target)
    return solution[..., 0] if is_vector else solution


def _sum_to_one(weights):
    return weights / jnp.maximum(jnp.sum(weights), 1e-30)


def _tiny(dtype):
    return float(jnp.finfo(dtype).tiny) ** 0.5
