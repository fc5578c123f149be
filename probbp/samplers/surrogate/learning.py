"""What the warm-up of the surrogate transition carries, and what it learns between its stages.

The walk's covariance, the map, the surrogate, the step size and the weights of the kinds of moves,
each from all chains together; nothing here evaluates the log density.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from probbp.samplers.surrogate import regression
from probbp.samplers.surrogate.kernel import WALK, WEIGHTS, SurrogateState, whiten
from probbp.samplers.surrogate.polynomial import Polynomial
from probbp.samplers.surrogate.regression import point_weights
from probbp.samplers.surrogate.ridges import Ridges
from probbp.samplers.surrogate.transport import (
    Transport,
    affine,
    fit,
    forward,
    inverse,
    refine,
)

MAX_DRAWS = 3000
"""Draws that a map is fitted to; of more every few are taken."""

MAX_VALUES = 1000
"""Values that a map is refined by; they have no noise, so that few will do."""

MAX_MAP_DIM = 20
"""Above it the map is affine."""

TINY = 1e-10
"""Added to variances, so that chains which have not moved yet have a factor."""

SMALLEST_STEP_SIZE, LARGEST_STEP_SIZE = 0.02, 0.45


class Parameters(NamedTuple):
    """What the kernel takes, in its order.

    Attributes:
        step_size: of the inner integrator.
        transport: the map.
        surrogate: the polynomial, or the ridges.
        weights: probabilities of the kinds.
    """

    step_size: jax.Array
    transport: Transport
    surrogate: Polynomial | Ridges
    weights: jax.Array


class History(NamedTuple):
    """The latest steps of all chains, the newest last; the log density is -inf where none is yet.

    Attributes:
        points: every point evaluated, (steps, chains, d).
        point_logdensity: f there.
        draws: the state after each step, (steps, chains, d).
        draw_logdensity: f there.
        point_grads, draw_grads: estimates of the gradient there; `None` without an estimator.
    """

    points: jax.Array
    point_logdensity: jax.Array
    draws: jax.Array
    draw_logdensity: jax.Array
    point_grads: jax.Array | None = None
    draw_grads: jax.Array | None = None


class Totals(NamedTuple):
    """Sums over the steps since the last fit, by kind of move, (4,).

    Attributes:
        count: of moves.
        acceptance: of their acceptance rates.
        jump: of their expected squared jumps in whitened coordinates.
        inner: of the acceptance rates on the surrogate.
    """

    count: jax.Array
    acceptance: jax.Array
    jump: jax.Array
    inner: jax.Array


class Report(NamedTuple):
    """What warm-up learned, and at what cost.

    Attributes:
        num_evaluations: of the log density, all chains together; every one is counted, but for
            those of the estimator.
        num_gradients: evaluations of the estimator, each of a value and a gradient.
        num_relocated: how often a chain in a mode without weight was moved to another chain.
        held_out_std: error of the surrogate on points that it was not fitted to. Up to 0.4 is good;
            nothing is said of regions that no chain has seen.
        degree: of the polynomial; zero is none.
        num_drivers: of the map.
        acceptance_rate: (4,) by kind, in the last round.
        jump: (4,) by kind, expected squared jumps in whitened coordinates, in the last round.
        inner_acceptance_rate: of global moves on the surrogate, in the last round.
    """

    num_evaluations: jax.Array
    num_gradients: jax.Array
    num_relocated: jax.Array
    held_out_std: jax.Array
    degree: jax.Array
    num_drivers: jax.Array
    acceptance_rate: jax.Array
    jump: jax.Array
    inner_acceptance_rate: jax.Array


class WarmupState(NamedTuple):
    """What warm-up carries from stage to stage.

    Attributes:
        states: of all chains, whitened by the current map.
        parameters: of the kernel.
        grads: (chains, d), the drift of the walk at the states; zero without an estimator.
        walk_factor: (d, d), the shape of the walk of the first phase.
        log_walk_scale: its size.
        history: of points and draws.
        totals: since the last fit.
        num_since: steps since the last fit.
        num_kept: older draws that the next fit of the map may use, in steps.
        report: so far.
    """

    states: SurrogateState
    parameters: Parameters
    grads: jax.Array
    walk_factor: jax.Array
    log_walk_scale: jax.Array
    history: History
    totals: Totals
    num_since: jax.Array
    num_kept: jax.Array
    report: Report


def relocate(rng_key: jax.Array, carry: WarmupState) -> WarmupState:
    """Move chains in modes without weight to others, which learning from all would suffer from.

    Such a chain has stayed 50 + 10 d below the best one throughout the latter half of the steps
    since the last fit. It takes over the other's state and history, without an evaluation.
    """
    num_steps, num_chains, dim = carry.history.draws.shape
    age = num_steps - jnp.arange(num_steps)
    is_recent = (age <= jnp.maximum(carry.num_since // 2, 1))[:, None]
    logdensity = carry.history.draw_logdensity
    best = jnp.max(jnp.where(is_recent, logdensity, -jnp.inf), axis=0)
    worst = jnp.min(jnp.where(is_recent, logdensity, jnp.inf), axis=0)
    is_lost = best < worst[jnp.argmax(best)] - 50 - 10 * dim
    donors = jax.random.categorical(rng_key, jnp.where(is_lost, -jnp.inf, 0.0), shape=(num_chains,))
    source = jnp.where(is_lost, donors, jnp.arange(num_chains))
    grads = carry.history.draw_grads
    history = carry.history._replace(
        draws=carry.history.draws[:, source],
        draw_logdensity=logdensity[:, source],
        draw_grads=None if grads is None else grads[:, source],
    )
    num_relocated = carry.report.num_relocated + jnp.sum(is_lost)
    return carry._replace(
        states=jax.tree.map(lambda leaf: leaf[source], carry.states),
        grads=carry.grads[source],
        history=history,
        report=carry.report._replace(num_relocated=num_relocated),
    )


def rescale(carry: WarmupState) -> WarmupState:
    """Take the covariance of the latter two thirds of the steps as the walk's."""
    history = carry.history
    num_steps = carry.num_since - carry.num_since // 3
    draws = latest(history.draws, num_steps)
    dim, dtype = draws.shape[1], draws.dtype
    # Shrunk as if five draws in a row said what one says, as they almost do.
    num = num_steps * history.draws.shape[1] / 5
    covariance = shrunk(covariance_of(draws), num)
    if history.draw_grads is not None:
        grads = latest(history.draw_grads, num_steps)
        covariance = between(covariance, shrunk(covariance_of(grads), num))
    return carry._replace(
        walk_factor=jnp.linalg.cholesky(covariance + TINY * jnp.eye(dim, dtype=dtype)),
        log_walk_scale=first_walk_scale(dim, dtype, history.draw_grads is not None),
        num_since=jnp.zeros((), int),
    )


