"""Gradient reversal: the identity, whose derivative changes sign on the way back.

Ganin et al., 2016, arXiv:1505.07818.
"""

import jax
import jax.numpy as jnp

from probbp.checks import check_number
from probbp.ops.substitute import substitute
from probbp.types import Tree


def gradient_reversal(x: Tree, strength: float | jax.Array = 1.0) -> Tree:
    r"""Return `x`, with derivative :math:`-\lambda I` instead of the identity's.

    What comes before it is trained to make worse what comes after it: an encoder that hides from a
    classifier what it must not know. Exact: the value. It is the identity in every respect for
    `strength=-1`, and cuts the gradient for `strength=0`.

    No function has this derivative in general, so that optimisation with it seeks a saddle point
    and descends on nothing.

    Args:
        x: a floating-point array or a pytree of them; other leaves pass unchanged.
        strength: lambda, a scalar, which itself gets no gradient; it may be traced (a schedule).

    Returns:
        `x`. Both AD modes, derivatives of any order.

    Example:
        >>> import jax
        >>> value, grad = jax.value_and_grad(lambda x: gradient_reversal(x, 0.5) ** 2)(3.0)
        >>> float(value), float(grad)
        (9.0, -3.0)

    Reference:
        Ganin et al., 2016, arXiv:1505.07818, section 4.2.
    """
    check_number("strength", strength, "(-inf, inf)")
    strength = jax.lax.stop_gradient(jnp.asarray(strength))

    def surrogate(leaf):
        leaf = jnp.asarray(leaf)
        is_float = jnp.issubdtype(leaf.dtype, jnp.inexact)
        return -strength.astype(leaf.dtype) * leaf if is_float else leaf

    return substitute(x, jax.tree.map(surrogate, x))
