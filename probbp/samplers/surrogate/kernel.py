r"""A sampler that needs one log density per draw and no gradient: the surrogate transition.

A transport map :math:`x = T(z)` makes the target nearly Gaussian, a surrogate :math:`g(z)` predicts
its log density. Several Hamiltonian transitions on the surrogate, which cost no evaluation of the
target, make a proposal, and one Metropolis test on the exact log density corrects what the
surrogate gets wrong. `warmup` learns both from values of the log density.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from blackjax.base import SamplingAlgorithm, build_sampling_algorithm
from blackjax.mcmc.proposal import static_binomial_sampling
from jax.core import Tracer
from jax.flatten_util import ravel_pytree

from probbp.checks import check_count, check_function
from probbp.samplers import checks
from probbp.samplers.surrogate.inner import (
    Point,
    inner_transitions,
    point_at,
    predictor,
    surrogate_logdensity,
)
from probbp.samplers.surrogate.transport import forward, inverse
from probbp.types import Estimator, LogDensity, Tree, keyed

SCALES = (1.0, 0.4, 0.15)
"""Factors of the inner step size; the first kind of move is global, the others are local."""

WALK = len(SCALES)
"""The kind of a random walk, after those of the surrogate."""

WEIGHTS = (0.65, 0.1, 0.1, 0.15)
"""Probabilities of the kinds: global, two local ones, random walk."""


class SurrogateState(NamedTuple):
    """Where a chain is.

    Attributes:
        position: x, a pytree.
        logdensity: f(x), of the position alone.
        whitened: z with x = T(z), flat.
        log_det: log |det T'(z)|.
    """

    position: Tree
    logdensity: jax.Array
    whitened: jax.Array
    log_det: jax.Array


class SurrogateInfo(NamedTuple):
    """What happened in a step.

    Attributes:
        acceptance_rate: probability with which the proposal was accepted.
        is_accepted: whether it was.
        is_divergent: whether the log ratio was NaN, or the log density there infinite; then the
            proposal is rejected. A log density of minus infinity is a plain rejection.
        kind: 0 for a global move, 1 and 2 for local ones, 3 for a random walk.
        inner_acceptance_rate: mean over the transitions on the surrogate; it does not depend on
            the target. A random walk reports that of the move which was not used.
        log_weight: log of target over surrogate, f(T(z)) + log |det T'(z)| - g(z), at the state
            that the step leads to. Its spread over a run says how good the surrogate is.
        proposal_log_weight: the same at the proposal.
        proposal: the proposal, accepted or not.
    """

    acceptance_rate: jax.Array
    is_accepted: jax.Array
    is_divergent: jax.Array
    kind: jax.Array
    inner_acceptance_rate: jax.Array
    log_weight: jax.Array
    proposal_log_weight: jax.Array
    proposal: SurrogateState


def init(
    position: Tree,
    logdensity_fn: LogDensity,
    rng_key: jax.Array | None = None,
    *,
    transport: Any = None,
) -> SurrogateState:
    """Return the state at a position.

    Args:
        position: where the chain starts, a pytree of floating-point arrays.
        logdensity_fn: log density up to a constant.
        rng_key: not used.
        transport: the map of the kernel. They must be the same: a state holds the whitened point.

    Raises:
        TypeError: for integer positions, all of half precision, and a log density that is no
            scalar.
        ValueError: for a log density that is not finite at the position.
    """
    checks.check_position(position)
    position = jax.tree.map(jnp.asarray, position)
    _check_precision(position)
    logdensity = keyed(checks.scalar(logdensity_fn), jax.random.key(0))(position)
    checks.check_start(logdensity)
    checks.check_key(logdensity_fn, position)
    return whiten(transport, position, logdensity)


def build_kernel() -> Callable:
    r"""Build the kernel with BlackJAX's signature.

    With :math:`\ell(z) = f(T(z)) + \log|\det T'(z)|`, a step

    1. draws a kind from `weights` and an inner step size :math:`h' = h \cdot s \cdot U(0.7, 1)`,
       s = 1, 0.4 or 0.15, neither of which depends on the state;
    2. for a walk proposes :math:`z' = z + 2 d^{-1/2} N(0, I)`, with
       :math:`\log r = \ell(z') - \ell(z)`; otherwise :math:`z'` is the result of
       `num_inner_transitions` of Hamiltonian Monte Carlo for :math:`e^{g}`, each with a momentum
       and a Metropolis test of its own, with
       :math:`\log r = (\ell - g)(z') - (\ell - g)(z)`;
    3. evaluates the log density once, and accepts with :math:`\min(1, r)`.

    Exact: the invariant distribution. The inner transitions are reversible with respect to
    :math:`e^{g}`, and so are powers of one such kernel; hence the step is reversible with respect
    to :math:`e^{\ell}`, for any g and any bijection T.

    Returns:
        `kernel(rng_key, state, logdensity_fn, step_size=0.45, transport=None, surrogate=None,
        weights=WEIGHTS, *, num_inner_transitions=2, num_inner_steps=4)`, which returns the new
        `SurrogateState` and a `SurrogateInfo`.
    """

    def kernel(
        rng_key: jax.Array,
        state: SurrogateState,
        logdensity_fn: LogDensity,
        step_size: Any = 0.45,
        transport: Any = None,
        surrogate: Any = None,
        weights: Any = WEIGHTS,
        *,
        num_inner_transitions: int = 2,
        num_inner_steps: int = 4,
    ) -> tuple[SurrogateState, SurrogateInfo]:
        dtype = state.whitened.dtype
        transport, surrogate = _as_floats(dtype, (transport, surrogate))
        key_kind, key_size, key_inner, key_walk, key_accept = jax.random.split(rng_key, 5)

        kind = jax.random.categorical(key_kind, jnp.log(jnp.asarray(weights, dtype)))
        jitter = jax.random.uniform(key_size, (), dtype, 0.7, 1.0)
        factors = jnp.asarray((*SCALES, 1.0), dtype)
        inner_step_size = jnp.asarray(step_size, dtype) * factors[kind] * jitter

        predict = predictor(surrogate)
        here = point_at(predict, state.whitened)
        moved, inner_acceptance_rate = inner_transitions(
            key_inner, predict, here, inner_step_size, num_inner_transitions, num_inner_steps
        )
        walked = point_at(predict, random_walk(key_walk, state.whitened))
        there = jax.tree.map(partial(jnp.where, kind == WALK), walked, moved)

        proposal = evaluate(logdensity_fn, transport, state.position, there.whitened)
        log_weight = log_density(state) - surrogate_logdensity(here)
        proposal_log_weight = log_density(proposal) - surrogate_logdensity(there)
        ratio = log_ratio(kind, state, proposal, here, there)
        is_divergent = jnp.isnan(ratio) | jnp.isposinf(proposal.logdensity)
        ratio = jnp.where(is_divergent, -jnp.inf, ratio)
        new, (is_accepted, acceptance_rate, _) = static_binomial_sampling(
            key_accept, ratio, state, proposal
        )
        info = SurrogateInfo(
            acceptance_rate,
            is_accepted,
            is_divergent,
            kind,
            inner_acceptance_rate,
            jnp.where(is_accepted, proposal_log_weight, log_weight),
            proposal_log_weight,
            proposal,
        )
        return new, info

    return kernel


def as_top_level_api(
    logdensity_fn: LogDensity,
    step_size: Any = 0.45,
    transport: Any = None,
    surrogate: Any = None,
    weights: Any = WEIGHTS,
    *,
    num_inner_transitions: int = 2,
    num_inner_steps: int = 4,
    estimator: Estimator | None = None,
) -> SamplingAlgorithm:
    """Metropolis-Hastings whose proposal is a chain on a learned surrogate.

    Exact: the distribution that the chain leaves invariant, for any map and any surrogate.
    Estimated: both, hence the speed. Cost: one log density a step, no gradient, and
    `num_inner_transitions * num_inner_steps` gradients of the surrogate, a polynomial. It pays
    where a log density costs more than those, and where reverse mode is not available or costs
    too much; a gradient of the target is not used.

    Args:
        logdensity_fn: log density up to a constant; a position to a scalar.
        step_size: the angle by which the inner integrator rotates, before it is scaled and
            jittered; at most pi / 2.
        transport: a `Transport`, from warm-up; `None` is the identity.
        surrogate: a `Polynomial`, from warm-up; `None` is the standard Gaussian alone.
        weights: (4,) probabilities of the kinds: global, two local ones, random walk. Keep the
            last above zero: the walk reaches what the surrogate does not know.
        num_inner_transitions: Hamiltonian transitions on the surrogate in a step.
        num_inner_steps: integrator steps of each.
        estimator: of the gradient, such as `probbp.estimators.reverse()`, for the warm-up of
            `probbp.sample` and `Kernel`; a step uses none. Above some 20 dimensions, where values
            alone say too little: ridge functions are then fitted to values and gradients.

    Returns:
        A `blackjax.SamplingAlgorithm`.

    Raises:
        ValueError: for a step size that is not positive and finite, or weights that are not four
            probabilities.

    Example:
        >>> import jax, jax.numpy as jnp, probbp
        >>> sampler = probbp.surrogate(lambda x: -0.5 * jnp.sum(x**2))
        >>> state = sampler.init(jnp.zeros(2))
        >>> state, info = jax.jit(sampler.step)(jax.random.key(0), state)

    Reference:
        Liu, 2001, section 9.4.3 (surrogate transitions); Christen & Fox, 2005 (delayed
        acceptance); Zhang, Shahbaba & Zhao, 2017 (Hamiltonian Monte Carlo on surrogates); Parno &
        Marzouk, 2018 (transport maps).
    """
    del estimator
    check_function("logdensity_fn", logdensity_fn, checks.A_LOG_DENSITY)
    checks.check_step_size(step_size)
    check_count("num_inner_transitions", num_inner_transitions)
    check_count("num_inner_steps", num_inner_steps)
    _check_weights(weights)
    return build_sampling_algorithm(
        partial(
            build_kernel(),
            num_inner_transitions=num_inner_transitions,
            num_inner_steps=num_inner_steps,
        ),
        lambda position, logdensity_fn: init(position, logdensity_fn, transport=transport),
        logdensity_fn,
        kernel_args=(step_size, transport, surrogate, weights),
    )


def whiten(transport: Any, position: Tree, logdensity: jax.Array) -> SurrogateState:
    """Return the state at a position whose log density is known; no evaluation."""
    flat, _ = ravel_pytree(position)
    whitened, log_det = inverse(_as_floats(flat.dtype, transport), flat)
    return SurrogateState(position, logdensity, whitened, log_det)


def log_density(state: SurrogateState) -> jax.Array:
    """Return the log density of the whitened point."""
    return state.logdensity + state.log_det


def evaluate(
    logdensity_fn: LogDensity, transport: Any, like: Tree, whitened: jax.Array
) -> SurrogateState:
    """Return the state at a whitened point: the one evaluation of the log density in a step."""
    _, unravel = ravel_pytree(like)
    flat, log_det = forward(transport, whitened)
    position = unravel(flat)
    return SurrogateState(position, logdensity_fn(position), whitened, log_det)


def log_ratio(
    kind: jax.Array, state: SurrogateState, proposal: SurrogateState, here: Point, there: Point
) -> jax.Array:
    """Return the log ratio of the Metropolis test.

    A walk is symmetric; the other moves are reversible with respect to the surrogate, whose ratio
    is therefore taken out.
    """
    change = surrogate_logdensity(there) - surrogate_logdensity(here)
    return log_density(proposal) - log_density(state) - jnp.where(kind == WALK, 0, change)


def random_walk(rng_key: jax.Array, whitened: jax.Array) -> jax.Array:
    """Take a Gaussian step of the size that is best for a Gaussian of many dimensions."""
    noise = jax.random.normal(rng_key, whitened.shape, whitened.dtype)
    return whitened + 2 / whitened.size**0.5 * noise


def _as_floats(dtype: Any, tree: Tree) -> Tree:
    """Cast what is floating; a map that was learned in double precision serves in single."""

    def cast(leaf):
        leaf = jnp.asarray(leaf)
        return leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    return jax.tree.map(cast, tree)


def _check_precision(position: Tree) -> None:
    """Require a leaf of single precision at least: the whitened point has the widest leaf's."""
    dtype = jnp.result_type(*jax.tree.leaves(position))
    if jnp.finfo(dtype).bits < 32:
        raise TypeError(
            f"probbp.surrogate computes its map and its surrogate in the precision of the position,"
            f" and {dtype} is too coarse: cast the position (`x.astype(jnp.float32)`)."
        )


def _check_weights(weights: Any) -> None:
    """Require four probabilities, unless they are being traced."""
    shape = np.shape(weights)
    if shape != (WALK + 1,):
        raise ValueError(
            f"weights must be {WALK + 1} probabilities (global, two local moves, random walk), got "
            f"shape {shape}."
        )
    if isinstance(weights, Tracer):
        return
    values = np.asarray(weights, float)
    if not (np.all(values >= 0) and np.isclose(values.sum(), 1, atol=1e-4)):
        raise ValueError(
            f"weights must be probabilities that sum to one, got {values}. The last is that of the "
            "random walk, which reaches what the surrogate does not know: keep it above zero."
        )
