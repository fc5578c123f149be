"""Sensitivities that outlive a scan: gradients while the data stream, and parameters that move."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from probbp.ops.substitute import substitute
from probbp.types import Tree


def advance(
    f: Callable[[Tree, Tree, Tree], Tree], params: Tree, carry: Tree, sensitivity: Tree, xs: Tree
) -> tuple[Tree, Tree]:
    r"""Advance a carry and its sensitivity over the next stretch of a series.

    Stretch after stretch this is the derivative of the whole past, in memory that no stretch adds
    to. Where `params` are the same in all of them it is exact: that of one `scan` over all. Where
    they have been updated in between, :math:`\theta_{t+1} = \theta_t - \eta g_t`, it is the exact
    derivative with respect to one shift of all past and present parameters, which is what online
    learning follows; it is not that of the learner, whose later parameters hang on its earlier.

    Args:
        f: `(params, carry, x) -> carry`.
        params: pytree of real arrays.
        carry: pytree of floating-point arrays, where the last stretch ended.
        sensitivity: of `carry` with respect to `params`, as `jax.jacfwd` would give it: the tree
            of `carry`, with that of `params` in every leaf, `(*carry leaf, *params leaf)`.
            `None` for
            a carry that does not depend on them.
        xs: pytree of arrays with the time on the first axis.

    Returns:
        The carry at the end, and its sensitivity, neither differentiable: `attach` makes it so.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> step = lambda rate, mean, x: mean + rate * (x - mean)
        >>> mean, slope = jnp.zeros(()), None
        >>> for xs in jnp.split(jnp.arange(6.0), 3):
        ...     mean, slope = advance(step, 0.5, mean, slope, xs)
        >>> whole = lambda rate: jax.lax.scan(
        ...     lambda mean, x: (step(rate, mean, x), None), 0.0, jnp.arange(6.0))[0]
        >>> bool(jnp.allclose(slope, jax.grad(whole)(0.5)))
        True
    """
    params, carry, sensitivity = jax.lax.stop_gradient((params, carry, sensitivity))
    params = jax.tree.map(jnp.asarray, params)

    def last(params):
        start = carry if sensitivity is None else attach(carry, sensitivity, params)
        end, _ = jax.lax.scan(lambda carry, x: (f(params, carry, x), None), start, xs)
        return end, end

    sensitivity, end = jax.jacfwd(last, has_aux=True)(params)
    return end, sensitivity


def attach(carry: Tree, sensitivity: Tree, params: Tree) -> Tree:
    """Return `carry`, differentiated as a function of `params` that has this sensitivity.

    Args:
        carry: pytree of arrays.
        sensitivity: as `advance` returns it.
        params: what the derivative is with respect to.

    Returns:
        `carry`, as it is.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> xs, zero = jnp.arange(6.0), jnp.zeros(())
        >>> mean, slope = advance(lambda r, m, x: m + r * (x - m), 0.5, zero, None, xs)
        >>> grad = jax.grad(lambda rate: attach(mean, slope, rate) ** 2)(0.5)
        >>> bool(jnp.allclose(grad, 2 * mean * slope))
        True
    """

    def linear(value, jacobian):
        terms = jax.tree.map(
            lambda column, leaf: jnp.tensordot(column, leaf, axes=jnp.ndim(leaf)), jacobian, params
        )
        surrogate = sum(jax.tree.leaves(terms)) + jnp.zeros_like(value)
        return substitute(value, surrogate.astype(value.dtype))

    carry, sensitivity = jax.lax.stop_gradient((jax.tree.map(jnp.asarray, carry), sensitivity))
    return jax.tree.map(linear, carry, sensitivity)
