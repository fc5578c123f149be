r"""MALA whose drift is any estimator of the gradient: exact whatever the estimate is worth.

A proposal takes the estimate :math:`g(x; u)` with a key u drawn independently of the position, and
the Metropolis test uses the exact log density, so that the estimate changes how fast the chain
mixes and never what it converges to.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax
from blackjax.base import SamplingAlgorithm
from blackjax.mcmc.mala import MALAState
from blackjax.mcmc.proposal import static_binomial_sampling
from blackjax.util import generate_gaussian_noise

from probbp.checks import check_choice, check_estimator, check_rng_key
from probbp.samplers import checks
from probbp.samplers.algorithm import Algorithm, top_level_api
from probbp.samplers.whitening import IDENTITY, Whitening, whitening
from probbp.types import Estimator, LogDensity, Tree, keyed, ways_out

KeyPolicy = Literal["carried", "refreshed", "shared"]
KEY_POLICIES = get_args(KeyPolicy)


class MALAInfo(NamedTuple):
    """What happened in a step.

    Attributes:
        acceptance_rate: probability with which the proposal was accepted.
        is_accepted: whether it was.
        is_divergent: whether the log density or the estimate at the proposal was NaN or infinite.
            The log density: then the proposal is rejected. The estimate: it counts as zero, which
            is as exact as any other, and wants looking into.
    """

    acceptance_rate: jax.Array
    is_accepted: jax.Array
    is_divergent: jax.Array


def init(
    position: Tree,
    logdensity_fn: LogDensity,
    rng_key: jax.Array | None = None,
    *,
    inverse_mass_matrix: Any = None,
    estimator: Estimator | None = None,
) -> MALAState:
    """Return the state at a position.

    Args:
        position: where the chain starts, a pytree of floating-point arrays.
        logdensity_fn: log density up to a constant.
        rng_key: key of the first estimate. Where a host passes none, it is hashed from the bits of
            the position, so that chains that start apart get estimates that are apart.
        inverse_mass_matrix: the scale in whose coordinates the estimate is taken.
        estimator: as in the kernel.

    Raises:
        TypeError: for integer positions, and a log density that is no scalar.
        ValueError: for a log density that is not finite at the position.
    """
    if rng_key is not None:
        check_rng_key("rng_key", rng_key)
    checks.check_position(position)
    position = jax.tree.map(jnp.asarray, position)
    white = whitening(inverse_mass_matrix, position)
    rng_key = key_of(position) if rng_key is None else rng_key
    value_and_grad = white_value_and_grad(estimator, checks.scalar(logdensity_fn), white)
    logdensity, drift = value_and_grad(rng_key, position)
    checks.check_start(logdensity)
    checks.check_key(logdensity_fn, position)
    return MALAState(position, logdensity, white.push(drift))


def build_kernel() -> Callable:
    r"""Build a MALA kernel with BlackJAX's signature.

    In coordinates in which the inverse mass matrix is the identity, with the estimate g,

    .. math::
        y = x + h\, g(x; u) + \sqrt{2h}\, z, \qquad
        \log r = \log\pi(y) - \log\pi(x) - \frac{|x - y - h g(y; w)|^2}{4h} + \frac{|z|^2}{2}.

    `key_policy` says where the two keys come from. All three leave the density invariant:

    - `"carried"`: u stays with the position, and its estimate in the state, until a proposal is
      accepted; w is fresh. One evaluation of the estimator a step.
    - `"refreshed"`: u and w are both fresh. Two evaluations a step.
    - `"shared"`: w = u, fresh in each step. Two evaluations a step.

    Returns:
        `kernel(rng_key, state, logdensity_fn, step_size, inverse_mass_matrix=None, *,
        estimator=None, key_policy="carried")`, which returns the new `MALAState` and a `MALAInfo`.
    """

    def kernel(
        rng_key: jax.Array,
        state: MALAState,
        logdensity_fn: LogDensity,
        step_size: float,
        inverse_mass_matrix: Any = None,
        *,
        estimator: Estimator | None = None,
        key_policy: KeyPolicy = "carried",
    ) -> tuple[MALAState, MALAInfo]:
        check_choice("key_policy", key_policy, KEY_POLICIES)
        white = whitening(inverse_mass_matrix, state.position)
        value_and_grad = white_value_and_grad(estimator, logdensity_fn, white)

        def local_fn(key, position):
            logdensity, grad = value_and_grad(key, position)
            return Local(logdensity, grad, jnp.ones_like(logdensity))

        return langevin_step(rng_key, state, local_fn, step_size, white, key_policy)

    return kernel


def as_top_level_api(
    logdensity_fn: LogDensity,
    step_size: float,
    inverse_mass_matrix: Any = None,
    *,
    estimator: Estimator | None = None,
    key_policy: KeyPolicy = "carried",
) -> SamplingAlgorithm:
    """MALA on any estimator of the gradient.

    Exact: the distribution that the chain leaves invariant, for any estimator, biased or wrong, as
    long as its value is exact and its key does not depend on the position. Estimated: the drift,
    hence the speed. With the default estimator it is `blackjax.mala`, draw for draw.

    Args:
        logdensity_fn: log density up to a constant; a position to a scalar.
        step_size: BlackJAX's h: drift h * gradient, noise sqrt(2 h) (other texts write
            h = epsilon^2 / 2).
        inverse_mass_matrix: `None` for the identity, or (d,), (d, d) or low rank, as in BlackJAX.
        estimator: an `Estimator`, e.g. `probbp.estimators.forward(num_tangents=4)`; reverse mode by
            default. Given an inverse mass matrix it acts in the coordinates of that, with the
            position as origin, so that random tangents follow the learnt scale.
        key_policy: `"carried"` (one evaluation a step), `"refreshed"` or `"shared"` (two).

    Returns:
        A `blackjax.SamplingAlgorithm`.

    Raises:
        ValueError: for a step size that is not positive and finite, or an unknown policy.
        TypeError: for an estimator that is none.

    Example:
        >>> import jax, jax.numpy as jnp, probbp
        >>> mala = probbp.mala(lambda x: -0.5 * jnp.sum(x**2), step_size=0.5)
        >>> state = mala.init(jnp.zeros(2))
        >>> state, info = jax.jit(mala.step)(jax.random.key(0), state)

    Reference:
        Roberts & Tweedie, 1996 (MALA). That a keyed estimate keeps it exact: draw the new key with
        the proposal; the densities of the keys cancel in the ratio (cf. Storvik, 2011;
        Neklyudov et al., 2020, arXiv:2006.16653).
    """
    check_choice("key_policy", key_policy, KEY_POLICIES)
    if estimator is not None:
        check_estimator(estimator)
    return top_level_api(
        build_kernel,
        partial(init, estimator=estimator),
        logdensity_fn,
        step_size,
        inverse_mass_matrix,
        estimator=estimator,
        key_policy=key_policy,
    )


def target_acceptance_rate(**options) -> float:
    """Return the acceptance rate to tune for, the best in many dimensions."""
    del options
    return 0.574


mala = Algorithm(as_top_level_api, init, build_kernel, target_acceptance_rate)


class Local(NamedTuple):
    """What a Langevin proposal knows of a point, in white coordinates.

    Attributes:
        logdensity: the exact log density.
        grad: the estimate of its gradient, a pytree.
        precision: the scalar that divides the drift and the variance of the noise.
    """

    logdensity: jax.Array
    grad: Tree
    precision: jax.Array


def langevin_step(
    rng_key: jax.Array,
    state: MALAState,
    local_fn: Callable[[jax.Array, Tree], Local],
    step_size: float,
    white: Whitening,
    key_policy: KeyPolicy,
    drift_scale: float = 1.0,
) -> tuple[MALAState, MALAInfo]:
    """Move all coordinates by a keyed drift and Gaussian noise, and accept or reject."""
    # The first two are blackjax.mala's, so that the draws are the same.
    key_noise, key_accept, key_here, key_there = jax.random.split(rng_key, 4)
    if key_policy == "carried":
        logdensity, grad = state.logdensity, white.pull(state.logdensity_grad)
        here = Local(logdensity, grad, jnp.ones_like(logdensity))
    else:
        here = local_fn(key_there if key_policy == "shared" else key_here, state.position)
    grad, _ = finite_or_zero(here.grad)
    here = here._replace(grad=grad)

    # BlackJAX's default sigma, a Python float, would promote single precision where x64 is on.
    dtype = jnp.result_type(*jax.tree.leaves(state.position))
    noise = generate_gaussian_noise(key_noise, state.position, sigma=jnp.ones((), dtype))
    h = step_size / here.precision
    move = jax.tree.map(
        lambda g, z: (h * drift_scale * g + jnp.sqrt(2 * h) * z).astype(z.dtype), here.grad, noise
    )
    position = optax.tree.add(state.position, white.unwhiten(move))
    there = local_fn(key_there, position)
    grad, is_finite = finite_or_zero(there.grad)
    there = there._replace(grad=grad)

    h_back = step_size / there.precision
    residual = jax.tree.map(lambda m, g: m + h_back * drift_scale * g, move, there.grad)
    num_params = optax.tree.size(move)
    log_ratio = (
        there.logdensity
        - here.logdensity
        - _squared_norm(residual) / (4 * h_back)
        + _squared_norm(noise) / 2
        + num_params / 2 * (jnp.log(there.precision) - jnp.log(here.precision))
    )
    proposal = MALAState(position, there.logdensity, white.push(there.grad))
    return accept_or_reject(key_accept, log_ratio, state, proposal, is_finite)


def _squared_norm(tree: Tree) -> jax.Array:
    """Return the sum of squares, which half precision would round by more than one."""
    leaves = jax.tree.leaves(tree)
    wide = [leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32)) for leaf in leaves]
    return optax.tree.norm(wide, squared=True)


def finite_or_zero(estimate: Tree) -> tuple[Tree, jax.Array]:
    """Return an estimate, or zeros where any of it is NaN or infinite, and whether none is.

    Given its key that is a fixed field as before, which a Metropolis test corrects. A chain that
    carries its estimate would otherwise stand still for good at the first that fails.
    """
    is_finite = jax.tree.reduce(
        jnp.logical_and, jax.tree.map(lambda leaf: jnp.all(jnp.isfinite(leaf)), estimate)
    )
    zeroed = jax.tree.map(lambda leaf: jnp.where(is_finite, leaf, jnp.zeros_like(leaf)), estimate)
    return zeroed, is_finite


def accept_or_reject(
    rng_key: jax.Array,
    log_ratio: jax.Array,
    state: NamedTuple,
    proposal: NamedTuple,
    is_finite: jax.Array,
) -> tuple[Any, MALAInfo]:
    """Take the proposal with probability min(1, exp(log_ratio)); never where that is no number.

    `is_finite` says whether the estimate at the proposal was.
    """
    is_rejected = ~jnp.isfinite(log_ratio)
    is_divergent = is_rejected | ~is_finite
    log_ratio = jnp.where(is_rejected, -jnp.inf, log_ratio)
    state, (is_accepted, acceptance_rate, _) = static_binomial_sampling(
        rng_key, log_ratio, state, proposal
    )
    return state, MALAInfo(acceptance_rate, is_accepted, is_divergent)


def white_value_and_grad(
    estimator: Estimator | None, logdensity_fn: LogDensity, white: Whitening
) -> Callable:
    """Return the keyed value and gradient of the log density with respect to white coordinates."""

    def value_and_grad(rng_key, position):
        def displaced_fn(displacement, rng_key=rng_key):
            moved = optax.tree.add(position, white.unwhiten(displacement))
            return keyed(logdensity_fn, rng_key)(moved)

        if white is IDENTITY:
            fun, point = logdensity_fn, position
        else:
            fun, point = displaced_fn, optax.tree.zeros_like(position)
        with ways_out():
            if estimator is None:
                return jax.value_and_grad(keyed(fun, rng_key))(point)
            return estimator(fun)(rng_key, point)

    return value_and_grad


def key_of(position: Tree) -> jax.Array:
    """Hash the bits of a position to a key."""
    leaves = [jnp.ravel(leaf).astype(jnp.float32) for leaf in jax.tree.leaves(position)]
    bits = jax.lax.bitcast_convert_type(jnp.concatenate(leaves), jnp.uint32)
    odd = 2 * jnp.arange(bits.size, dtype=jnp.uint32) + 1
    return jax.random.key(jnp.sum(bits * odd * jnp.uint32(2654435761), dtype=jnp.uint32))
