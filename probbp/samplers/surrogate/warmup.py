r"""Warm-up of the surrogate transition: from values of the log density alone, all chains at once.

First an adaptive random walk finds the posterior. Then, in rounds, the map is fitted to the chains'
states, the surrogate to every value of the log density so far, and both are used to sample on.
After the last round all of it is frozen. Every chain learns from every other.

A host loop drives it: `run_stage` over `stages(num_steps)`, each of which is short; what it carries
is one pytree of fixed shapes.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from probbp.checks import check_rng_key
from probbp.samplers.surrogate import regression
from probbp.samplers.surrogate.kernel import WALK, SurrogateState, build_kernel, whiten
from probbp.samplers.surrogate.learning import (
    LARGEST_STEP_SIZE,
    MAX_MAP_DIM,
    History,
    Parameters,
    Report,
    Totals,
    WarmupState,
    first_walk_scale,
    freeze,
    no_totals,
    refit,
    relocate,
    rescale,
)
from probbp.samplers.surrogate.polynomial import from_coefficients, num_monomials
from probbp.samplers.surrogate.ridges import no_ridges
from probbp.samplers.surrogate.transport import MAX_DRIVERS, identity
from probbp.types import Estimator, LogDensity, Tree

WALKS, ROUNDS = (1, 2, 4, 8), (2, 4, 8)
"""Stretches between fits; all are of the same length, so that few programs are compiled."""

MAX_POINTS = 9000
"""Points that the surrogate is fitted to, the latest."""

ROUND_WEIGHTS = (0.5, 0.15, 0.15, 0.2)

MAX_DIM = 1000
"""Of more parameters a dense map, (d, d), says too little for what it costs."""


class Stage(NamedTuple):
    """A piece of warm-up.

    Attributes:
        kind: "walk" and "round" take steps; "rescale", "refit" and "freeze" learn.
        num_steps: of each chain; zero where it learns.
    """

    kind: str
    num_steps: int


def stages(num_steps: int) -> list[Stage]:
    """Return the stages of a warm-up of `num_steps` steps per chain.

    Half of the steps are random walks, half are rounds; between fits both double in length. Steps
    come in stretches of a 29th of them all. Some thousands of steps of all chains together are
    needed for a surrogate of degree four in ten dimensions.
    """
    length, rest = divmod(num_steps, sum(WALKS) + sum(ROUNDS))
    out = []
    for count in WALKS:
        out += [*[Stage("walk", length)] * count, Stage("rescale", 0)]
    out[-1] = Stage("refit", 0)
    for count in ROUNDS:
        out += [*[Stage("round", length)] * count, Stage("refit", 0)]
    if rest:
        out.insert(-1, Stage("round", rest))
    return [stage for stage in (*out, Stage("freeze", 0)) if stage.num_steps or _learns(stage)]


def init(
    logdensity_fn: LogDensity,
    starts: Tree,
    num_steps: int,
    batch_size: int | None = None,
    estimator: Estimator | None = None,
) -> WarmupState:
    """Return the state at the start.

    Args:
        logdensity_fn: log density up to a constant.
        starts: positions of the chains, a pytree with the chains as leading axis.
        num_steps: of each chain; the history holds as many as the fits use.
        batch_size: how many log densities are evaluated at once; all by default.
        estimator: of the gradient, see `adapt`. The first steps go without.

    Raises:
        ValueError: for more than `MAX_DIM` parameters.
    """
    num_params = sum(leaf[0].size for leaf in jax.tree.leaves(starts))
    if num_params > MAX_DIM:
        raise ValueError(
            f"probbp.surrogate learns a dense map of all parameters, and {num_params} are too many "
            f"(at most {MAX_DIM}): take probbp.mala or probbp.pc_line_fmala."
        )
    logdensity = _over_chains(logdensity_fn, batch_size)(starts)
    states = jax.vmap(partial(whiten, None))(starts, logdensity)
    num_chains, dim = states.whitened.shape
    dtype = jnp.result_type(float)
    num_kept = min(num_steps, -(-MAX_POINTS // num_chains))
    blank = jnp.zeros((num_kept, num_chains, dim), dtype)
    none = jnp.full((num_kept, num_chains), -jnp.inf, dtype)
    parameters = Parameters(
        jnp.asarray(LARGEST_STEP_SIZE, dtype),
        _blank_transport(dim, dtype),
        _blank_surrogate(dim, num_kept * num_chains, dtype, estimator is not None),
        jnp.asarray(ROUND_WEIGHTS, dtype),
    )
    grads = () if estimator is None else (blank, blank)
    zero = jnp.zeros((), int)
    nan = jnp.full((), jnp.nan, dtype)
    unknown = jnp.full(WALK + 1, jnp.nan, dtype)
    report = Report(jnp.asarray(num_chains), zero, zero, nan, zero, zero, unknown, unknown, nan)
    return WarmupState(
        states,
        parameters,
        jnp.zeros((num_chains, dim), dtype),
        0.1 * jnp.eye(dim, dtype=dtype),
        first_walk_scale(dim, dtype, estimator is not None),
        History(blank, none, blank, none, *grads),
        no_totals(dtype),
        zero,
        zero,
        report,
    )


def run_stage(
    rng_key: jax.Array,
    logdensity_fn: LogDensity,
    carry: WarmupState,
    stage: Stage,
    estimator: Estimator | None = None,
) -> WarmupState:
    """Run a stage; to be compiled with `logdensity_fn`, `stage` and `estimator` static.

    Args:
        rng_key: key of the stage.
        logdensity_fn: log density up to a constant.
        carry: from the stage before.
        stage: one of `stages`.
        estimator: the one of `init`.

    Cost: one evaluation per step and chain, none where it learns.
    """
    if not _learns(stage):
        steps = stage.kind, stage.num_steps, carry
        return run_steps(rng_key, logdensity_fn, *steps, estimator=estimator)[0]
    if stage.kind == "rescale":
        return rescale(relocate(rng_key, carry))
    if stage.kind == "freeze":
        return freeze(carry)
    key_relocate, key_fit = jax.random.split(rng_key)
    return refit(key_fit, relocate(key_relocate, carry))


def run_steps(
    rng_key: jax.Array,
    logdensity_fn: LogDensity,
    kind: str,
    num_steps: int,
    carry: WarmupState,
    batch_size: int | None = None,
    estimator: Estimator | None = None,
) -> tuple[WarmupState, jax.Array]:
    """Take steps of a "walk" or a "round"; return also their acceptance rates, (chains, steps)."""
    steps = {"walk": _walk, "round": _round}[kind]
    return steps(rng_key, logdensity_fn, carry, num_steps, batch_size, estimator)


def adapt(
    rng_key: jax.Array,
    logdensity_fn: LogDensity,
    starts: Tree,
    num_steps: int = 2900,
    estimator: Estimator | None = None,
) -> tuple[SurrogateState, Parameters, Report]:
    """Run the whole warm-up.

    Exact: nothing yet; the draws of warm-up are not of the posterior. The frozen kernel leaves the
    posterior invariant, but a region that no chain saw in warm-up, such as the neck of a funnel, it
    enters seldom and leaves late. R-hat does not show it: all chains share what was learned. A
    longer warm-up helps.

    Cost: `num_steps + 1` evaluations per chain, and four fits of map and surrogate. With an
    estimator, `num_steps` of it per chain, and evaluations in the latter half of the steps.

    Args:
        rng_key: key of the run.
        logdensity_fn: log density up to a constant.
        starts: positions of the chains, a pytree with the chains as leading axis.
        num_steps: of each chain.
        estimator: of the gradient, for many dimensions. With one the walks are Langevin steps, and
            the surrogate is a sum of ridge functions, fitted to values and gradients.

    Returns:
        States, whitened by the map that was learned; the parameters of the kernel
        (`build_kernel()(rng_key, state, logdensity_fn, *parameters)`); a report.

    Example:
        >>> import jax, jax.numpy as jnp, probbp
        >>> from probbp.samplers.surrogate.warmup import adapt
        >>> logdensity_fn = lambda x: -0.5 * jnp.sum(x**2)
        >>> starts = jax.random.normal(jax.random.key(0), (4, 3))
        >>> states, parameters, report = adapt(jax.random.key(1), logdensity_fn, starts, 200)
        >>> sampler = probbp.surrogate(logdensity_fn, **parameters._asdict())
    """
    check_rng_key("rng_key", rng_key)
    run = jax.jit(run_stage, static_argnums=(1, 3, 4), donate_argnums=2)
    first = partial(init, logdensity_fn, num_steps=num_steps, estimator=estimator)
    carry = jax.jit(first)(starts)
    for i, stage in enumerate(stages(num_steps)):
        carry = run(jax.random.fold_in(rng_key, i), logdensity_fn, carry, stage, estimator)
    return carry.states, carry.parameters, carry.report


def _walk(rng_key, logdensity_fn, carry, num_steps, batch_size, estimator):
    """Take steps of an adaptive walk, whose size all chains share: random, or guided by gradients.

    A guided one is a Langevin proposal; a gradient of zero makes it a random walk.
    """
    flat, unravel = _flat(carry.states.position)
    num_chains = len(flat)
    flat_logdensity = lambda x: logdensity_fn(unravel(x))
    if estimator is None:
        values = _over_chains(flat_logdensity, batch_size)
        values_and_grads = lambda keys, x: (values(x), jnp.zeros(x.shape, carry.grads.dtype))
    else:
        values_and_grads = _over_chains(estimator(flat_logdensity), batch_size)
    best_rate = 0.25 if estimator is None else 0.57

    def body(loop, inputs):
        x, fx, gx, log_scale = loop
        key, i = inputs
        key_noise, key_accept, key_grad = jax.random.split(key, 3)
        noise = jax.random.normal(key_noise, x.shape, carry.walk_factor.dtype)
        size = jnp.exp(log_scale)
        move = size * noise + size**2 / 2 * gx @ carry.walk_factor
        y = (x + move @ carry.walk_factor.T).astype(x.dtype)
        fy, gy = values_and_grads(jax.random.split(key_grad, num_chains), y)
        noise_back = noise + size / 2 * (gx + gy) @ carry.walk_factor
        log_ratio = fy - fx + jnp.sum(noise**2 - noise_back**2, axis=1) / 2
        log_ratio = jnp.where(jnp.isnan(log_ratio), -jnp.inf, log_ratio)
        is_accepted = jnp.log(jax.random.uniform(key_accept, (num_chains,))) < log_ratio
        x, gx = (jnp.where(is_accepted[:, None], new, old) for new, old in ((y, x), (gy, gx)))
        fx = jnp.where(is_accepted, fy, fx)
        rates = jnp.exp(jnp.minimum(log_ratio, 0))
        gain = 2 / (carry.num_since + i + 3.0) ** 0.6
        log_scale = (log_scale + gain * (jnp.mean(rates) - best_rate)).astype(log_scale.dtype)
        grads = () if estimator is None else (gy, gx)
        return (x, fx, gx.astype(carry.grads.dtype), log_scale), (
            History(y, fy, x, fx, *grads),
            rates,
        )

    loop = flat, carry.states.logdensity, carry.grads, carry.log_walk_scale
    inputs = jax.random.split(rng_key, num_steps), jnp.arange(num_steps)
    (flat, logdensity, grads, log_scale), (seen, rates) = jax.lax.scan(body, loop, inputs)
    states = jax.vmap(partial(whiten, None))(jax.vmap(unravel)(flat), logdensity)
    counts = (1, 0) if estimator is None else (0, 1)
    carry = _advance(carry, states, seen, num_steps, *counts)
    return carry._replace(log_walk_scale=log_scale, grads=grads), rates.T


def _round(rng_key, logdensity_fn, carry, num_steps, batch_size, estimator):
    """Take steps of the kernel as it is learned so far."""
    kernel = build_kernel()
    _, unravel = _flat(carry.states.position)
    flatten = jax.vmap(lambda tree: ravel_pytree(tree)[0])
    num_chains = len(carry.states.logdensity)

    def body(loop, key):
        states, grads, totals = loop
        key_step, key_grad = jax.random.split(key)
        step = lambda key, state: kernel(key, state, logdensity_fn, *carry.parameters)
        keys = jax.random.split(key_step, num_chains)
        new, info = _over_chains(step, batch_size)(keys, states)
        proposed = flatten(info.proposal.position)
        seen = proposed, info.proposal.logdensity, flatten(new.position), new.logdensity
        if estimator is not None:
            value_and_grad = estimator(lambda x: logdensity_fn(unravel(x)))
            keys = jax.random.split(key_grad, num_chains)
            _, there = _over_chains(value_and_grad, batch_size)(keys, proposed)
            there = there.astype(grads.dtype)
            grads = jnp.where(info.is_accepted[:, None], there, grads)
            seen = *seen, there, grads

        distance = jnp.sum((info.proposal.whitened - states.whitened) ** 2, axis=1)
        jump = jnp.where(info.acceptance_rate > 0, info.acceptance_rate * distance, 0)
        is_kind = jax.nn.one_hot(info.kind, WALK + 1, dtype=totals.count.dtype)
        values = (jnp.ones(num_chains), info.acceptance_rate, jump, info.inner_acceptance_rate)
        totals = Totals(
            *(t + v.astype(t.dtype) @ is_kind for t, v in zip(totals, values, strict=True))
        )
        return (new, grads, totals), (History(*seen), info.acceptance_rate)

    loop = carry.states, carry.grads, carry.totals
    keys = jax.random.split(rng_key, num_steps)
    (states, grads, totals), (seen, rates) = jax.lax.scan(body, loop, keys)
    carry = _advance(carry, states, seen, num_steps, 1, 0 if estimator is None else 1)
    return carry._replace(totals=totals, grads=grads), rates.T


def _over_chains(fun, batch_size):
    """Run a function over the leading axis of its arguments, all at once or in batches."""
    if batch_size is None:
        return jax.vmap(fun)
    return lambda *args: jax.lax.map(lambda chain: fun(*chain), args, batch_size=batch_size)


def _learns(stage):
    return stage.kind not in ("walk", "round")


def _advance(carry, states, seen, num_steps, num_values, num_grads):
    """Append steps to the history, and count what each of them cost a chain."""
    history = jax.tree.map(
        lambda old, new: jnp.concatenate([old, new.astype(old.dtype)])[-len(old) :],
        carry.history,
        seen,
    )
    num_chains = seen.draw_logdensity.shape[1]
    num = num_steps * num_chains
    report = carry.report._replace(
        num_evaluations=carry.report.num_evaluations + num_values * num,
        num_gradients=carry.report.num_gradients + num_grads * num,
    )
    return carry._replace(
        states=states,
        history=history,
        num_since=carry.num_since + num_steps,
        report=report,
    )


def _flat(position):
    """Return positions of all chains as rows, and what turns a row into a position."""
    _, unravel = ravel_pytree(jax.tree.map(lambda leaf: leaf[0], position))
    return jax.vmap(lambda tree: ravel_pytree(tree)[0])(position), unravel


def _blank_transport(dim, dtype):
    """Return a map of the shapes that fits have; to trace a fit for them takes a second."""
    return identity(dim, min(MAX_DRIVERS, dim // 2) if dim <= MAX_MAP_DIM else 0, dtype)


def _blank_surrogate(dim, num_points, dtype, has_grads):
    """Return a surrogate of the shapes that fits have."""
    if has_grads:
        return no_ridges(dim, dtype)
    degree = regression.affordable_degree(dim, num_points)
    return from_coefficients(jnp.zeros(num_monomials(dim, degree), dtype), dim, degree)
