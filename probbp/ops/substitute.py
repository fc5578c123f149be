"""One computation's value with another's derivative: what the operations here are defined by."""

import jax
import jax.numpy as jnp

from probbp.types import Tree


def substitute(value: Tree, surrogate: Tree) -> Tree:
    """Return `value`, to be differentiated as `surrogate`.

    Exact: the value, to the bit. The derivative, of any order and in both modes, is the
    surrogate's; where the two are the same computation nothing changes. What the surrogate costs is
    paid only where a derivative is taken: compiled without one, it is dead code.

    `jax.lax.stop_gradient` says which dependences the surrogate has. A dense layer whose error goes
    back through other weights is `substitute(x @ w, stop(x) @ w + x @ stop(b))`; a step function
    that is differentiated as a sigmoid is `substitute((x > 0) * 1.0, jax.nn.sigmoid(x))`.

    A chain whose log density contains it stays exact, in the samplers of BlackJAX and NumPyro as in
    ours, as long as the surrogate depends on nothing but the position: then the substituted
    gradient is a fixed vector field.

    Args:
        value: array or pytree of arrays, of any type.
        surrogate: the same structure and shapes; floating-point leaves have the same dtype.

    Returns:
        `value`. Integer and boolean leaves have no derivative.

    Raises:
        ValueError: where structure, shapes or dtypes differ.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> step = lambda x: substitute(jnp.heaviside(x, 0.5), jax.nn.sigmoid(x))
        >>> value, slope = jax.jvp(step, (0.0,), (1.0,))
        >>> float(value), float(slope)
        (0.5, 0.25)
    """
    if jax.tree.structure(value) != jax.tree.structure(surrogate):
        raise ValueError(
            f"value and surrogate differ in structure: {jax.tree.structure(value)} and "
            f"{jax.tree.structure(surrogate)}."
        )

    def leaf(path, value, surrogate):
        value, surrogate = jnp.asarray(value), jnp.asarray(surrogate)
        if not jnp.issubdtype(value.dtype, jnp.inexact):
            return value
        if (value.shape, value.dtype) != (surrogate.shape, surrogate.dtype):
            raise ValueError(
                f"value{jax.tree_util.keystr(path)} has shape {value.shape} and dtype "
                f"{value.dtype}, its surrogate {surrogate.shape} and {surrogate.dtype}. Broadcast "
                "and cast them alike: one stands in for the other."
            )
        return _substitute(value, surrogate)

    return jax.tree_util.tree_map_with_path(leaf, value, surrogate)


@jax.custom_jvp
def _substitute(value, surrogate):
    return value


@_substitute.defjvp
def _substitute_jvp(primals, tangents):
    # Linear in the tangents, so that JAX transposes it for reverse mode. The recursion keeps the
    # substitution under further derivatives.
    value, surrogate = primals
    return _substitute(value, surrogate), tangents[1]
