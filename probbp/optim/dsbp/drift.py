r"""Whether inputs still look like those of training, told by activations, without labels.

The non-stationary data of dynamic spectral backpropagation (Muthuraman, 2025, arXiv:2505.23369),
with scores that have a meaning. The reference is probabilistic principal component analysis
(Tipping & Bishop, 1999): activations are Gaussian with mean :math:`\mu` and covariance

.. math:: C = Q\, \mathrm{diag}(\lambda)\, Q^\top + \sigma^2 (I - Q Q^\top),

k directions Q with their variances, and one variance for all the rest. So there is a likelihood, a
p-value that is uniform on reference data where these are Gaussian, and a way back to the reference.
"""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from probbp.checks import check_count, check_number

# Angles and distances to the dtype's precision: accelerators round products unless told.
_matmul = partial(jnp.matmul, precision="highest")


class Reference(NamedTuple):
    """A Gaussian of activations: k directions with their variances, one variance for the rest.

    Attributes:
        mean: (d,).
        basis: (d, k), orthonormal columns, the leading direction first.
        variances: (k,), of the activations along them.
        noise: the variance along every other direction.
    """

    mean: jax.Array
    basis: jax.Array
    variances: jax.Array
    noise: jax.Array


def reference(activations: jax.Array, rank: int) -> Reference:
    r"""Fit the reference by maximum likelihood, in closed form (Tipping & Bishop, 1999, eq. 8).

    Variances are not let fall below the dtype's epsilon times the average variance, nor to zero, so
    that activations that are exactly of low rank, or constant, have a likelihood.

    Args:
        activations: (..., d): all axes but the last are examples.
        rank: k, less than d. The larger, the more the scores see inside the subspace, and the fewer
            directions share the noise.

    Returns:
        A `Reference`. One eigendecomposition of (d, d).

    Raises:
        ValueError: for a rank that is out of range.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> x = jax.random.normal(jax.random.key(0), (10_000, 3)) * jnp.array([1.0, 5.0, 1.0])
        >>> seen = reference(x, rank=1)
        >>> jnp.abs(seen.basis[:, 0]).round(1).tolist(), round(float(seen.noise), 1)
        ([0.0, 1.0, 0.0], 1.0)
    """
    size = activations.shape[-1]
    way_out = f"Of the {size} units some are left for the noise."
    rank = check_count("rank", rank, 0, size - 1, way_out)
    rows = activations.reshape(-1, size)
    mean = jnp.mean(rows, axis=0)
    centred = rows - mean
    variances, vectors = jnp.linalg.eigh(_matmul(centred.T, centred) / len(rows))
    floor = _floor(jnp.mean(variances))
    variances, vectors = variances[::-1], vectors[:, ::-1]
    noise = jnp.maximum(jnp.mean(variances[rank:]), floor)
    return Reference(mean, vectors[:, :rank], jnp.maximum(variances[:rank], floor), noise)


