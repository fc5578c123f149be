"""Score tests: whether a neuron asks for a dendrite at all."""

import jax
import jax.numpy as jnp

from probbp.checks import check_number, check_numbers
from probbp.ops.dendrites.regression import regression
from probbp.ops.dendrites.scores import contributions


def score_test(d: jax.Array, errors: jax.Array) -> tuple[jax.Array, jax.Array]:
    r"""Test for each neuron that its dendrite's weight is 0.

    .. math:: T_i = \Big(\sum_p \delta_p d_p\Big)^2 \Big/ \sum_p (\delta_p d_p)^2
        \to \chi^2_1

    Asymptotic in the number of examples, on rows that neither the dendrite nor its choice was
    fitted to. The network itself was fitted, and errs along its own inputs: give it
    `orthogonalise(d, inputs)`, without which the test rejects too often.

    Args:
        d: (examples, ..., n).
        errors: as d.

    Returns:
        T (n,) and the p-values (n,). A dendrite that says nothing has T = 0.

    Example:
        >>> import jax
        >>> keys = jax.random.split(jax.random.key(0))
        >>> d, errors = (jax.random.normal(key, (500, 3)) for key in keys)
        >>> statistic, p_values = score_test(d, errors - 0.5 * d)
        >>> bool((p_values < 1e-6).all())
        True
    """
    each = contributions(d, errors)
    largest = jnp.max(jnp.abs(each), 0)
    each = each / jnp.where(largest > 0, largest, 1)  # whose squares are neither zero nor infinite
    spread = jnp.sum(each**2, 0)
    statistic = jnp.where(spread > 0, each.sum(0) ** 2 / jnp.where(spread > 0, spread, 1), 0.0)
    return statistic, jax.scipy.special.erfc(jnp.sqrt(statistic / 2))


def orthogonalise(d: jax.Array, inputs: jax.Array, curvature: jax.Array | None = None) -> jax.Array:
    """Return what of d the neuron's own weights and bias cannot say: the efficient score's part.

    A weighted regression of d on the inputs and a constant, for each neuron. A test with it does
    not feel, to first order, that W and b were estimated.

    Args:
        d: (examples, ..., n).
        inputs: (examples, ..., m).
        curvature: as d, the weights of the rows: the curvature of the loss in z; 1 by default.

    Returns:
        As d.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> x = jax.random.normal(jax.random.key(0), (50, 2))
        >>> bool(jnp.allclose(orthogonalise(x @ jnp.ones((2, 1)) + 3, x), 0, atol=1e-4))
        True
    """
    rows, flat = inputs.reshape(-1, inputs.shape[-1]), d.reshape(-1, d.shape[-1])
    ridge = 1e-4 if d.dtype == jnp.float32 else 1e-10
    if curvature is None:
        return regression(rows, ridge=ridge)(flat).reshape(d.shape)

    # One neuron after the other: the systems are small, and there are n of them.
    def one(pair):
        signal, weights = pair
        return regression(rows, weights, ridge=ridge)(signal[:, None])[:, 0]

    return jax.lax.map(one, (flat.T, curvature.reshape(flat.shape).T)).T.reshape(d.shape)


def false_discovery(p_values: jax.Array, level: float = 0.05) -> jax.Array:
    """Return which of many tests reject, with a false discovery rate of at most `level`.

    Args:
        p_values: (n,), independent or positively dependent.
        level: the expected share of false ones among those that reject.

    Example:
        >>> import jax.numpy as jnp
        >>> false_discovery(jnp.array([0.02, 0.9, 0.03, 0.6]), 0.1).tolist()
        [True, False, True, False]

    Reference:
        Benjamini & Hochberg, 1995.
    """
    check_number("level", level, "(0, 1)")
    check_numbers("p_values", p_values, "[0, 1]")
    n = p_values.size
    ordered = jnp.sort(p_values)
    passes = ordered <= level * jnp.arange(1, n + 1) / n
    last = jnp.max(jnp.where(passes, ordered, -jnp.inf))
    return p_values <= last
