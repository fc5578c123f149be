r"""The surrogate: a standard Gaussian, corrected by a polynomial of squashed coordinates.

.. math:: g(z) = -|z|^2 / 2 + P(s), \qquad s = 4 \tanh(z / 4).

The polynomial is bounded, so that :math:`e^{g}` is a proper density with Gaussian tails.
"""

from itertools import combinations_with_replacement
from math import comb
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

SQUASH = 4.0
"""Where squashing sets in, in standard deviations."""


MAX_ENTRIES = 10_000
"""Of the largest tensor of coefficients."""

MAX_DEGREE = 6
MAX_MONOMIALS = 1001
"""Of degree three and more: a fit solves as many equations."""


class Polynomial(NamedTuple):
    """The coefficients of a polynomial of d variables.

    Attributes:
        tensors: one symmetric tensor for each degree from 0 on, with as many axes of length d.
    """

    tensors: tuple[jax.Array, ...]

    def value_and_grad(self, whitened: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return the remainder g(z) + |z|^2 / 2 and its gradient with respect to z.

        Exact. Each tensor is read once for both: all but one of its axes are contracted with s.

        Args:
            whitened: z, (d,).
        """
        s = squash(whitened)
        constant, *others = self.tensors
        value, grad, powers = constant, jnp.zeros_like(s), jnp.ones(1, s.dtype)
        for degree, tensor in enumerate(others, start=1):
            contracted = tensor.reshape(s.size, -1) @ powers
            value = value + contracted @ s
            grad = grad + degree * contracted
            powers = jnp.outer(powers, s).ravel()
        return value, grad * (1 - (s / SQUASH) ** 2)


def squash(whitened: jax.Array) -> jax.Array:
    """Return s, which is z near zero and never beyond 4."""
    return SQUASH * jnp.tanh(whitened / SQUASH)


def largest_degree(dim: int) -> int:
    """Return the degree that a step and a fit can pay for: 6 up to d = 4, 4 at 10, 2 at 100."""
    for degree in range(MAX_DEGREE, 1, -1):
        is_small = degree == 2 or num_monomials(dim, degree) <= MAX_MONOMIALS
        if dim**degree <= MAX_ENTRIES and is_small:
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
    tensors, start = [coefficients[0]], 1
    for k in range(1, degree + 1):
        entries = np.indices((dim,) * k).reshape(k, -1).T
        # Sorted rows in lexicographic order are the monomials in theirs.
        names, where, counts = np.unique(
            np.sort(entries, axis=1), axis=0, return_inverse=True, return_counts=True
        )
        where = where.reshape((dim,) * k)
        tensors.append(coefficients[start + where] / counts.astype(coefficients.dtype)[where])
        start += len(names)
    return Polynomial(tuple(tensors))
