r"""The log evidence of a model from draws of its posterior, by bridge sampling.

With the whitened log density :math:`\ell` and a surrogate g that was fitted to one half of the
draws,

.. math::
    \log Z = \log \frac{\int e^{\ell}}{\int e^{g}} + \log \frac{\int e^{g}}{\int e^{-|z|^2 / 2}}
    + \frac d 2 \log 2\pi,

each ratio by the optimal bridge between draws of both. Draws of the surrogate cost no evaluation.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from probbp.checks import check_count, check_function, check_rng_key
from probbp.samplers import checks
from probbp.samplers.surrogate import regression
from probbp.samplers.surrogate.inner import (
    inner_transition,
    point_at,
    predictor,
    surrogate_logdensity,
)
from probbp.samplers.surrogate.learning import fit_transport
from probbp.samplers.surrogate.polynomial import Polynomial
from probbp.samplers.surrogate.ridges import Ridges
from probbp.samplers.surrogate.transport import Transport, forward, inverse
from probbp.samplers.surrogate.trust import (
    distrust_of_fit,
    distrust_of_weights,
    effective_size,
    weights_of,
)
from probbp.types import LogDensity, Tree

STEP_SIZES, NUM_STEPS = (0.4, 0.2, 0.1, 0.4, 0.2, 0.1, 0.4), 4
"""Of the surrogate's own chains, from draws of the posterior, which are nearly its own; small steps
lead those away that start where the surrogate is steep."""

NUM_FREE = 10_000
"""Draws of the surrogate and of the Gaussian for their ratio; they cost no evaluation."""


class Evidence(NamedTuple):
    """A log evidence.

    Attributes:
        log_evidence: log of the integral of the density.
        error: its standard error.
        pareto_k: Pareto shape of target over surrogate at the half of the draws that the surrogate
            was not fitted to.
        held_out_std: error of the surrogate at points that it was not fitted to.
    """

    log_evidence: float
    error: float
    pareto_k: float
    held_out_std: float


class Reference(NamedTuple):
    """What is fitted to one half of the draws.

    Attributes:
        transport: the map.
        surrogate: of the log density in its coordinates.
        whitened: the draws, (n, d).
        held_out_std: error of the surrogate.
    """

    transport: Transport
    surrogate: Polynomial | Ridges
    whitened: jax.Array
    held_out_std: jax.Array


def log_evidence(
    rng_key: jax.Array,
    logdensity_fn: LogDensity,
    draws: Tree,
    *,
    num_evaluations: int = 4000,
    batch_size: int | None = None,
) -> Evidence:
    """Estimate the log marginal likelihood from draws of any sampler.

    Estimated: the integral over all positions of `exp(logdensity_fn)`. It is the evidence where
    that is prior times likelihood with all constants, in unconstrained coordinates with the
    Jacobian of the transformation, as minus NumPyro's potential is. The error is of Monte Carlo
    alone: it says nothing of a mode that no chain has seen.

    Cost: one log density for each draw, and `num_evaluations`.

    Args:
        rng_key: key of the reference draws.
        logdensity_fn: log density of a position.
        draws: positions of the chains, a pytree with leading axes (chain, draw), such as
            `data.posterior["x"].values`; as the sampler has seen them, without `postprocess_fn`.
        num_evaluations: draws of the surrogate at which the log density is evaluated.
        batch_size: how many log densities are evaluated at once; all by default.

    Raises:
        ValueError: for leaves without chains and draws, fewer than 200 draws in all, and where the
            surrogate does not fit: the estimate could then be wrong without a sign of it.

    Example:
        >>> import jax, jax.numpy as jnp, probbp
        >>> from jax.scipy.stats import norm
        >>> draws = jax.random.normal(jax.random.key(0), (4, 500, 2))
        >>> logdensity_fn = lambda x: jnp.sum(norm.logpdf(x)) + 3.0
        >>> found = probbp.log_evidence(jax.random.key(1), logdensity_fn, draws)
        >>> bool(abs(found.log_evidence - 3.0) < 0.05)
        True

    Reference:
        Bennett, 1976; Meng & Wong, 1996 (the optimal bridge); Frühwirth-Schnatter, 2004 (its
        error); Overstall & Forster, 2010 (a reference from one half of the draws).
    """
    check_rng_key("rng_key", rng_key)
    check_function("logdensity_fn", logdensity_fn, checks.A_LOG_DENSITY)
    num_evaluations = check_count("num_evaluations", num_evaluations)
    batch_size = None if batch_size is None else check_count("batch_size", batch_size)
    flat, unravel = _flat(draws)
    num_chains, num_draws, dim = flat.shape
    if num_chains * num_draws < 200:
        raise ValueError(
            "log_evidence fits a surrogate to half of the draws: draws must hold at least 200, got "
            f"{num_chains * num_draws}."
        )
    key_fit, key_draw, key_gaussian = jax.random.split(rng_key, 3)
    rows = [half.reshape(-1, dim) for half in jnp.split(flat, [num_draws // 2], axis=1)]

    @jax.jit
    def evaluate(x):
        one = lambda row: logdensity_fn(unravel(row))
        values = jax.lax.map(one, x, batch_size=batch_size or len(x))
        return jnp.where(jnp.isnan(values), -jnp.inf, values)

    # A constant would take digits from all that follows; it is added in Python's double precision.
    first = evaluate(rows[0])
    constant = jnp.median(first)
    centered = lambda x: evaluate(x) - constant
    reference = jax.jit(fit_reference)(key_fit, rows[0], first - constant)
    weigh = jax.jit(log_weight)
    at_draws = weigh(reference, rows[1], centered(rows[1])).reshape(num_chains, -1)
    weights, held_out_std = weights_of(at_draws), float(reference.held_out_std)
    if reasons := distrust_of_weights(weights) + distrust_of_fit(held_out_std):
        raise ValueError(
            f"The surrogate does not fit these draws: {'; '.join(reasons)}. Its evidence could be "
            "wrong without a sign of it. Give more draws, or remove strong curvature by another "
            "parameterization."
        )
    draw = jax.jit(draw_reference, static_argnums=2)
    drawn = draw(key_draw, reference, num_evaluations + NUM_FREE)
    x, _ = jax.vmap(partial(forward, reference.transport))(drawn[:num_evaluations])
    upper, upper_error = bridge(at_draws, weigh(reference, x, centered(x))[None])

    free = drawn[num_evaluations:]
    gaussian = jax.random.normal(key_gaussian, free.shape, free.dtype)
    remainder = jax.jit(jax.vmap(lambda g, z: g.value_and_grad(z)[0], in_axes=(None, 0)))
    at_free, at_gaussian = (remainder(reference.surrogate, z)[None] for z in (free, gaussian))
    lower, lower_error = bridge(at_free, at_gaussian)
    return Evidence(
        float(constant) + float(upper + lower + dim / 2 * jnp.log(2 * jnp.pi)),
        float(jnp.hypot(upper_error, lower_error)),
        weights.pareto_k,
        held_out_std,
    )


def fit_reference(rng_key: jax.Array, x: jax.Array, logdensity: jax.Array) -> Reference:
    """Fit map and surrogate to draws, (n, d), and their log density."""
    transport = fit_transport(x, logdensity, x, logdensity)
    whitened, log_det = jax.vmap(partial(inverse, transport))(x)
    core = jnp.nanquantile(logdensity + log_det, 0.02)
    fitted = regression.fit(rng_key, whitened, logdensity + log_det, core)
    return Reference(transport, fitted.surrogate, whitened, fitted.held_out_std)


def log_weight(reference: Reference, x: jax.Array, logdensity: jax.Array) -> jax.Array:
    """Return the log of target over surrogate at points, (n, d)."""

    def one(x, logdensity):
        whitened, log_det = inverse(reference.transport, x)
        point = point_at(predictor(reference.surrogate), whitened)
        return logdensity + log_det - surrogate_logdensity(point)

    return jax.vmap(one)(x, logdensity)


def draw_reference(rng_key: jax.Array, reference: Reference, num: int) -> jax.Array:
    """Draw whitened points from the surrogate, (num, d); no evaluation."""
    key_start, key_chain = jax.random.split(rng_key)
    rows = jax.random.randint(key_start, (num,), 0, len(reference.whitened))
    predict = predictor(reference.surrogate)

    step_sizes = jnp.asarray(STEP_SIZES, reference.whitened.dtype)

    def chain(key, whitened):
        def step(point, inputs):
            return inner_transition(inputs[0], predict, point, inputs[1], NUM_STEPS)

        keys = jax.random.split(key, len(STEP_SIZES))
        point, _ = jax.lax.scan(step, point_at(predict, whitened), (keys, step_sizes))
        return point.whitened

    return jax.vmap(chain)(jax.random.split(key_chain, num), reference.whitened[rows])


@jax.jit
def bridge(at_first: jax.Array, at_second: jax.Array) -> tuple[jax.Array, jax.Array]:
    r"""Estimate the log ratio of two integrals, and its standard error.

    Args:
        at_first: log of the first density over the second, at draws of the first, (chain, draw).
            The draws may be correlated: they count as many as their effective number.
        at_second: the same at draws of the second, (chain, draw).
    """
    num = [jnp.asarray(effective_size(values)) for values in (at_first, at_second)]
    log_odds = jnp.log(num[1] / num[0])

    def excess(log_ratio):
        """Zero at the optimum; it grows with the ratio."""
        first = num[0] * jnp.mean(jax.nn.sigmoid(log_ratio + log_odds - at_first))
        second = num[1] * jnp.mean(jax.nn.sigmoid(at_second - log_ratio - log_odds))
        return first - second

    def halve(_, bracket):
        low, high = bracket
        middle = (low + high) / 2
        is_high = excess(middle) > 0
        return jnp.where(is_high, low, middle), jnp.where(is_high, middle, high)

    values = jnp.concatenate([at_first.ravel(), at_second.ravel()])
    is_finite, width = jnp.isfinite(values), jnp.abs(log_odds) + 1
    bracket = (
        jnp.min(values, where=is_finite, initial=jnp.inf) - width,
        jnp.max(values, where=is_finite, initial=-jnp.inf) + width,
    )
    low, high = jax.lax.fori_loop(0, 60, halve, bracket)
    log_ratio = (low + high) / 2
    terms = (
        jax.nn.sigmoid(log_ratio + log_odds - at_first),
        jax.nn.sigmoid(at_second - log_ratio - log_odds),
    )
    errors = [jnp.var(t) / jnp.mean(t) ** 2 / effective_size(t) for t in terms]
    return log_ratio, jnp.sqrt(errors[0] + errors[1])


def _flat(draws):
    """Return draws as (chain, draw, d), and what turns a row into a position."""
    checks.check_position(draws, "draws")
    draws = jax.tree.map(jnp.asarray, draws)
    shapes = {leaf.shape[:2] for leaf in jax.tree.leaves(draws)}
    if len(shapes) != 1 or len(min(shapes)) != 2:
        raise ValueError(
            "draws must be a pytree of arrays with leading axes (chain, draw), the same for all, "
            f"got {sorted(shapes)}."
        )
    _, unravel = ravel_pytree(jax.tree.map(lambda leaf: leaf[0, 0], draws))
    return jax.vmap(jax.vmap(lambda tree: ravel_pytree(tree)[0]))(draws), unravel
