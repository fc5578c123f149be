"""The warm-up of the surrogate transition as `probbp.sample` runs it: one program for all."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from probbp.samplers.algorithm import Warmup
from probbp.samplers.surrogate.learning import WarmupState
from probbp.samplers.surrogate.trust import pareto_k, warn_of_distrust
from probbp.samplers.surrogate.warmup import (
    ROUNDS,
    WALKS,
    Stage,
    init,
    run_stage,
    run_steps,
)
from probbp.types import LogDensity

LEARN = ("rescale", "refit", "freeze")
"""What may be learned after a chunk; zero in the schedule is nothing, the others follow."""


class Rest(NamedTuple):
    """What warm-up carries besides the kernel's states.

    Attributes:
        step_size: of the inner integrator, (chains,); all chains have the same.
        learned: the `WarmupState` without the states.
    """

    step_size: jax.Array
    learned: WarmupState


def warmup(logdensity_fn: LogDensity, num_steps: int) -> Warmup:
    """Write the warm-up on a log density.

    Args:
        logdensity_fn: log density up to a constant.
        num_steps: of each chain, rounded up to a multiple of 29.

    Raises:
        ValueError: for no steps: without them there is nothing to sample with.
    """
    if num_steps < 1:
        raise ValueError(
            "probbp.surrogate learns all that it samples with in warm-up: num_warmup must be "
            f"positive, got {num_steps}. Some thousands of steps are usual, and 2900 the default."
        )
    chunk = -(-num_steps // (sum(WALKS) + sum(ROUNDS)))
    schedule = schedule_of(chunk)

    def start(starts):
        return split(init(logdensity_fn, starts, len(schedule)))

    def run(rng_key, carry, schedule):
        key_steps, key_learn = jax.random.split(rng_key)
        is_round, learn = schedule[0, 0], schedule[-1, 1]
        steps = [partial(run_steps, key_steps, logdensity_fn, kind) for kind in ("walk", "round")]
        learned, rates = jax.lax.cond(
            is_round == 1, partial(steps[1], chunk), partial(steps[0], chunk), joined(carry)
        )
        stages = [partial(_learn, key_learn, logdensity_fn, kind) for kind in LEARN]
        return split(jax.lax.switch(learn, [lambda same: same, *stages], learned)), rates

    return Warmup(schedule, chunk, start, run, parameters, report)


def schedule_of(chunk: int) -> jax.Array:
    """Return whether each step is a round's, and what is learned after it, (29 * chunk, 2)."""
    counts = (*WALKS, *ROUNDS)
    rows = np.zeros((sum(counts), chunk, 2), int)
    rows[sum(WALKS) :, :, 0] = 1
    ends = np.cumsum(counts) - 1
    rows[ends, -1, 1] = 1 + LEARN.index("refit")
    rows[ends[: len(WALKS) - 1], -1, 1] = 1 + LEARN.index("rescale")
    rows[ends[-1], -1, 1] = 1 + LEARN.index("freeze")
    return jnp.asarray(rows.reshape(-1, 2))


def parameters(rest: Rest) -> dict[str, Any]:
    """Return what the kernel takes."""
    return rest.learned.parameters._asdict()


def report(rest: Rest, sample_stats: Any) -> dict[str, float]:
    """Return what was learned, at what cost, and whether the draws may be trusted."""
    found = rest.learned.report
    k = pareto_k(sample_stats["log_weight"].values)
    warn_of_distrust(k, float(found.held_out_std))
    return {
        "pareto_k": k,
        "num_warmup_evaluations": int(found.num_evaluations),
        "num_relocated": int(found.num_relocated),
        "held_out_std": float(found.held_out_std),
        "degree": int(found.degree),
        "num_drivers": int(found.num_drivers),
    }


def split(carry: WarmupState) -> tuple[Any, Rest]:
    """Take the kernel's states out of what warm-up carries."""
    num_chains = len(carry.states.logdensity)
    step_size = jnp.broadcast_to(carry.parameters.step_size, (num_chains,))
    return carry.states, Rest(step_size, carry._replace(states=None))


def joined(carry: tuple[Any, Rest]) -> WarmupState:
    """Put them back."""
    states, rest = carry
    return rest.learned._replace(states=states)


def _learn(rng_key, logdensity_fn, kind, carry):
    if kind == "freeze":
        carry = run_stage(rng_key, logdensity_fn, carry, Stage("refit", 0))
    return run_stage(rng_key, logdensity_fn, carry, Stage(kind, 0))
