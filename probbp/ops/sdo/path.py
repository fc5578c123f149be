r"""What a detached step does to a derivative: pass it on, or pass it on as a Gaussian would.

A step :math:`x' = a x + b f(x)` has the derivative :math:`a + b f'(x)`, for which the network has
to be differentiated. Detached it has :math:`a`, the paper's choice. Or :math:`a + b G`, with G the
derivative of the best denoiser of data :math:`N(m, C)`, which is a number in each eigendirection of
C. Then paths over any number of steps are products of numbers.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer

from probbp.checks import check_numbers
from probbp.ops.sdo.schedule import Prediction, Schedule, Steps


class GaussianPath(NamedTuple):
    """The data's covariance, in its eigenbasis; from `gaussian_path`.

    Attributes:
        variances: (1,), one for all directions, or (d,).
        basis: (d, d), eigenvectors in columns, or `None` for the coordinates themselves.
    """

    variances: jax.Array
    basis: jax.Array | None


def gaussian_path(covariance: jax.typing.ArrayLike) -> GaussianPath:
    r"""Return the path through the best denoiser of Gaussian data, for `sample`'s `surrogate`.

    With variance c in some direction and signal :math:`\bar\alpha`, the best prediction of the
    noise has the derivative :math:`G = \sqrt{1-\bar\alpha} / (\bar\alpha c + 1 - \bar\alpha)` in
    that direction. The data's mean does not enter a derivative.

    For Gaussian data and their best denoiser the path is the exact derivative of the sampler. For
    others it has about the right length, on the condition that the network denoises about as well
    as the best one for data of this covariance. A network that was trained little, or on other
    data, leaves more of the noise, and the path is then too short, ten times and more: compare it
    with `keep_step="all"` on a few samples. The paper's path, :math:`c \to \infty`, is too long by
    what the steps multiply, :math:`1 / \sqrt{\bar\alpha_T}`: 157 for `linear` from pure noise. The
    path of c = 1, `gaussian_path(1.0)`, is what detaching v instead of the noise would do.

    Args:
        covariance: of the data: a variance for all directions, (d,) variances, or (d, d). d counts
            the numbers of a sample, flattened. The covariance of the training data serves.

    Raises:
        ValueError: for other shapes, numbers that are not finite, and what is no covariance.

    Example:
        >>> gaussian_path(jnp.diag(jnp.array([4.0, 1.0]))).variances.tolist()
        [1.0, 4.0]
    """
    check_numbers("covariance", covariance, "(-inf, inf)")
    covariance = jnp.asarray(covariance, float)
    if covariance.ndim < 2:
        check_numbers("covariance", covariance, "[0, inf)", "It is a variance for each dimension.")
        return GaussianPath(jnp.atleast_1d(covariance), None)
    if covariance.ndim > 2 or covariance.shape[0] != covariance.shape[1]:
        raise ValueError(
            f"covariance must be a number, (d,) or (d, d), got {covariance.shape}: flatten samples."
        )
    variances, basis = jnp.linalg.eigh(covariance)
    _check_covariance(covariance, variances)
    return GaussianPath(jnp.maximum(variances, 0.0), basis)


def _check_covariance(covariance, variances):
    """Require a symmetric matrix without negative eigenvalues, but for rounding."""
    if isinstance(variances, Tracer):
        return
    tolerance = 1e-4 * float(jnp.max(jnp.abs(covariance)))
    if float(jnp.max(jnp.abs(covariance - covariance.T))) > tolerance:
        raise ValueError("covariance must be symmetric: take (C + C.T) / 2.")
    if float(variances[0]) < -tolerance:
        raise ValueError(
            f"covariance must have no negative eigenvalue, got {float(variances[0]):.3g}: add a "
            "multiple of the identity, or estimate it from more samples than dimensions."
        )


class Walk(NamedTuple):
    """The linear path of one sampler.

    Attributes:
        slopes: (num_steps, r), G of each step; r is 1 or d.
        factors: (num_steps, r), by which a step multiplies.
        spread: (num_steps,), by which a step multiplies the noise that is added in it.
        basis: (d, d) or `None`.
    """

    slopes: jax.Array
    factors: jax.Array
    spread: jax.Array
    basis: jax.Array | None

    def slope(self, x: jax.Array, step: jax.Array) -> jax.Array:
        """Return G x, at one step for all samples or at one for each."""
        return self._scaled(x, self.slopes[step])

    def across(self, x: jax.Array, noise: jax.Array | None, begin: int, end: int) -> jax.Array:
        """Return where x is carried by the steps from `begin` up to `end`, noise included."""
        moved = self._scaled(x, jnp.prod(self.factors[begin:end], axis=0))
        if noise is None or begin == end:
            return moved
        tails = jnp.cumprod(self.factors[begin:end][::-1], axis=0)[::-1]
        after = jnp.concatenate([tails[1:], jnp.ones_like(tails[:1])])
        weights = after * self.spread[begin:end, None]
        return moved + jnp.sum(jax.vmap(self._scaled)(noise[begin:end], weights), axis=0)

    def until(self, x: jax.Array, noise: jax.Array | None, steps: jax.Array) -> jax.Array:
        """Return where each sample is at a step of its own, (batch,)."""
        ones = jnp.ones_like(self.factors[:1])
        heads = jnp.concatenate([ones, jnp.cumprod(self.factors, axis=0)])
        moved = self._scaled(x, heads[steps])
        if noise is None:
            return moved

        def add(total, inputs):
            factor, spread, w, n = inputs
            is_past = (n >= steps).reshape(-1, *[1] * (x.ndim - 1))
            return jnp.where(is_past, total, self._scaled(total, factor) + spread * w), None

        inputs = self.factors, self.spread, noise, jnp.arange(len(self.spread))
        return moved + jax.lax.scan(add, jnp.zeros_like(x), inputs)[0]

    def since(self, x: jax.Array, steps: jax.Array) -> jax.Array:
        """Return where what is added in a sample's own step, (batch,), arrives at the end."""
        tails = jnp.cumprod(self.factors[::-1], axis=0)[::-1]
        after = jnp.concatenate([tails[1:], jnp.ones_like(tails[:1])])
        return self._scaled(x, after[steps])

    def _scaled(self, x, factors):
        """Multiply samples (batch, ...) by factors (r,) or (batch, r), in the eigenbasis."""
        flat, factors = x.reshape(x.shape[0], -1), jnp.atleast_2d(factors)
        if self.basis is None:
            return (flat * factors).reshape(x.shape)
        basis = self.basis.astype(x.dtype)
        return ((flat @ basis) * factors @ basis.T).reshape(x.shape)


