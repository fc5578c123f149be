"""How far two sets of weights, or two gradients, point the same way."""

import jax
import jax.numpy as jnp

from probbp.types import Tree


def alignment(a: Tree, b: Tree, *, axis: int | tuple[int, ...] | None = None) -> Tree:
    r"""Return the cosine of the angle between each leaf of `a` and that of `b`.

    - Of kernels and their feedback weights: the alignment that the theory is about.
    - Of two gradients: one number for each parameter. Of losses that differ in their layers alone,
      it is what feedback is worth; `probbp.diagnostics.gradient_quality` does it for estimators.
    - Of two error signals: gradients with respect to the layers' biases, example by example
      (`jax.vmap(jax.grad(loss), (None, 0))`), with `axis=-1`.

    Args:
        a: an array, or a pytree of arrays.
        b: the same structure and shapes.
        axis: over which the cosine is taken; over all entries of a leaf by default.

    Returns:
        The structure of `a`, scalars, or arrays without `axis`. Where one of the two is zero, 0.

    Example:
        >>> import jax.numpy as jnp
        >>> cosines = alignment({"w": jnp.array([1.0, 1.0])}, {"w": jnp.array([1.0, 0.0])})
        >>> round(float(cosines["w"]), 4)
        0.7071

    Reference:
        Song, Xu & Lafferty, 2021, arXiv:2106.06044.
    """

    def cosine(a, b):
        squares = [jnp.sum(jnp.square(leaf), axis) for leaf in (a, b)]
        # Replaced before the root: its derivative at zero is infinite.
        lengths = [jnp.sqrt(jnp.where(square > 0, square, 1)) for square in squares]
        product = jnp.sum(jnp.multiply(a, b), axis)
        return jnp.where(
            jnp.minimum(*squares) > 0, product / (lengths[0] * lengths[1]), jnp.zeros_like(product)
        )

    return jax.tree.map(cosine, a, b)
