"""Whether a run of the surrogate transition may be trusted: what costs no further evaluation.

The chain is exact in the limit; a finite run misleads where the surrogate is far too low in a
region that warm-up hardly saw. Global moves never go there, and a walk that enters stays long. Then
target over surrogate has a heavy tail over the draws, which its Pareto shape tells.
"""

import warnings
from typing import Any, NamedTuple

import blackjax
import jax.numpy as jnp
import numpy as np

LARGEST_K = 1.0
"""Of target over surrogate at the draws: above it not even their mean is finite."""

LARGEST_STD = 0.6
"""Of the log of target over surrogate at points that the surrogate was not fitted to."""


SMALL_WEIGHT = 3.0
"""Times the mean: where no weight is larger, the shape of their tail does not matter."""


class Weights(NamedTuple):
    """Target over surrogate at the draws.

    Attributes:
        pareto_k: the shape of its tail.
        largest: the largest over the mean.
    """

    pareto_k: float
    largest: float


def weights_of(log_weight: Any) -> Weights:
    """Summarise target over surrogate at the draws of all chains.

    Args:
        log_weight: of the draws.

    Reference:
        Vehtari et al., 2024, arXiv:1507.02646 (what the shape tells of importance weights).
    """
    log_weight = np.asarray(log_weight, float).ravel()
    weight = np.exp(log_weight - log_weight.max())
    k = float(blackjax.pareto_khat(jnp.asarray(weight), tail="upper"))
    return Weights(k, float(1 / weight.mean()))


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
    if weights.pareto_k <= LARGEST_K or weights.largest <= SMALL_WEIGHT:
        return []
    return [
        f"target over surrogate has a Pareto shape of {weights.pareto_k:.1f} at the draws (up to "
        f"{LARGEST_K:.0f} is fine), and is up to {weights.largest:.0f} times its mean: the chains "
        "have been where the surrogate is wrong"
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