def walk_of(
    surrogate: GaussianPath | None,
    schedule: Schedule,
    steps: Steps,
    prediction: Prediction,
    x: jax.Array,
) -> Walk:
    """Return the path on which detached steps carry a derivative of samples like x.

    Raises:
        ValueError: for a path whose dimension is not that of a sample.
    """
    keep, push, spread = (jnp.asarray(leaf, x.dtype) for leaf in steps)
    if surrogate is None:
        return Walk(jnp.zeros_like(keep)[:, None], keep[:, None], spread, None)
    size = math.prod(x.shape[1:])
    if surrogate.variances.shape[0] not in (1, size):
        raise ValueError(
            f"The path is for {surrogate.variances.shape[0]} dimensions, and a sample has {size}."
        )
    variances = surrogate.variances.astype(x.dtype)
    levels = schedule.signal[:-1]
    signal = jnp.asarray(levels, x.dtype)[:, None]
    noise = jnp.asarray([1 - level for level in levels], x.dtype)[:, None]
    total = signal * variances + noise
    if prediction == "eps":
        slopes = jnp.sqrt(noise) / total
    else:
        slopes = jnp.sqrt(signal * noise) * (1 - variances) / total
    return Walk(slopes, keep[:, None] + push[:, None] * slopes, spread, surrogate.basis)