def follow(seen: Reference, activations: jax.Array, decay: jax.Array | float = 0.9) -> Reference:
    r"""Let a reference follow a stream: forget some of what it knows, and take in a batch.

    Moments are those of the mixture of what was known, with weight :math:`\beta`, and the batch,
    the move of the mean included:

    .. math:: C' = \beta C + (1 - \beta) S + \beta (1 - \beta) (m - \mu) (m - \mu)^\top .

    The basis makes one step of block orthogonal iteration with :math:`C'`, and is turned to its
    Ritz vectors; the noise is what is left of the trace, exactly. On a stream that does not change
    the basis goes to the leading eigenvectors at the rate
    :math:`\beta + (1 - \beta) \lambda_{k+1} / \lambda_k` a step; a change is half taken in after
    some :math:`\log 2 / (1 - \beta)` batches. Mean and trace are those of the mixture exactly.

    Args:
        seen: what was known: a `reference`, of the stream's beginning or of training.
        activations: (..., d), a batch; of any size, one example too.
        decay: beta, in (0, 1): how much of what was known stays.

    Returns:
        The `Reference` now. O(n d k + d k^2) operations, no (d, d) matrix; runs under `jax.jit` and
        in `jax.lax.scan`.

    Raises:
        ValueError: for a decay out of range, or activations of another length.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> x = jax.random.normal(jax.random.key(0), (500, 3)) * jnp.array([1.0, 5.0, 1.0])
        >>> now = reference(x[:, ::-1] + 2.0, rank=1)
        >>> for _ in range(50):
        ...     now = follow(now, x[:, jnp.array([1, 0, 2])])
        >>> jnp.abs(now.basis[:, 0]).round(1).tolist()
        [1.0, 0.0, 0.0]
    """
    check_number("decay", decay, "(0, 1)", "For no memory take `reference` of the batch.")
    size, rank = seen.basis.shape
    if activations.shape[-1] != size:
        raise ValueError(
            f"The reference is of {size} units, and activations have {activations.shape[-1]}."
        )
    rows = activations.reshape(-1, size)
    mean = jnp.mean(rows, axis=0)
    move = mean - seen.mean
    batch = jnp.concatenate(
        [
            jnp.sqrt((1 - decay) / len(rows)) * (rows - mean),
            jnp.sqrt(decay * (1 - decay)) * move[None],
        ]
    )

    def times(vectors: jax.Array) -> jax.Array:
        known = _scale(seen, vectors.T, 1.0).T
        return decay * known + _matmul(batch.T, _matmul(batch, vectors))

    basis, _ = jnp.linalg.qr(times(seen.basis))
    variances, turn = jnp.linalg.eigh(_matmul(basis.T, times(basis)))
    variances, basis = variances[::-1], _matmul(basis, turn)[:, ::-1]
    known = jnp.sum(seen.variances) + (size - rank) * seen.noise
    trace = decay * known + jnp.sum(batch**2)
    floor = _floor(trace / size)
    noise = jnp.maximum((trace - jnp.sum(variances)) / (size - rank), floor)
    return Reference(seen.mean + (1 - decay) * move, basis, jnp.maximum(variances, floor), noise)


def mahalanobis(seen: Reference, activations: jax.Array) -> jax.Array:
    """Return the squared distance from the mean, in units of the reference's covariance.

    It sees what is too far, and takes what is too near for better than usual: of digits at half
    their light the area under the ROC is 30 %, where the length of activations tells all; of noise,
    another contrast or turned digits it is 99 % and more, where largest softmax probabilities give
    64 to 75 % (`examples/papers/dsbp_transfer.py`).

    Args:
        seen: the reference.
        activations: (..., d).

    Returns:
        (...,). On reference data it is d on average.

    Example:
        >>> import jax
        >>> x = jax.random.normal(jax.random.key(0), (1000, 3))
        >>> round(float(mahalanobis(reference(x, rank=1), x).mean()), 1)
        3.0
    """
    inside, outside = _split(seen, activations)
    return jnp.sum(inside**2 / seen.variances, axis=-1) + outside / seen.noise


def p_value(seen: Reference, activations: jax.Array) -> jax.Array:
    """Return the probability of activations at least as far away, under the reference.

    It is uniform where activations are Gaussian with the reference's moments. Those of a network
    are not, relu's least of all, and moments are estimated: of held-out digits 29 % are below 5 %
    (`examples/papers/dsbp_transfer.py`). Where the level must hold, rank the distances among
    those of held-out data in place of it: of the same digits 5 %.

    Args:
        seen: the reference.
        activations: (..., d).

    Returns:
        (...,), by the chi-squared distribution with d degrees of freedom.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> x = jax.random.normal(jax.random.key(0), (10_000, 4))
        >>> seen = reference(x, rank=2)
        >>> p_value(seen, jnp.stack([jnp.zeros(4), 6 * jnp.ones(4)])).round(2).tolist()
        [1.0, 0.0]
    """
    distance = mahalanobis(seen, activations)
    finite = jnp.minimum(distance, jnp.finfo(distance.dtype).max)  # of infinity it is NaN, not 0
    return jax.scipy.stats.chi2.sf(finite, len(seen.mean))


def log_likelihood(seen: Reference, activations: jax.Array) -> jax.Array:
    """Return the log density of activations under the reference.

    Args:
        seen: the reference.
        activations: (..., d).

    Returns:
        (...,). O(d k) operations for each.
    """
    size, rank = seen.basis.shape
    log_det = jnp.sum(jnp.log(seen.variances)) + (size - rank) * jnp.log(seen.noise)
    return -0.5 * (mahalanobis(seen, activations) + log_det + size * math.log(2 * math.pi))


