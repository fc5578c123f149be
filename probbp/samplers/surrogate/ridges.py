r"""A surrogate for many dimensions: a Gaussian, a quadratic, and a sum of learned ridge functions.

.. math::
    g(z) = -\frac{|z|^2}{2} + b \cdot s + \frac{s^\top Q s}{2}
    + \sum_j a_j \operatorname{softplus}(w_j \cdot z + c_j), \qquad s = 4 \tanh(z / 4).

Polynomials of degree three can't be afforded above some 16 dimensions. Ridge functions can, but
values alone do not determine them: they are fitted to values and gradients of the log density. The
quadratic is bounded and a ridge grows linearly, so that :math:`e^{g}` is a proper density.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from probbp.samplers.surrogate.descent import minimize
from probbp.samplers.surrogate.polynomial import SQUASH, squash

NUM_RIDGES = 128
NUM_ITERATIONS = 400
"""Of L-BFGS."""

GRADIENT_WEIGHT = 0.3
"""Of squared errors of the gradient, beside those of the value. By Poincare's inequality the
former bound the variance of the latter under the Gaussian."""

PENALTY = 3e-5
"""Of squared parameters."""


class Ridges(NamedTuple):
    """The parameters: d coordinates, J ridges.

    Attributes:
        slope: b, (d,).
        quadratic: Q, (d, d), symmetric.
        directions: w, (J, d).
        offsets: c, (J,).
        amplitudes: a, (J,).
    """

    slope: jax.Array
    quadratic: jax.Array
    directions: jax.Array
    offsets: jax.Array
    amplitudes: jax.Array

    def value_and_grad(self, whitened: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return the remainder g(z) + |z|^2 / 2 and its gradient with respect to z; exact.

        Args:
            whitened: z, (d,), or with further axes before it.
        """
        s = squash(whitened)
        inner = whitened @ self.directions.T + self.offsets
        bent = s @ self.quadratic
        value = s @ self.slope + jnp.sum(bent * s, axis=-1) / 2
        value = value + jax.nn.softplus(inner) @ self.amplitudes
        grad = (self.slope + bent) * (1 - (s / SQUASH) ** 2)
        return value, grad + (jax.nn.sigmoid(inner) * self.amplitudes) @ self.directions


def fit(
    rng_key: jax.Array,
    whitened: jax.Array,
    remainder: jax.Array,
    slopes: jax.Array,
    weights: jax.Array,
    num_ridges: int = NUM_RIDGES,
    num_iterations: int = NUM_ITERATIONS,
) -> Ridges:
    """Fit ridges to values and gradients by L-BFGS.

    Args:
        rng_key: key of the first directions.
        whitened: z of all points, (n, d).
        remainder: l(z) + |z|^2 / 2 there, up to a constant, (n,).
        slopes: its gradients, (n, d).
        weights: of the points, (n,); zero leaves one out.
        num_ridges: J.
        num_iterations: of L-BFGS.

    Cost: some `12 num_iterations n d (J + d)` operations.
    """
    weights = weights / jnp.sum(weights)
    remainder = jnp.where(weights > 0, remainder, 0)
    slopes, whitened = (jnp.where(weights[:, None] > 0, x, 0) for x in (slopes, whitened))

    def cost(ridges):
        values, grads = symmetric(ridges).value_and_grad(whitened)
        errors = values - remainder
        errors = errors - weights @ errors
        wrong = errors**2 + GRADIENT_WEIGHT * jnp.sum((grads - slopes) ** 2, axis=1)
        learned = ridges.amplitudes, ridges.directions, ridges.quadratic
        return weights @ wrong + PENALTY * sum(jnp.sum(leaf**2) for leaf in learned)

    first = first_guess(rng_key, whitened, slopes, weights, num_ridges)
    return symmetric(minimize(cost, first, num_iterations))


def first_guess(
    rng_key: jax.Array,
    whitened: jax.Array,
    slopes: jax.Array,
    weights: jax.Array,
    num_ridges: int,
) -> Ridges:
    """Return small ridges along directions in which the gradient varies beyond linearly."""
    dim, dtype = whitened.shape[1], whitened.dtype
    centered = slopes - weights @ slopes
    weighted = weights[:, None] * whitened
    gram = weighted.T @ whitened + 1e-2 * jnp.eye(dim, dtype=dtype)
    linear = jnp.linalg.solve(gram, weighted.T @ centered)
    rest = centered - whitened @ ((linear + linear.T) / 2)
    sizes, axes = jnp.linalg.eigh(rest.T @ (weights[:, None] * rest))
    sizes = jnp.sqrt(jnp.maximum(sizes, 0) / jnp.maximum(jnp.sum(sizes), 1e-30))
    key_directions, key_offsets, key_amplitudes = jax.random.split(rng_key, 3)
    noise = jax.random.normal(key_directions, (num_ridges, dim), dtype)
    return Ridges(
        jnp.zeros(dim, dtype),
        jnp.zeros((dim, dim), dtype),
        (noise * sizes) @ axes.T,
        jax.random.normal(key_offsets, (num_ridges,), dtype),
        0.1 * jax.random.normal(key_amplitudes, (num_ridges,), dtype),
    )


def no_ridges(dim: int, dtype: jnp.dtype, num_ridges: int = NUM_RIDGES) -> Ridges:
    """Return ridges that add nothing to the Gaussian."""
    return Ridges(
        jnp.zeros(dim, dtype),
        jnp.zeros((dim, dim), dtype),
        jnp.zeros((num_ridges, dim), dtype),
        jnp.zeros(num_ridges, dtype),
        jnp.zeros(num_ridges, dtype),
    )


def symmetric(ridges: Ridges) -> Ridges:
    """Make Q symmetric."""
    return ridges._replace(quadratic=(ridges.quadratic + ridges.quadratic.T) / 2)
