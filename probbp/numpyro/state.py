"""The state of a kernel, and how a step moves it on."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from probbp.types import Tree


class KernelState(NamedTuple):
    """State of `Kernel`, under the names that NumPyro and ArviZ read.

    Attributes:
        i: steps made, warm-up included.
        z: the position, unconstrained.
        potential_energy: minus the log density at z.
        accept_prob: acceptance probability of the last proposal.
        mean_accept_prob: its running mean, restarted after warm-up.
        diverging: whether the last proposal had a log density that was NaN or infinite.
        adapt_state: step size and inverse mass matrix, frozen after warm-up; of an algorithm that
            brings its own warm-up all that it learns.
        algorithm_state: the state of the algorithm itself.
        rng_key: key of the next step.
        log_weight: of `probbp.surrogate` the log of target over surrogate at z, else `None`.
    """

    i: jax.Array
    z: Tree
    potential_energy: jax.Array
    accept_prob: jax.Array
    mean_accept_prob: jax.Array
    diverging: jax.Array
    adapt_state: Any
    algorithm_state: Any
    rng_key: jax.Array
    log_weight: Any = None

    def advanced(
        self, num_warmup: int, algorithm_state: Any, acceptance_rate: Any, diverging: Any
    ) -> "KernelState":
        """Return the state after a step; its key and what was learned are the caller's to set."""
        i = self.i + 1
        num = jnp.where(i <= num_warmup, i, i - num_warmup)
        mean = jnp.where(num == 1, 0.0, self.mean_accept_prob)
        accept_prob = acceptance_rate.astype(mean.dtype)
        return self._replace(
            i=i,
            z=algorithm_state.position,
            potential_energy=-algorithm_state.logdensity,
            accept_prob=accept_prob,
            mean_accept_prob=mean + (accept_prob - mean) / num,
            diverging=diverging,
            algorithm_state=algorithm_state,
        )
