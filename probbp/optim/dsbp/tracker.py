r"""The leading eigenpairs of a matrix that arrives piece by piece: block orthogonal iteration.

The "dynamic" part of dynamic spectral backpropagation (Muthuraman, 2025, arXiv:2505.23369), which
recomputes eigenvectors as training goes on. Here a basis follows the decaying average M of matrices
:math:`M_t` of which only products are seen, as in streaming principal component analysis (Oja,
1982; Mitliagkas et al., 2013, arXiv:1307.0032):

.. math:: Y = \beta_t\, Q\, \mathrm{diag}(\lambda)\, Q^\top Q + (1 - \beta_t) M_t Q
    = U\, \mathrm{diag}(s)\, V^\top, \qquad Q \leftarrow U, \quad \lambda \leftarrow s .

It does not matter where the products come from: a gradient (:math:`G G^\top`), activations
(:math:`A^\top A / n`), draws of a chain, or a Hessian (`sharpness.hessian_product`).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from probbp.checks import check_count, check_number, check_rng_key


class Spectrum(NamedTuple):
    """The leading eigenpairs of a symmetric matrix of size m, and what is left of its trace.

    Attributes:
        vectors: (..., m, k), orthonormal columns, the leading one first.
        values: (..., k), falling.
        trace: (...,), of the whole matrix: `bulk` is the mean of the eigenvalues not tracked.
        count: how many matrices went into it.
    """

    vectors: jax.Array
    values: jax.Array
    trace: jax.Array
    count: jax.Array

    @property
    def bulk(self) -> jax.Array:
        """(...,), the mean of the m - k eigenvalues that are not tracked; 0 if all are."""
        size, rank = self.vectors.shape[-2:]
        rest = self.trace - jnp.sum(self.values, axis=-1)
        return jnp.maximum(rest, 0) / max(size - rank, 1)


def start(
    rng_key: jax.Array, size: int, rank: int, batch: tuple[int, ...] = (), dtype=float
) -> Spectrum:
    """Return a random basis that has seen nothing.

    Args:
        rng_key: of the basis.
        size: m.
        rank: k, at most m.
        batch: leading axes, for matrices tracked side by side.
        dtype: of vectors and values.

    Raises:
        ValueError: if the rank is not between 1 and m.

    Example:
        >>> import jax
        >>> start(jax.random.key(0), size=5, rank=2).vectors.shape
        (5, 2)
    """
    check_rng_key("rng_key", rng_key)
    size = check_count("size", size)
    rank = check_count("rank", rank, 1, size, f"The matrix has the size {size}.")
    gaussian = jax.random.normal(rng_key, (*batch, size, rank), dtype)
    return Spectrum(
        jnp.linalg.qr(gaussian)[0],
        jnp.zeros((*batch, rank), dtype),
        jnp.zeros(batch, dtype),
        jnp.zeros((), jnp.int32),
    )


def track(
    spectrum: Spectrum,
    product: Callable[[jax.Array], jax.Array],
    trace: jax.Array | float,
    decay: float = 0.9,
) -> Spectrum:
    r"""Take in one more matrix M_t.

    With the same M_t every time the angle to its leading subspace falls by
    :math:`\beta + (1 - \beta) \lambda_{k+1} / \lambda_k` a call, without decay by the ratio of the
    eigenvalues (the rate of subspace iteration). A basis that drifts is followed with a lag of
    about 1 / (1 - decay) calls. The first call weighs as a whole, as in Adam's correction of its
    bias, so that `values` needs no warm-up. Starting from a random basis the first call is a
    randomised range finder (Halko et al., 2011).

    Singular values of the small triangular factor, in place of its diagonal, sort the columns at
    once: vectors that only have to turn inside their span need no iterations to do so.

    Args:
        spectrum: so far.
        product: `vectors -> M_t @ vectors` with vectors (..., m, k); M_t symmetric, and positive
            semi-definite if its eigenvalues are to be those of `values`: of others their size.
        trace: of M_t, (...,).
        decay: beta, the weight of the past; 0 forgets it, 1 is the mean of all.

    Returns:
        The next spectrum. One product, and of the order of m k^2 operations.

    Raises:
        ValueError: for a decay outside [0, 1].

    Example:
        >>> import jax, jax.numpy as jnp
        >>> matrix = jnp.diag(jnp.array([1.0, 9.0, 0.0, 0.0]))
        >>> spectrum = start(jax.random.key(0), size=4, rank=1)
        >>> for _ in range(9):
        ...     spectrum = track(spectrum, lambda v: matrix @ v, trace=10.0, decay=0.0)
        >>> spectrum.values.round(3).tolist(), round(float(spectrum.bulk), 3)
        ([9.0], 0.333)
    """
    check_number("decay", decay, "[0, 1]")
    vectors, values, so_far, count = spectrum
    # beta (1 - beta^t) / (1 - beta^(t + 1)): the weights of a mean that knows where it began.
    seen = count.astype(values.dtype)
    weight = seen / (seen + 1)
    forgets = jnp.asarray(decay, values.dtype) < 1
    beta = jnp.where(forgets, decay, 0.5).astype(values.dtype)
    weight = jnp.where(forgets, beta * (1 - beta**seen) / (1 - beta ** (seen + 1)), weight)
    image = weight * vectors * values[..., None, :] + (1 - weight) * product(vectors)
    frame, triangle = jnp.linalg.qr(image)
    turn, sizes, _ = jnp.linalg.svd(triangle)
    trace = weight * so_far + (1 - weight) * jnp.asarray(trace, values.dtype)
    return Spectrum(frame @ turn, sizes, trace, count + 1)


def captured(spectrum: Spectrum, matrix: jax.Array) -> jax.Array:
    r"""Return the share :math:`\|Q^\top G\|^2 / \|G\|^2` of a matrix that lies in the basis.

    Args:
        spectrum: with vectors (..., m, k).
        matrix: (..., m, n). Of a zero matrix the share is 0.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> spectrum = start(jax.random.key(0), size=4, rank=4)
        >>> round(float(captured(spectrum, jnp.ones((4, 3)))), 4)
        1.0
    """
    inside = jnp.swapaxes(spectrum.vectors, -1, -2) @ matrix
    whole = jnp.sum(matrix**2, axis=(-2, -1))
    return jnp.sum(inside**2, axis=(-2, -1)) / jnp.where(whole > 0, whole, 1)


def rotation(old: Spectrum, new: Spectrum) -> jax.Array:
    r"""Return how far a basis has turned: the mean squared sine of its principal angles.

    :math:`1 - \|Q_{old}^\top Q_{new}\|_F^2 / k`, from 0 for the same span to 1 for orthogonal ones.

    Example:
        >>> import jax
        >>> spectrum = start(jax.random.key(0), size=4, rank=2)
        >>> abs(round(float(rotation(spectrum, spectrum)), 4))
        0.0
    """
    overlap = jnp.swapaxes(old.vectors, -1, -2) @ new.vectors
    return 1 - jnp.sum(overlap**2, axis=(-2, -1)) / overlap.shape[-1]
