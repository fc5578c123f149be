"""What a run shows while it runs: acceptance, step size, R-hat so far, chains that are in trouble.

Of each chain's draws only count, mean and variance are kept, so that a run of any length costs the
memory of two draws a chain.
"""

from typing import Any, NamedTuple

import jax
import numpy as np

from probbp.types import Tree

STUCK = 0.01
"""A chain is called stuck while fewer than this share of its proposals would be accepted."""


class Moments(NamedTuple):
    """Of each chain's draws so far, in double precision.

    Attributes:
        count: number of draws, a scalar.
        mean: a pytree of (chain, ...).
        scatter: sums of squared deviations from the mean, the same.
    """

    count: np.ndarray
    mean: Tree
    scatter: Tree


def no_draws(like: Tree) -> Moments:
    """Return the moments before the first draw.

    Args:
        like: a pytree of shapes (chain, ...).
    """
    return Moments(
        np.zeros((), np.int64),
        jax.tree.map(lambda leaf: np.zeros(leaf.shape), like),
        jax.tree.map(lambda leaf: np.zeros(leaf.shape), like),
    )


def add(moments: Moments, draws: Tree) -> Moments:
    """Take draws in, (chain, draw, ...).

    Reference:
        Chan, Golub & LeVeque, 1983, The American Statistician 37, equation 2.1: exact but for
        rounding, in whatever pieces the draws come.
    """
    new = next(np.shape(leaf)[1] for leaf in jax.tree.leaves(draws))
    total = moments.count + new

    def merged(mean, scatter, leaf):
        leaf = np.asarray(leaf, np.float64)
        mean_of_new = leaf.mean(axis=1)
        scatter_of_new = np.square(leaf - mean_of_new[:, None]).sum(axis=1)
        delta = mean_of_new - mean
        return (
            mean + delta * (new / total),
            scatter + scatter_of_new + delta**2 * (moments.count * new / total),
        )

    with np.errstate(invalid="ignore", over="ignore"):  # what is not finite shows as such
        pairs = jax.tree.map(merged, moments.mean, moments.scatter, draws)
    mean, scatter = jax.tree.transpose(
        jax.tree.structure(moments.mean), jax.tree.structure((0, 0)), pairs
    )
    return Moments(np.asarray(total), mean, scatter)


def standard_deviation(moments: Moments) -> Tree:
    """Return each chain's, with the divisor n - 1; NaN for less than two draws."""
    if moments.count < 2:
        return jax.tree.map(lambda leaf: np.full(leaf.shape, np.nan), moments.scatter)
    return jax.tree.map(lambda leaf: np.sqrt(leaf / (moments.count - 1)), moments.scatter)


def worst_rhat(moments: Moments) -> float:
    r"""Return the largest R-hat of all coordinates, of the draws so far.

    Gelman and Rubin's: :math:`\sqrt{(n - 1) / n + B / W}`, from means and variances alone. It is
    neither split nor by ranks: for the verdict, take `arviz.rhat` on the draws.

    Returns:
        NaN for fewer than two chains or draws, infinity where no chain has moved but they differ.
    """
    worst = np.nan
    for mean, scatter in zip(
        jax.tree.leaves(moments.mean), jax.tree.leaves(moments.scatter), strict=True
    ):
        if len(mean) < 2 or moments.count < 2:
            return np.nan
        between = mean.var(axis=0, ddof=1)
        within = scatter.mean(axis=0) / (moments.count - 1)
        with np.errstate(divide="ignore", invalid="ignore"):
            rhat = np.sqrt((moments.count - 1) / moments.count + between / within)
        worst = np.fmax(worst, np.max(rhat[~np.isnan(rhat)], initial=1.0))
    return float(worst)


def show(bar: Any, num_steps: int, acceptance: Any, step_size: Any, **more: Any) -> None:
    """Move the bar on, and say how the run fares.

    Args:
        bar: of tqdm.
        num_steps: since it was last shown.
        acceptance: (chain, step), since then.
        step_size: (chain,).
        **more: `rhat`, so far; `divergent`, how many steps of the run; `held_out_std`, how far what
            was learned is off at points that it was not fitted to.
    """
    bar.update(num_steps)
    if bar.disable:
        return
    words = [f"acceptance {np.mean(acceptance):.2f}", f"step size {np.mean(step_size):.2e}"]
    if np.isfinite(more.get("held_out_std", np.nan)):
        words.append(f"held-out error {more['held_out_std']:.2f}")
    if np.isfinite(more.get("rhat", np.nan)):
        words.append(f"R-hat {more['rhat']:.3f}")
    stuck = np.flatnonzero(~(np.mean(acceptance, axis=1) >= STUCK))
    if len(stuck):
        words.append(f"STUCK: {_chains(stuck)}")
    if more.get("divergent"):
        words.append(f"{more['divergent']} DIVERGENT")
    bar.set_postfix_str(", ".join(words))


def _chains(indices):
    told = ", ".join(map(str, indices[:4]))
    rest = f" and {len(indices) - 4} more" if len(indices) > 4 else ""
    return f"chain{'s' * (len(indices) > 1)} {told}{rest}"
