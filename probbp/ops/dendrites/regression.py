"""What a neuron's own weights can say of a signal, and what they cannot."""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def regression(
    inputs: jax.Array, weights: jax.Array | None = None, *, ridge: float
) -> Callable[[jax.Array], jax.Array]:
    """Return the map from signals (rows, n) to their residuals from a regression on the inputs.

    The inverse is by sweeps instead of LAPACK, whose batched calls can wait on each other for ever
    on CPU where one program has several of them, as it has under `jax.vmap`.

    Args:
        inputs: (rows, m); a constant is added.
        weights: (rows,), of the rows; 1 by default.
        ridge: relative to the diagonal of the standardised inputs.
    """
    scale = inputs.std(0)
    standardised = (inputs - inputs.mean(0)) / jnp.where(scale > 1e-6, scale, 1.0)
    design = jnp.concatenate([standardised, jnp.ones_like(inputs[:, :1])], 1)
    weighted = design if weights is None else design * weights[:, None]
    gram = weighted.T @ design
    size = len(gram)
    gram = gram + ridge * jnp.trace(gram) / size * jnp.eye(size, dtype=gram.dtype)
    coefficients = _inverse(gram) @ weighted.T
    return lambda signal: signal - design @ (coefficients @ signal)


def _inverse(matrix):
    """Invert a positive definite matrix: Gauss and Jordan's elimination, which needs no pivots."""

    def sweep(k, a):
        pivot, row, column = a[k, k], a[k], a[:, k]
        swept = a - jnp.outer(column, row / pivot)
        swept = swept.at[k].set(row / pivot)
        return swept.at[:, k].set(-column / pivot).at[k, k].set(1 / pivot)

    return jax.lax.fori_loop(0, len(matrix), sweep, matrix)
