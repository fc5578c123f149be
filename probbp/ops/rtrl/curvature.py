"""Value, gradient and Gauss-Newton matrix of a long loop in one pass."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from probbp.types import Tree


class GaussNewton(NamedTuple):
    """What `gauss_newton` found.

    Attributes:
        value: the sum of the losses.
        grad: its exact gradient, a pytree like the parameters.
        matrix: (P, P), in the order of `jax.flatten_util.ravel_pytree(params)`.
        carry: the last.
    """

    value: jax.Array
    grad: Tree
    matrix: jax.Array
    carry: Tree


def gauss_newton(
    f: Callable[[Tree, Tree, Tree], tuple[Tree, Tree]],
    params: Tree,
    init: Tree,
    xs: Tree,
    loss: Callable[[Tree, Tree], jax.Array],
) -> GaussNewton:
    r"""Sum a loss of the outputs of a recurrence, with its gradient and Gauss-Newton matrix.

    With :math:`Y_t = dy_t / d\theta` from the sensitivities carried forward, the matrix is

    .. math:: \sum_t Y_t^\top\, \frac{\partial^2 l}{\partial y_t^2}\, Y_t,

    exact for that definition, and the Hessian but for the curvature of y itself. It is positive
    semi-definite where the loss is convex in y. Where y are the natural parameters of the observed
    distribution and the loss is its negative log density, it is the Fisher information of theta,
    given the observed past. Added to the precision of a Gaussian prior it is the precision of a
    Laplace approximation at the mode; inverted, the `inverse_mass_matrix` of a sampler.

    Args:
        f: `(params, carry, x) -> (carry, y)`.
        params: pytree of real arrays, P numbers in all.
        init: pytree of floating-point arrays: the first carry.
        xs: pytree of arrays with the time on the first axis.
        loss: `(y, x) -> scalar`.

    Returns:
        A `GaussNewton`. Memory (n + P) P numbers for n of state, whatever the length.

    Example:
        >>> import jax.numpy as jnp
        >>> f = lambda rate, mean, x: (mean + rate * (x - mean), mean)
        >>> loss = lambda mean, x: 0.5 * (x - mean) ** 2
        >>> found = gauss_newton(f, 0.5, jnp.zeros(()), jnp.sin(jnp.arange(100.0)), loss)
        >>> found.matrix.shape
        (1, 1)
    """
    flat, unravel = ravel_pytree(params)
    init = jax.tree.map(jnp.asarray, init)

    def step(state, x):
        carry, sensitivity, value, grad, matrix = state

        def pushed(tangent, carry_dot):
            return jax.jvp(
                lambda flat, carry: f(unravel(flat), carry, x), (flat, carry), (tangent, carry_dot)
            )

        (carry, y), (sensitivity, y_dot) = jax.vmap(pushed, out_axes=(None, 0))(
            jnp.eye(flat.size, dtype=flat.dtype), sensitivity
        )
        flat_y, unravel_y = ravel_pytree(y)
        columns = jax.vmap(lambda tree: ravel_pytree(tree)[0])(y_dot)

        def loss_of(flat_y):
            return loss(unravel_y(flat_y), x)

        value_here, slope = jax.value_and_grad(loss_of)(flat_y)
        curvature = jax.hessian(loss_of)(flat_y)
        state = (
            carry,
            sensitivity,
            value + value_here,
            grad + columns @ slope,
            matrix + columns @ curvature @ columns.T,
        )
        return state, None

    zero = jnp.zeros_like(flat)
    start = (
        init,
        jax.tree.map(lambda leaf: jnp.zeros((flat.size, *leaf.shape), leaf.dtype), init),
        jnp.zeros((), flat.dtype),
        zero,
        jnp.outer(zero, zero),
    )
    (carry, _, value, grad, matrix), _ = jax.lax.scan(step, start, xs)
    return GaussNewton(value, unravel(grad), matrix, carry)
