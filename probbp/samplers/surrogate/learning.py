"""What the warm-up of the surrogate transition carries, and what it learns between its stages.

The walk's covariance, the map, the surrogate, the step size and the weights of the kinds of moves,
each from all chains together; nothing here evaluates the log density.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from probbp.samplers.surrogate import regression
from probbp.samplers.surrogate.kernel import WALK, WEIGHTS, SurrogateState, whiten
from probbp.samplers.surrogate.polynomial import Polynomial
from probbp.samplers.surrogate.transport import Transport, affine, fit, inverse

MAX_DRAWS = 3000
"""Draws that a map is fitted to; of more every few are taken."""

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
        surrogate: the polynomial.
        weights: probabilities of the kinds.
    """

    step_size: jax.Array
    transport: Transport
    surrogate: Polynomial
    weights: jax.Array


class History(NamedTuple):
    """The latest steps of all chains, the newest last; the log density is -inf where none is yet.

    Attributes:
        points: every point evaluated, (steps, chains, d).
        point_logdensity: f there.
        draws: the state after each step, (steps, chains, d).
        draw_logdensity: f there.
    """

    points: jax.Array
    point_logdensity: jax.Array
    draws: jax.Array
    draw_logdensity: jax.Array


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
        num_evaluations: of the log density, all chains together; every one is counted.
        num_relocated: how often a chain in a mode without weight was moved to another chain.
        held_out_std: error of the surrogate on points that it was not fitted to. Up to 0.4 is good;
            nothing is said of regions that no chain has seen.
        degree: of the surrogate.
        num_drivers: of the map.
        acceptance_rate: (4,) by kind, in the last round.
        jump: (4,) by kind, expected squared jumps in whitened coordinates, in the last round.
        inner_acceptance_rate: of global moves on the surrogate, in the last round.
    """

    num_evaluations: jax.Array
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
        walk_factor: (d, d), the shape of the random walk of the first phase.
        log_walk_scale: its size.
        history: of points and draws.
        totals: since the last fit.
        num_since: steps since the last fit.
        num_kept: older draws that the next fit of the map may use, in steps.
        report: so far.
    """

    states: SurrogateState
    parameters: Parameters
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
    history = carry.history._replace(
        draws=carry.history.draws[:, source], draw_logdensity=logdensity[:, source]
    )
    num_relocated = carry.report.num_relocated + jnp.sum(is_lost)
    return carry._replace(
        states=jax.tree.map(lambda leaf: leaf[source], carry.states),
        history=history,
        report=carry.report._replace(num_relocated=num_relocated),
    )


def rescale(carry: WarmupState) -> WarmupState:
    """Take the covariance of the latter two thirds of the steps as the walk's."""
    draws = latest(carry.history.draws, carry.num_since - carry.num_since // 3)
    dim, dtype = draws.shape[1], draws.dtype
    # Shrunk as if five draws in a row said what one says, as they almost do.
    num = (carry.num_since - carry.num_since // 3) * carry.history.draws.shape[1] / 5
    covariance = covariance_of(draws)
    diagonal = jnp.diag(jnp.diag(covariance))
    shrunk = (num * covariance + dim * diagonal / 2) / (num + dim)
    return carry._replace(
        walk_factor=jnp.linalg.cholesky(shrunk + TINY * jnp.eye(dim, dtype=dtype)),
        log_walk_scale=first_walk_scale(dim, dtype),
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

    transport = fit_transport(draws, draw_logdensity, points, point_logdensity)
    whitened, log_dets = jax.vmap(partial(inverse, transport))(points)
    _, draw_log_dets = jax.vmap(partial(inverse, transport))(draws)
    core = jnp.nanquantile(draw_logdensity + draw_log_dets, 0.02)
    fitted = regression.fit(rng_key, whitened, point_logdensity + log_dets, core)

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
) -> Transport:
    """Fit the map: to draws alone where there are few coordinates, else an affine one.

    The affine one has the moments of the draws, improved by the curvature of the log density where
    a quadratic regression on the points finds one.
    """
    dim = draws.shape[1]
    if dim <= MAX_MAP_DIM:
        return fit(draws)
    covariance = covariance_of(draws)
    # Shrunk, as the draws of a walk may leave out directions.
    shrunk = 0.9 * covariance + 0.1 * jnp.diag(jnp.diag(covariance) + TINY)
    loc, factor = jnp.mean(draws, axis=0), jnp.linalg.cholesky(shrunk)
    core = jnp.nanquantile(draw_logdensity, 0.02)
    return affine(*regression.curvature(loc, factor, points, point_logdensity, core))


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


def first_walk_scale(dim: int, dtype: Any) -> jax.Array:
    """Return the log of the best size for a Gaussian whose covariance is known."""
    return jnp.log(jnp.asarray(2.4 / dim**0.5, dtype))


def no_totals(dtype: Any) -> Totals:
    """Return sums over no step."""
    return Totals(*(jnp.zeros(WALK + 1, dtype) for _ in Totals._fields))


def _step_factor(totals):
    """Tune the inner step size by the acceptance rate on the surrogate."""
    rate = totals.inner[0] / jnp.maximum(totals.count[0], 1)
    return jnp.select([rate < 0.5, rate < 0.75, rate > 0.97], [0.5, 0.7, 1.3], 1.0)
