r"""The surrogate: a standard Gaussian, corrected by a polynomial of squashed coordinates.

.. math:: g(z) = -|z|^2 / 2 + P(s), \qquad s = 4 \tanh(z / 4).

The polynomial is bounded, so that :math:`e^{g}` is a proper density with Gaussian tails.
"""

from itertools import combinations_with_replacement, permutations
from math import comb
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

SQUASH = 4.0
"""Where squashing sets in, in standard deviations."""


class Polynomial(NamedTuple):
    """Symmetric coefficients, degree by degree.

    Attributes:
        constant: ().
        linear: (d,).
        quadratic: (d, d), or None where the degree is lower; the same for the others.
        cubic: (d, d, d).
        quartic: (d, d, d, d).
    """

    constant: jax.Array
    linear: jax.Array
    quadratic: jax.Array | None
    cubic: jax.Array | None
    quartic: jax.Array | None


def value_and_grad(
    surrogate: Polynomial | None, whitened: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Return the remainder g(z) + |z|^2 / 2 and its gradient with respect to z.

    Exact. Each tensor of coefficients is read once for both.

    Args:
        surrogate: the coefficients; `None` is no remainder.
        whitened: z, (d,).
    """
    if surrogate is None:
        return jnp.zeros((), whitened.dtype), jnp.zeros_like(whitened)
    s = squash(whitened)
    value = surrogate.constant + surrogate.linear @ s
    grad = surrogate.linear
    for degree, tensor in enumerate(surrogate[2:], start=2):
        if tensor is None:
            continue
        # Contract all but one index, two at a time where there are as many.
        if degree == 4:
            tensor = tensor.reshape(s.size, s.size, -1) @ jnp.outer(s, s).ravel()
        elif degree == 3:
            tensor = tensor @ s
        contracted = tensor @ s
        value = value + s @ contracted
        grad = grad + degree * contracted
    return value, grad * (1 - (s / SQUASH) ** 2)


def squash(whitened: jax.Array) -> jax.Array:
    """Return s, which is z near zero and never beyond 4."""
    return SQUASH * jnp.tanh(whitened / SQUASH)


def largest_degree(dim: int) -> int:
    """Return the degree whose coefficients a warm-up can pay for."""
    for degree, limit in ((4, 10), (3, 16), (2, 100)):
        if dim <= limit:
            return degree
    return 0


def num_monomials(dim: int, degree: int) -> int:
    """Count the monomials of d variables up to a degree."""
    return comb(dim + degree, degree)


def monomials(s: jax.Array, degree: int) -> jax.Array:
    """Return all monomials of `s`, (..., d), up to a degree, ordered by degree."""
    columns = [jnp.ones((*s.shape[:-1], 1), s.dtype)]
    parents: dict[tuple[int, ...], int] = {(): 0}
    for k in range(1, degree + 1):
        index = list(combinations_with_replacement(range(s.shape[-1]), k))
        lower = np.array([parents[i[:-1]] for i in index])
        columns.append(columns[-1][..., lower] * s[..., np.array([i[-1] for i in index])])
        parents = {i: position for position, i in enumerate(index)}
    return jnp.concatenate(columns, axis=-1)


def from_coefficients(coefficients: jax.Array, dim: int, degree: int) -> Polynomial:
    """Write the coefficients of `monomials` as symmetric tensors."""
    tensors: list[jax.Array | None] = [None] * 5
    start = 0
    for k in range(degree + 1):
        index = list(combinations_with_replacement(range(dim), k))
        where = np.zeros((dim,) * k, int)
        share = np.ones((dim,) * k)
        for position, i in enumerate(index):
            orders = set(permutations(i))
            for order in orders:
                where[order], share[order] = start + position, 1 / len(orders)
        tensors[k] = coefficients[where] * share.astype(coefficients.dtype)
        start += len(index)
    if tensors[1] is None:
        tensors[1] = jnp.zeros(dim, coefficients.dtype)
    return Polynomial(*tensors)  # pyright: ignore[reportArgumentType]
