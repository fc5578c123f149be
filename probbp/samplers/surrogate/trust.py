"""Whether a run of the surrogate transition may be trusted: what costs no further evaluation.

The chain is exact in the limit; a finite run misleads where the surrogate is far too low in a
region that warm-up hardly saw. Global moves never go there, and a walk that enters stays long. The
log of target over surrogate is then the slowest quantity of the chain: its effective sample size,
that of its tails above all, tells.
"""

import warnings
from typing import Any, NamedTuple

import blackjax
import jax
import jax.numpy as jnp
import numpy as np

LARGEST_STD = 0.6
"""Of the log of target over surrogate at points that the surrogate was not fitted to."""

SMALLEST_ESS, SMALLEST_SHARE = 400, 0.05
"""Of the log of target over surrogate at the draws: so many, or that share of few draws."""

LARGEST_K = 1.0
"""Of target over surrogate: above it not even their mean is finite."""

SMALL_WEIGHT = 3.0
"""Times the mean: where no weight is larger no chain is held, and their spread may be rounding."""


class Weights(NamedTuple):
    """Target over surrogate at the draws.

    Attributes:
        pareto_k: the shape of its tail.
        largest: the largest over the mean.
        ess: effective sample size of its log, the smallest of bulk and tails.
        num_draws: of all chains.
    """

    pareto_k: float
    largest: float
    ess: float
    num_draws: int


def weights_of(log_weight: Any) -> Weights:
    """Summarise target over surrogate at the draws of all chains.

    Args:
        log_weight: of the draws, (chain, draw).

    Reference:
        Vehtari et al., 2024, arXiv:1507.02646 (the shape of importance weights); Vehtari et al.,
        2021, arXiv:1903.08008 (effective sample sizes of bulk and tails).
    """
    log_weight = np.asarray(log_weight, float)
    weight = np.exp(log_weight - log_weight.max()).ravel()
    k = float(blackjax.pareto_khat(jnp.asarray(weight), tail="upper"))
    low, high = np.quantile(log_weight, [0.05, 0.95])
    parts = log_weight, log_weight <= low, log_weight >= high
    ess = min(float(effective_size(jnp.asarray(1.0 * part))) for part in parts)
    if not np.all(np.isfinite(log_weight)):
        ess = np.nan
    return Weights(k, float(1 / weight.mean()), ess, log_weight.size)


@jax.jit
def effective_size(values: jax.Array) -> jax.Array:
    """Return how many independent draws have the same error, by halves of the chains.

    Args:
        values: (chain, draw).
    """
    num = values.shape[1] // 2
    halves = jnp.concatenate([values[:, :num], values[:, num : 2 * num]])
    size = blackjax.ess(halves)
    # Of values that are all the same any number of draws has the same error.
    return jnp.where(size > 0, jnp.minimum(size, values.size), values.size)


def distrust_of_fit(held_out_std: float) -> list[str]:
    """Say what is wrong with a surrogate before the first draw; nothing where it predicts well."""
    if held_out_std <= LARGEST_STD:
        return []
    return [
        f"the surrogate misses the log density by {held_out_std:.2f} (up to {LARGEST_STD} is fine) "
        "at points that it was not fitted to"
    ]


def distrust_of_draws(weights: Weights) -> list[str]:
    """Say why draws may be wrong although the chains agree; nothing where they can be trusted."""
    enough = min(SMALLEST_ESS, SMALLEST_SHARE * weights.num_draws)
    if weights.largest <= SMALL_WEIGHT or weights.ess >= enough:
        return []
    return [
        f"the log of target over surrogate has an effective sample size of {weights.ess:.0f} (from "
        f"{enough:.0f} on is fine): the chains stay long where the surrogate is wrong"
    ]


def distrust_of_weights(weights: Weights) -> list[str]:
    """Say why target over surrogate does not do as importance weights; nothing where it does."""
    if weights.pareto_k <= LARGEST_K or weights.largest <= SMALL_WEIGHT:
        return []
    return [
        f"target over surrogate has a Pareto shape of {weights.pareto_k:.1f} at the draws (up to "
        f"{LARGEST_K:.0f} is fine), and is up to {weights.largest:.0f} times its mean"
    ]


def warn_of_distrust(reasons: list[str]) -> None:
    """Warn where there are reasons."""
    if reasons:
        warnings.warn(
            f"The draws may be wrong even where R-hat is small: {'; '.join(reasons)}. Give more "
            "num_warmup, remove strong curvature by another parameterization, or, where the log "
            "density has a gradient, give its estimator (probbp.estimators.reverse()) or use NUTS; "
            "where not, compare with probbp.pc_line_fmala.",
            stacklevel=3,
        )
