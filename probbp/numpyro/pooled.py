"""Steps of an algorithm that brings its own warm-up, in which all chains learn from each other.

The state of a kernel then has the chains as leading axis throughout, but for what was learned.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from numpyro.infer import MCMC

from probbp.numpyro.state import KernelState
from probbp.samplers.algorithm import Warmup
from probbp.samplers.surrogate import pooled
from probbp.types import Tree


def surrogate_report(mcmc: MCMC) -> dict[str, float]:
    """Say what `probbp.surrogate` learned in a run, and warn where its draws can't be trusted.

    `probbp.sample` does so by itself; NumPyro's `MCMC` has no place for a warning after a run.

    Args:
        mcmc: after `run`, of `Kernel(model, probbp.surrogate)`.

    Returns:
        The Pareto shape of target over surrogate at the draws and the largest over the mean,
        evaluations of the log density and of an estimator in warm-up, how often a chain was moved
        out of a mode without weight, the surrogate's error at points that it was not fitted to, its
        degree, and the number of drivers of the map. Where chains ran alone, sums of what was
        spent, and the worst of what was learned.

    Raises:
        ValueError: for a run of another kernel, and before `run`.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist, probbp
        >>> from numpyro.infer import MCMC
        >>> from probbp.numpyro import Kernel, surrogate_report
        >>> def model(y):
        ...     mean = numpyro.sample("mean", dist.Normal(0, 1))
        ...     numpyro.sample("y", dist.Normal(mean, 1), obs=y)
        >>> mcmc = MCMC(Kernel(model, probbp.surrogate), num_warmup=500, num_samples=100,
        ...             num_chains=4, chain_method="vectorized", progress_bar=False)
        >>> mcmc.run(jax.random.key(0), jnp.ones(5))
        >>> surrogate_report(mcmc)["num_warmup_evaluations"]
        2004
    """
    rest = getattr(getattr(mcmc, "last_state", None), "adapt_state", None)
    if not isinstance(rest, pooled.Rest):
        raise ValueError(
            "surrogate_report reads a run: mcmc must be an MCMC(Kernel(model, probbp.surrogate)), "
            "after its run."
        )
    rest = jax.device_get(rest)
    pooled.check(rest)
    log_weight = mcmc.get_extra_fields(group_by_chain=True)["log_weight"]
    return pooled.report(rest, jax.device_get(log_weight))


def init_chains(warmup: Warmup, rng_keys: jax.Array, starts: Tree) -> KernelState:
    """Return the first state of all chains.

    Args:
        warmup: on the log density.
        rng_keys: one of each chain.
        starts: positions, with the chains as leading axis.
    """
    states, rest = warmup.init(starts)
    zeros = jnp.zeros_like(states.logdensity)
    num_chains = len(zeros)
    return KernelState(
        jnp.zeros(num_chains, jnp.int32),
        states.position,
        -states.logdensity,
        zeros,
        zeros,
        jnp.zeros(num_chains, bool),
        rest,
        states,
        rng_keys,
        jnp.full_like(zeros, jnp.nan),
    )


def step_chains(
    warmup: Warmup, algorithm: Callable, num_warmup: int, state: KernelState
) -> KernelState:
    """Make one step of all chains, of warm-up or with what it has learned.

    Args:
        warmup: on the log density.
        algorithm: on the log density; takes the parameters that were learned.
        num_warmup: steps of warm-up.
        state: of all chains.
    """
    rng_keys, keys_step = jax.vmap(jax.random.split, out_axes=1)(state.rng_key)
    i = state.i[0]

    def learn(carry):
        row = warmup.schedule[jnp.minimum(i, num_warmup - 1)]
        (states, rest), rates = warmup.run(keys_step[0], carry, row[None])
        unknown = jnp.full_like(states.logdensity, jnp.nan)
        return states, rest, rates[:, 0], jnp.zeros(len(rates), bool), unknown

    def draw(carry):
        states, rest = carry
        states, info = jax.vmap(algorithm(**warmup.parameters(rest)).step)(keys_step, states)
        return states, rest, info.acceptance_rate, info.is_divergent, info.log_weight

    carry = state.algorithm_state, state.adapt_state
    states, rest, rates, diverging, log_weight = jax.lax.cond(i < num_warmup, learn, draw, carry)
    return state.advanced(num_warmup, states, rates, diverging)._replace(
        adapt_state=rest, rng_key=rng_keys, log_weight=log_weight
    )


def of_one_chain(step: Callable[[KernelState], KernelState]) -> Callable:
    """Turn a step of all chains into one of a single chain, whose state has no axis of chains."""

    def single(state):
        return first_chain(step(_with_axis(state)))

    return single


def first_chain(state: KernelState) -> KernelState:
    """Take the only chain out; what was learned stays as it is."""
    rest = state.adapt_state
    return jax.tree.map(lambda leaf: leaf[0], state._replace(adapt_state=None))._replace(
        adapt_state=rest
    )


def _with_axis(state: KernelState) -> KernelState:
    rest: Any = state.adapt_state
    return jax.tree.map(lambda leaf: leaf[None], state._replace(adapt_state=None))._replace(
        adapt_state=rest
    )
