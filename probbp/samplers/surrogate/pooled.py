"""The warm-up of the surrogate transition as `probbp.sample` runs it: one program for all."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from probbp.samplers.algorithm import Warmup
from probbp.samplers.surrogate.learning import WarmupState
from probbp.samplers.surrogate.trust import (
    distrust_of_draws,
    distrust_of_fit,
    warn_of_distrust,
    weights_of,
)
from probbp.samplers.surrogate.warmup import (
    ROUNDS,
    WALKS,
    Stage,
    init,
    run_stage,
    run_steps,
)
from probbp.types import Estimator, LogDensity

LEARN = ("rescale", "refit", "freeze")
"""What may be learned after a chunk; zero in the schedule is nothing, the others follow."""

NUM_STRETCHES = sum(WALKS) + sum(ROUNDS)


class Rest(NamedTuple):
    """What warm-up carries besides the kernel's states.

    Attributes:
        step_size: of the inner integrator, (chains,); all chains have the same.
        held_out_std: error of the surrogate on points that it was not fitted to; NaN before a fit.
        learned: the `WarmupState` without the states.
    """

    step_size: jax.Array
    held_out_std: jax.Array
    learned: WarmupState


def warmup(
    logdensity_fn: LogDensity,
    num_steps: int,
    in_chunks: bool = True,
    batch_size: int | None = None,
    estimator: Estimator | None = None,
    **options: Any,
) -> Warmup:
    """Write the warm-up on a log density.

    Args:
        logdensity_fn: log density up to a constant.
        num_steps: of each chain.
        in_chunks: whether `num_steps` is rounded up to a multiple of 29, so that all chunks are of
            the same length, and something is learned at the end of one alone. Else a chunk is one
            step.
        batch_size: how many log densities are evaluated at once; all by default.
        estimator: of the gradient, for warm-up alone.
        **options: of the kernel, which warm-up does not heed.

    Raises:
        ValueError: for no steps: without them there is nothing to sample with.
    """
    del options
    if num_steps < 1:
        raise ValueError(
            "probbp.surrogate learns all that it samples with in warm-up: num_warmup must be "
            f"positive, got {num_steps}. Some thousands of steps are usual, and 2900 the default."
        )
    chunk = -(-num_steps // NUM_STRETCHES) if in_chunks else 1
    schedule = schedule_of(chunk * NUM_STRETCHES if in_chunks else num_steps)

    def start(starts):
        return split(init(logdensity_fn, starts, len(schedule), batch_size, estimator))

    def run(rng_key, carry, schedule):
        key_steps, key_learn = jax.random.split(rng_key)
        is_round, learn = schedule[0, 0], schedule[-1, 1]
        walk, rounds = (
            partial(
                run_steps,
                key_steps,
                logdensity_fn,
                kind,
                len(schedule),
                batch_size=batch_size,
                estimator=estimator,
            )
            for kind in ("walk", "round")
        )
        learned, rates = jax.lax.cond(is_round == 1, rounds, walk, joined(carry))
        same = lambda carry: carry
        rescaled, refitted, frozen = (
            partial(_learn, key_learn, logdensity_fn, kind) for kind in LEARN
        )
        # What is frozen is refitted first; the fit, which is long to compile, is there once.
        learned = jax.lax.switch(jnp.minimum(learn, 2), [same, rescaled, refitted], learned)
        return split(jax.lax.cond(learn == 3, frozen, same, learned)), rates

    return Warmup(schedule, chunk, start, run, parameters, check, report)


def schedule_of(num_steps: int) -> jax.Array:
    """Return whether each step is a round's, and what is learned after it, (num_steps, 2)."""
    ends = np.cumsum((*WALKS, *ROUNDS)) * num_steps // NUM_STRETCHES
    rows = np.zeros((num_steps, 2), int)
    rows[ends[len(WALKS) - 1] :, 0] = 1
    last = np.maximum(ends - 1, 0)
    rows[last[: len(WALKS) - 1], 1] = 1 + LEARN.index("rescale")
    rows[last[len(WALKS) - 1 :], 1] = 1 + LEARN.index("refit")
    rows[-1, 1] = 1 + LEARN.index("freeze")
    return jnp.asarray(rows)


def parameters(rest: Rest) -> dict[str, Any]:
    """Return what the kernel takes."""
    return rest.learned.parameters._asdict()


def check(rest: Rest) -> None:
    """Warn, before the draws, of a surrogate that does not predict the log density."""
    warn_of_distrust(distrust_of_fit(held_out_std_of(rest)))


def held_out_std_of(rest: Rest) -> float:
    """Return the largest error of one or several warm-ups."""
    return float(np.max(rest.learned.report.held_out_std))


def report(rest: Rest, log_weight: np.ndarray) -> dict[str, float]:
    """Return what was learned, at what cost, and whether the draws may be trusted.

    Args:
        rest: of a warm-up of all chains, or of several warm-ups, stacked; then the worst counts.
        log_weight: log of target over surrogate at the draws, (chain, draw).
    """
    found = rest.learned.report
    if np.ndim(found.held_out_std):  # surrogates of their own, each known up to a constant
        log_weight = log_weight - np.median(log_weight, axis=1, keepdims=True)
    weights = weights_of(log_weight)
    warn_of_distrust(distrust_of_draws(weights))
    return {
        "pareto_k": weights.pareto_k,
        "largest_weight": weights.largest,
        "log_weight_ess": weights.ess,
        "num_warmup_evaluations": int(np.sum(found.num_evaluations)),
        "num_warmup_gradients": int(np.sum(found.num_gradients)),
        "num_relocated": int(np.sum(found.num_relocated)),
        "held_out_std": held_out_std_of(rest),
        "degree": int(np.min(found.degree)),
        "num_drivers": int(np.max(found.num_drivers)),
    }


def split(carry: WarmupState) -> tuple[Any, Rest]:
    """Take the kernel's states out of what warm-up carries."""
    num_chains = len(carry.states.logdensity)
    step_size = jnp.broadcast_to(carry.parameters.step_size, (num_chains,))
    held_out_std = carry.report.held_out_std
    return carry.states, Rest(step_size, held_out_std, carry._replace(states=None))


def joined(carry: tuple[Any, Rest]) -> WarmupState:
    """Put them back."""
    states, rest = carry
    return rest.learned._replace(states=states)


def _learn(rng_key, logdensity_fn, kind, carry):
    return run_stage(rng_key, logdensity_fn, carry, Stage(kind, 0))
