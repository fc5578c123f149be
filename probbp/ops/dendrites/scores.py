r"""What a dendrite is worth to its neuron, from its output d and the neuron's error.

Every score takes d and the errors :math:`\delta` (rows, n), and optionally the curvature h of the
loss in z (rows, n), and gives a number for each neuron. More axes in front of n are rows too.
"""

import jax
import jax.numpy as jnp

FLOOR = 1e-6
"""Of a standard deviation, so that a constant has no correlation with anything."""


def covariance(d: jax.Array, errors: jax.Array, curvature: jax.Array | None = None) -> jax.Array:
    r"""Return Cascade-Correlation's score for each neuron, in units of the error's deviation.

    .. math:: |\mathrm{cov}(d, \delta)| / \mathrm{sd}(\delta)

    It grows with the amplitude of d: saturated branches win. The division makes neurons and layers
    comparable; the derivative with respect to d is that of the paper's up to this factor.

    Args:
        d: the dendrites' outputs (rows, n).
        errors: of their neurons, as `d`.
        curvature: not used.

    Example:
        >>> import jax.numpy as jnp
        >>> d, errors = jnp.array([[0.0], [1.0], [1.0]]), jnp.array([[1.0], [-1.0], [0.0]])
        >>> round(float(covariance(d, errors)[0]), 3)
        0.408
    """
    d, errors = _rows(d), _rows(errors)
    centred = errors - errors.mean(0)
    return jnp.abs(jnp.mean((d - d.mean(0)) * centred, 0)) / _floored(centred)


def correlation(d: jax.Array, errors: jax.Array, curvature: jax.Array | None = None) -> jax.Array:
    """Return the absolute correlation for each neuron: in [0, 1], blind to scale and shift.

    Args:
        d: the dendrites' outputs (rows, n).
        errors: of their neurons, as `d`.
        curvature: not used.

    Example:
        >>> import jax.numpy as jnp
        >>> d, errors = jnp.array([[0.0], [1.0], [1.0]]), jnp.array([[1.0], [-1.0], [0.0]])
        >>> round(float(correlation(d, errors)[0]), 3)
        0.866
    """
    d = _rows(d)
    return covariance(d, errors) / _floored(d - d.mean(0))


def gain(d: jax.Array, errors: jax.Array, curvature: jax.Array | None = None) -> jax.Array:
    r"""Return the fall of the loss that the best weight gives, to second order, a mean over rows.

    .. math:: \max_v \Big(-v \sum_p \delta_p d_p - \frac{v^2}{2} \sum_p h_p d_p^2\Big)
        = \frac{(\sum_p \delta_p d_p)^2}{2 \sum_p h_p d_p^2}

    Args:
        d: the dendrites' outputs (rows, n).
        errors: of their neurons, as `d`.
        curvature: h of the loss in z, as `d`. Without it the squared errors stand for it.

    Example:
        >>> import jax.numpy as jnp
        >>> d, errors = jnp.array([[0.0], [1.0], [1.0]]), jnp.array([[1.0], [-1.0], [0.0]])
        >>> round(float(gain(d, errors, curvature=jnp.ones((3, 1)))[0]), 3)
        0.083
    """
    d, errors = _rows(d), _rows(errors)
    curvature = errors**2 if curvature is None else _rows(curvature)
    scale = jnp.mean(curvature * d**2, 0)
    return jnp.mean(errors * d, 0) ** 2 / (2 * jnp.maximum(scale, FLOOR**2))


def contributions(d: jax.Array, errors: jax.Array) -> jax.Array:
    """Return each example's part of the loss's derivative by v, (examples, n).

    The positions of a convolution are summed: those of one example are not independent.

    Args:
        d: (examples, ..., n).
        errors: as d, or with one more axis in front, as `sensitivities` gives them.

    Example:
        >>> import jax.numpy as jnp
        >>> d, errors = jnp.array([[0.0], [1.0], [1.0]]), jnp.array([[1.0], [-1.0], [0.0]])
        >>> contributions(d, errors)[:, 0].tolist()
        [0.0, -1.0, 0.0]
    """
    products = errors * d
    positions = tuple(range(products.ndim - d.ndim + 1, products.ndim - 1))
    return products.sum(positions)


def _rows(x):
    return x.reshape(-1, x.shape[-1])


def _floored(centred):
    return jnp.sqrt(jnp.maximum(jnp.mean(centred**2, 0), FLOOR**2))