def energy_outside(seen: Reference, activations: jax.Array) -> jax.Array:
    """Return the share of the squared distance from the mean that the reference's basis misses.

    Between 0 and 1, and blind to how far away activations are. 0 at the mean itself.

    Args:
        seen: the reference.
        activations: (..., d).

    Returns:
        (...,).

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> x = jax.random.normal(jax.random.key(0), (10_000, 3)) * jnp.array([1.0, 5.0, 1.0])
        >>> new = jnp.array([[0.0, 9.0, 0.0], [9.0, 0.0, 0.0]])
        >>> energy_outside(reference(x, rank=1), new).round(1).tolist()
        [0.0, 1.0]
    """
    inside, outside = _split(seen, activations)
    total = jnp.sum(inside**2, axis=-1) + outside
    return jnp.where(total > 0, outside / jnp.where(total > 0, total, 1), 0.0)


def principal_angles(basis: jax.Array, other: jax.Array) -> jax.Array:
    r"""Return the angles between two subspaces, in radians, rising.

    For instance of the basis that follows a stream, and the reference's. From sines and cosines
    both (Björck & Golub, 1973), so that small angles are exact to the dtype's epsilon, where the
    arc cosine alone has its square root. The distance of the projectors is
    :math:`\|P - P'\|_F = \sqrt 2\, \|\sin \theta\|` for equal dimensions.

    Args:
        basis: (d, k), orthonormal columns.
        other: (d, l), orthonormal columns.

    Returns:
        (min(k, l),), between 0 and pi/2.

    Raises:
        ValueError: if the two are not of one space.

    Example:
        >>> import jax.numpy as jnp
        >>> turned = jnp.array([[jnp.cos(1e-5)], [jnp.sin(1e-5)]])
        >>> round(float(principal_angles(jnp.eye(2)[:, :1], turned)[0]), 7)
        1e-05
    """
    if basis.ndim != 2 or other.ndim != 2 or len(basis) != len(other):
        raise ValueError(
            f"Two bases of one space are (d, k) and (d, l); got {basis.shape} and {other.shape}."
        )
    large, small = (basis, other) if basis.shape[1] >= other.shape[1] else (other, basis)
    overlap = _matmul(large.T, small)
    cosines = jnp.linalg.svd(overlap, compute_uv=False)
    sines = jnp.linalg.svd(small - _matmul(large, overlap), compute_uv=False)[::-1]
    return jnp.arctan2(sines, cosines)


def recolour(activations: jax.Array, seen: Reference, now: Reference) -> jax.Array:
    r"""Give activations of a changed stream the mean and covariance of the reference, no labels.

    Correlation alignment (CORAL; Sun et al., 2016, arXiv:1511.05547), here between two covariances
    of low rank and noise: :math:`\mu + (a - \mu') C'^{-1/2} C^{1/2}`, in O(d k) for each. It helps
    where the change is affine and the classes' shares are as before; where these have changed it
    moves one class onto another, and a change that is no matter of moments, a mirror say, it makes
    worse. Centring alone is `activations - now.mean + seen.mean`.

    Args:
        activations: (..., d).
        seen: the reference.
        now: the same of the stream, `reference(stream, rank)`. Of few examples take a low rank.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> x = jax.random.normal(jax.random.key(0), (10_000, 3)) * jnp.array([1.0, 5.0, 1.0])
        >>> back = recolour(3 * x + 7, reference(x, rank=1), reference(3 * x + 7, rank=1))
        >>> bool(jnp.allclose(back, x, atol=0.01))
        True
    """
    whitened = _scale(now, activations - now.mean, -0.5)
    return seen.mean + _scale(seen, whitened, 0.5)


def _floor(average: jax.Array) -> jax.Array:
    """Return the least variance that a direction is given, beside the average of all."""
    limits = jnp.finfo(average.dtype)
    return jnp.maximum(limits.eps * average, limits.tiny)


def _split(seen: Reference, activations: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return coordinates in the basis, and the squared distance to it."""
    centred = activations - seen.mean
    inside = _matmul(centred, seen.basis)
    return inside, jnp.sum((centred - _matmul(inside, seen.basis.T)) ** 2, axis=-1)


def _scale(seen: Reference, vectors: jax.Array, power: float) -> jax.Array:
    """Multiply by a power of the covariance."""
    rest = seen.noise**power
    inside = _matmul(vectors, seen.basis) * (seen.variances**power - rest)
    return rest * vectors + _matmul(inside, seen.basis.T)