def refit(rng_key: jax.Array, carry: WarmupState) -> WarmupState:
    """Fit map and surrogate to what has been seen, and whiten the chains by the new map."""
    history, totals, since = carry.history, carry.totals, carry.num_since
    is_first = jnp.sum(totals.count) == 0
    num_used = jnp.where(is_first, since - since // 3, since + carry.num_kept // 2)
    draws = latest(history.draws, num_used)
    draw_logdensity = latest(history.draw_logdensity, num_used)
    points = history.points.reshape(-1, draws.shape[1])
    point_logdensity = history.point_logdensity.ravel()

    draw_grads = None
    if history.draw_grads is not None:
        draw_grads = latest(history.draw_grads, num_used)
    transport = fit_transport(draws, draw_logdensity, points, point_logdensity, draw_grads)
    (_, whitened), (core_values, values) = _whiten_all(
        transport, (draws, points), (draw_logdensity, point_logdensity)
    )
    core = jnp.nanquantile(core_values, 0.02)
    if history.point_grads is None:
        fitted = regression.fit(rng_key, whitened, values, core)
    else:
        grads = history.point_grads.reshape(points.shape)
        slopes = jax.vmap(partial(whitened_grad, transport))(whitened, grads)
        fitted = regression.fit_ridges(rng_key, whitened, values, slopes, core)

    count = jnp.maximum(totals.count, 1)
    report = carry.report._replace(
        held_out_std=fitted.held_out_std,
        degree=fitted.degree,
        num_drivers=jnp.sum(transport.is_used),
        acceptance_rate=totals.acceptance / count,
        jump=totals.jump / count,
        inner_acceptance_rate=totals.inner[0] / count[0],
    )
    step_size = carry.parameters.step_size * jnp.where(is_first, 1, _step_factor(totals))
    states = jax.vmap(partial(whiten, transport))(carry.states.position, carry.states.logdensity)
    return carry._replace(
        states=states,
        parameters=carry.parameters._replace(
            step_size=jnp.clip(step_size, SMALLEST_STEP_SIZE, LARGEST_STEP_SIZE),
            transport=transport,
            surrogate=fitted.surrogate,
        ),
        totals=no_totals(draws.dtype),
        num_since=jnp.zeros((), int),
        num_kept=jnp.where(is_first, 0, num_used),
        report=report,
    )


def freeze(carry: WarmupState) -> WarmupState:
    """Give the kind that moved most in the last round what is left of the weight.

    The others stay for the tails; a surrogate that is good seldom needs them.
    """
    main = jnp.argmax(carry.report.jump)
    few = jnp.full(WALK + 1, 0.05)
    more = jnp.asarray(WEIGHTS).at[0].set(0.1)
    weights = jnp.where(carry.report.held_out_std < 0.15, few, more)
    weights = weights.at[main].set(0)
    weights = weights.at[main].set(1 - jnp.sum(weights))
    weights = weights.astype(carry.parameters.weights.dtype)
    return carry._replace(parameters=carry.parameters._replace(weights=weights))


def fit_transport(
    draws: jax.Array,
    draw_logdensity: jax.Array,
    points: jax.Array,
    point_logdensity: jax.Array,
    draw_grads: jax.Array | None = None,
) -> Transport:
    """Fit the map: to draws and then to values where there are few coordinates, else an affine one.

    With gradients the affine one has the covariance between that of the draws and the inverse of
    the gradients', which is exact for a Gaussian. Without, it has the moments of the draws,
    improved by the curvature of the log density where a quadratic regression on the points finds
    one.
    """
    dim = draws.shape[1]
    if dim <= MAX_MAP_DIM:
        first = fit(draws, inflation=1.0)
        # The latest last, evenly taken.
        step = -(-len(points) // MAX_VALUES)
        points, values = points[::-step][::-1], point_logdensity[::-step][::-1]
        (_, whitened), (core_values, whitened_values) = _whiten_all(
            first, (draws, points), (draw_logdensity, values)
        )
        core = jnp.nanquantile(core_values, 0.02)
        return refine(first, points, values, point_weights(whitened, whitened_values, core))
    covariance = covariance_of(draws)
    if draw_grads is not None:
        num = len(draws) / 5
        parts = shrunk(covariance, num), shrunk(covariance_of(draw_grads), num)
        return affine(jnp.mean(draws, axis=0), jnp.linalg.cholesky(between(*parts)))
    # Shrunk, as the draws of a walk may leave out directions.
    covariance = 0.9 * covariance + 0.1 * jnp.diag(jnp.diag(covariance) + TINY)
    loc, factor = jnp.mean(draws, axis=0), jnp.linalg.cholesky(covariance)
    core = jnp.nanquantile(draw_logdensity, 0.02)
    return affine(*regression.curvature(loc, factor, points, point_logdensity, core))


def whitened_grad(transport: Transport, whitened: jax.Array, grad: jax.Array) -> jax.Array:
    """Return the gradient of f(T(z)) + log |det T'(z)| with respect to z, given that of f."""
    _, pullback = jax.vjp(partial(forward, transport), whitened)
    return pullback((grad, jnp.ones((), grad.dtype)))[0]


def shrunk(covariance: jax.Array, num: jax.Array | float) -> jax.Array:
    """Return a covariance of `num` draws, pulled to its diagonal."""
    dim = len(covariance)
    diagonal = jnp.diag(jnp.diag(covariance) + TINY)
    return (num * covariance + dim * diagonal / 2) / (num + dim)


def between(covariance: jax.Array, of_grads: jax.Array) -> jax.Array:
    """Return the S for which S G S = C: the covariance of a Gaussian whose gradients have G.

    The geometric mean of C and the inverse of G, which minimizes the Fisher divergence.
    """
    factor = jnp.linalg.cholesky(covariance)
    values, axes = jnp.linalg.eigh(factor.T @ of_grads @ factor)
    half = factor @ axes / jnp.sqrt(jnp.sqrt(jnp.maximum(values, TINY)))
    return half @ half.T


def latest(history: jax.Array, num_steps: jax.Array) -> jax.Array:
    """Return the last steps of all chains as `MAX_DRAWS` rows, evenly taken."""
    num_chains = history.shape[1]
    rows = history.reshape(-1, *history.shape[2:])
    num = min(MAX_DRAWS, len(rows))
    available = jnp.minimum(num_steps * num_chains, len(rows))
    back = (jnp.arange(num) * (available / num)).astype(int)
    return rows[len(rows) - 1 - back]


def covariance_of(draws: jax.Array) -> jax.Array:
    """Return the covariance of rows."""
    centered = draws - jnp.mean(draws, axis=0)
    return centered.T @ centered / len(draws)


def first_walk_scale(dim: int, dtype: Any, is_guided: bool) -> jax.Array:
    """Return the log of the best size for a Gaussian whose covariance is known.

    Args:
        dim: d.
        dtype: of what is returned.
        is_guided: whether gradients guide the walk.
    """
    return jnp.log(jnp.asarray(1.65 / dim ** (1 / 6) if is_guided else 2.4 / dim**0.5, dtype))


def no_totals(dtype: Any) -> Totals:
    """Return sums over no step."""
    return Totals(*(jnp.zeros(WALK + 1, dtype) for _ in Totals._fields))


def _whiten_all(transport, positions, logdensities):
    """Whiten several sets of points; returns z and l of each. Together, to be compiled once."""
    whitened, log_dets = jax.vmap(partial(inverse, transport))(jnp.concatenate(positions))
    values = jnp.concatenate(logdensities) + log_dets
    ends = np.cumsum([len(x) for x in positions])[:-1]
    return jnp.split(whitened, ends), jnp.split(values, ends)


def _step_factor(totals):
    """Tune the inner step size by the acceptance rate on the surrogate."""
    rate = totals.inner[0] / jnp.maximum(totals.count[0], 1)
    return jnp.select([rate < 0.5, rate < 0.75, rate > 0.97], [0.5, 0.7, 1.3], 1.0)
