r"""A scale that a chain's warm-up learns as it goes, in the memory of k directions.

BlackJAX's low-rank scale of the draws keeps those of a whole window, and decomposes their
covariance at its end. This one follows the leading directions draw by draw
(`probbp.optim.dsbp.track`), and keeps d (k + 3) numbers.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from blackjax.adaptation.metric_recipes import MetricCore, MetricRecipe
from blackjax.mcmc.metrics import LowRankInverseMassMatrix
from jax.flatten_util import ravel_pytree

from probbp.checks import check_count
from probbp.optim.dsbp import tracker
from probbp.optim.dsbp.gaussian import inverse_mass_matrix
from probbp.optim.dsbp.tracker import Spectrum
from probbp.types import Tree


class TrackedMetricState(NamedTuple):
    """What warm-up keeps of the draws.

    Attributes:
        inverse_mass_matrix: of the window before.
        count: draws in this window.
        mean: (d,), of them.
        squares: (d,), the sum of squared deviations from it.
        scale: (d,), standard deviations of the window before, by which draws are divided.
        spectrum: of the correlation of the draws so divided.
    """

    inverse_mass_matrix: LowRankInverseMassMatrix
    count: jax.Array
    mean: jax.Array
    squares: jax.Array
    scale: jax.Array
    spectrum: Spectrum


def tracked_metric(rank: int) -> MetricRecipe:
    r"""Return the recipe of a low-rank scale, tracked draw by draw in warm-up and frozen after it.

    For `probbp.sample(metric=...)`, `probbp.numpyro.Kernel(metric=...)` and
    `blackjax.staged_adaptation(metric=...)`. At the end of a window the scale is
    :math:`D\,(Q \Lambda Q^\top + b (I - QQ^\top))\,D`, with D the standard deviations of the window
    before, and Q the k leading directions of the draws divided by them. A window begins as if 5
    draws without correlations had been seen, as Stan's regularisation has it.

    Args:
        rank: k; all directions where there are fewer.

    Raises:
        ValueError: for a rank below 1.

    Example:
        >>> import jax, jax.numpy as jnp, probbp
        >>> from functools import partial
        >>> from probbp.optim import dsbp
        >>> algorithm = partial(probbp.mala, lambda x: -0.5 * (jnp.sum(x**2) + 9 * jnp.sum(x) ** 2))
        >>> _, learnt = probbp.warmup(
        ...     jax.random.key(0), algorithm, jnp.zeros(4), 300, metric=dsbp.tracked_metric(1))
        >>> learnt["inverse_mass_matrix"].U.shape
        (4, 1)
    """
    rank = check_count("rank", rank, way_out="Without directions: metric='diag'.")
    return _TrackedRecipe(
        representation="low_rank",
        estimator="dsbp",
        buffer="accumulate_window",
        support_gate=None,
        needs=frozenset({"positions"}),
        provides=frozenset({"positions"}),
        emits="low_rank",
        provenance="leading directions of the draws, tracked by block orthogonal iteration",
        max_rank=rank,
    )


@dataclasses.dataclass(frozen=True)
class _TrackedRecipe(MetricRecipe):
    """BlackJAX's recipe with another core."""

    def build_core(self, **_: object) -> MetricCore:
        return MetricCore(self._init, _update, _final)

    def _init(self, n_dims: int) -> TrackedMetricState:
        # The first basis is the same for each chain; draws of the first window turn it.
        spectrum = tracker.start(jax.random.key(0), n_dims, min(self.max_rank or 1, n_dims))
        return _window(jnp.ones(n_dims), spectrum.vectors)


def _window(scale: jax.Array, vectors: jax.Array) -> TrackedMetricState:
    """Begin a window as if 5 draws without correlations had been seen."""
    size, rank = vectors.shape
    spectrum = Spectrum(vectors, jnp.ones(rank), jnp.asarray(float(size)), jnp.asarray(5))
    return TrackedMetricState(
        inverse_mass_matrix(spectrum, scale=scale),
        jnp.zeros((), jnp.int32),
        jnp.zeros(size),
        jnp.zeros(size),
        scale,
        spectrum,
    )


def _update(state: TrackedMetricState, position: Tree, grad: Tree | None) -> TrackedMetricState:
    """Take in a draw."""
    del grad
    draw, _ = ravel_pytree(position)
    count = state.count + 1
    num = count.astype(state.mean.dtype)
    step = draw.astype(state.mean.dtype) - state.mean
    mean = state.mean + step / num
    squares = state.squares + step * (draw - mean)
    # Deviations from the mean so far, weighted so that their mean of squares is the variance's.
    deviation = step * jnp.sqrt((num - 1) / num) / state.scale
    spectrum = tracker.track(
        state.spectrum,
        lambda vectors: deviation[:, None] * (deviation @ vectors),
        trace=jnp.sum(deviation**2),
        decay=1.0,
    )
    return state._replace(count=count, mean=mean, squares=squares, spectrum=spectrum)


def _final(state: TrackedMetricState) -> TrackedMetricState:
    """End a window: its scale for the next, and the accumulators anew; the basis stays."""
    num = state.count.astype(state.mean.dtype)
    scale = jnp.sqrt((state.squares + 5 * state.scale**2) / (num + 5))
    learnt = inverse_mass_matrix(state.spectrum, scale=state.scale)
    return _window(scale, state.spectrum.vectors)._replace(inverse_mass_matrix=learnt)
