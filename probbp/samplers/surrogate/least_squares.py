"""Levenberg-Marquardt, for the refinement of a map: compiled in one piece, robust, few iterations.

Each iteration costs the residuals' gradients and one Cholesky factor, and where the residuals can
be made zero convergence is quadratic; L-BFGS needs hundreds of iterations there.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from probbp.types import Tree

PENALTY = 1e-5
"""Of squared changes: what no residual says stays."""

FIRST_DAMPING = 1e-2
FACTOR = 4.0
"""By which damping falls after an iteration that gained, and grows after one that did not."""

LEAST_GAIN = 1e-3
PATIENCE = 4
"""Iterations in a row that gain less than `LEAST_GAIN` of the cost are the last ones."""


class _Point(NamedTuple):
    """Where the search is: parameters, their cost, all residuals, and their Jacobian matrix."""

    params: jax.Array
    cost: jax.Array
    residuals: jax.Array
    jacobian: jax.Array


def least_squares(
    residual: Callable[[Tree, Tree], jax.Array],
    params: Tree,
    points: Tree,
    weights: jax.Array,
    num_iterations: int = 60,
) -> tuple[Tree, jax.Array, jax.Array]:
    r"""Return parameters where the residuals, less their weighted mean, are small.

    Minimizes :math:`\sum_i w_i (2 \sqrt{1 + r_i^2} - 2) + 10^{-5} |p - p_0|^2`: squares where
    residuals are small, absolute values where they are large.

    Args:
        residual: parameters and one point to a scalar.
        params: where to start.
        points: a pytree whose leaves have the points, n, as leading axis.
        weights: (n,), which sum to one; a point without weight is predicted, not fitted.
        num_iterations: at most.

    Returns:
        The parameters, and the residuals (n,) at the start and at the end.
    """
    first, unravel = ravel_pytree(params)
    one = lambda flat, point: residual(unravel(flat), point)
    over_points = jax.vmap(jax.value_and_grad(one), (None, 0))

    def evaluate(flat):
        centered = (leaf - weights @ leaf for leaf in over_points(flat, points))
        residuals, jacobian = centered
        spread = weights @ (2 * jnp.sqrt(1 + residuals**2) - 2)
        return _Point(flat, spread + PENALTY * jnp.sum((flat - first) ** 2), residuals, jacobian)

    def body(carry):
        i, num_idle, damping, start, best = carry
        step = _step(best, best.params - first, weights, damping)
        # The first iteration evaluates the start, so that all of this is compiled once.
        new = evaluate(jnp.where(i == 0, first, best.params + step))
        is_better = (new.cost < best.cost) | (i == 0)
        has_gained = best.cost - new.cost > LEAST_GAIN * best.cost
        num_idle = jnp.where(has_gained | (i == 0), 0, num_idle + 1)
        damping = damping * jnp.where(i == 0, 1, jnp.where(is_better, 1 / FACTOR, FACTOR))
        best = jax.tree.map(partial(jnp.where, is_better), new, best)
        return i + 1, num_idle, damping, jnp.where(i == 0, new.residuals, start), best

    def goes_on(carry):
        i, num_idle, *_ = carry
        return (i < num_iterations) & (num_idle < PATIENCE)

    num, dtype = len(weights), first.dtype
    none = jnp.zeros(num, dtype)
    blank = _Point(first, jnp.zeros((), dtype), none, jnp.zeros((num, first.size), dtype))
    zero = jnp.zeros((), int)
    carry = zero, zero, jnp.asarray(FIRST_DAMPING, dtype), none, blank
    *_, start, best = jax.lax.while_loop(goes_on, body, carry)
    return unravel(best.params), start, best.residuals


def _step(at, moved, weights, damping):
    """Solve for the step of the reweighted problem, in the smaller of its two forms."""
    num, size = at.jacobian.shape
    root = jnp.sqrt(weights / jnp.sqrt(1 + at.residuals**2))
    jacobian = root[:, None] * at.jacobian
    downhill = -(jacobian.T @ (root * at.residuals) + PENALTY * moved)
    total = PENALTY + damping
    if size <= num:
        return _solve(jacobian.T @ jacobian + total * jnp.eye(size, dtype=root.dtype), downhill)
    inner = jacobian @ jacobian.T + total * jnp.eye(num, dtype=root.dtype)
    return (downhill - jacobian.T @ _solve(inner, jacobian @ downhill)) / total


def _solve(matrix, vector):
    return jax.scipy.linalg.cho_solve(jax.scipy.linalg.cho_factor(matrix), vector)
