"""Products of a signal and a kernel whose error goes back through other weights."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from probbp.ops.feedback.weights import like


def through(
    op: Callable[[jax.Array, jax.Array], jax.Array],
    x: jax.Array,
    w: jax.Array,
    feedback: jax.Array,
) -> jax.Array:
    r"""Return `op(x, w)`, whose error goes back to `x` as if `w` had been `feedback`.

    Tangents, and transposed the errors, follow

    .. math:: dy = \mathrm{op}(x, dw) + \mathrm{op}(dx, B)

    with the feedback weights B. Exact: the value, and the derivative with respect to `w` and to all
    else that `op` closes over. Not exact: the derivative with respect to `x`. It is in the limit
    `feedback=w`, to any order.

    `feedback` itself has derivative zero, since it doesn't change the value; `kolen_pollack` gives
    it one. A second derivative is that of the formula above, in x, w and B alike, where signals
    that reach x through other such layers answer to their feedback weights again. It is not the
    Hessian of the loss, it need not be symmetric, and it is not the Jacobian of the first.

    Args:
        op: `(x, w) -> y`, bilinear, or affine in each.
        x: the signal, of any shape that `op` takes.
        w: the kernel.
        feedback: B, of the kernel's shape. It is cast to the kernel's dtype.

    Returns:
        y. Both AD modes, `jit`, `vmap`, `jax.checkpoint`. It costs what `op` and its derivative
        cost; the backward pass keeps `x` and `feedback`, and no longer needs `w`.

    Raises:
        ValueError: for feedback weights of another shape than the kernel's.
        TypeError: for a kernel or feedback weights that are no floating-point numbers.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> x, w, b = jnp.ones(2), jnp.full((2, 3), 2.0), jnp.full((2, 3), 5.0)
        >>> y, error_to = jax.vjp(lambda x, w: through(jnp.matmul, x, w, b), x, w)
        >>> [part.tolist() for part in (y, *error_to(jnp.ones(3)))]
        [[4.0, 4.0, 4.0], [15.0, 15.0], [[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]]

    Reference:
        Lillicrap et al., 2014, arXiv:1411.0247.
    """
    x, w = jnp.asarray(x), jnp.asarray(w)
    feedback = like(w, feedback)
    # What op closes over has derivatives too, which a custom rule sees in its arguments alone. The
    # conversion is cached by function, and a method whose object has changed is the same one: hence
    # a new function.
    converted, closure = jax.closure_convert(lambda x, w: op(x, w), x, w)
    return _through(converted, x, w, feedback, closure)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _through(op, x, w, feedback, closure):
    return op(x, w, *closure)


@partial(_through.defjvp, symbolic_zeros=True)
def _through_jvp(op, primals, tangents):
    # `substitute(op(x, w), op(stop(x), w) + op(x, stop(feedback)))`, but without the stops, behind
    # which mixed second derivatives would be zero.
    x, w, feedback, closure = primals
    dx, dw, _, d_closure = tangents
    value = _through(op, x, w, feedback, closure)
    terms = [
        _push(lambda w, *closure: op(x, w, *closure), (w, *closure), (dw, *d_closure)),
        _push(lambda x: op(x, feedback, *closure), (x,), (dx,)),
    ]
    terms = [term for term in terms if term is not None]
    return value, sum(terms[1:], terms[0]) if terms else jnp.zeros_like(value)


def _push(fun: Callable, primals: tuple, tangents: tuple[Any, ...]) -> jax.Array | None:
    """Return the tangent of `fun`, or `None` where those of its arguments are all zero."""
    if all(isinstance(tangent, SymbolicZero) for tangent in tangents):
        return None
    filled = [
        jnp.zeros_like(primal) if isinstance(tangent, SymbolicZero) else tangent
        for primal, tangent in zip(primals, tangents, strict=True)
    ]
    return jax.jvp(fun, primals, tuple(filled))[1]


def dense(
    x: jax.Array,
    kernel: jax.Array,
    feedback: jax.Array,
    *,
    precision: Any = None,
    preferred_element_type: Any = None,
) -> jax.Array:
    """`x @ kernel`, whose error goes back as `error @ feedback.T`.

    All else as in `through`; the limit is `feedback=kernel`.

    Args:
        x: (..., n).
        kernel: (n, m).
        feedback: (n, m), from one of the rules here; zeros send no error back, so that layers
            below do not learn.
        precision: as in `jax.numpy.matmul`.
        preferred_element_type: as in `jax.numpy.matmul`.

    Returns:
        (..., m).

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from probbp.ops import feedback
        >>> key_kernel, key_feedback = jax.random.split(jax.random.key(0))
        >>> kernel = jax.random.normal(key_kernel, (3, 2))
        >>> fixed = feedback.normal(key_feedback, kernel)
        >>> error = jax.grad(lambda x: feedback.dense(x, kernel, fixed).sum())(jnp.ones(3))
        >>> bool(jnp.allclose(error, fixed.sum(1)))
        True
    """
    op = partial(jnp.matmul, precision=precision, preferred_element_type=preferred_element_type)
    return through(op, x, kernel, feedback)


def conv_general_dilated(
    lhs: jax.Array,
    rhs: jax.Array,
    window_strides: Any,
    padding: Any,
    lhs_dilation: Any = None,
    rhs_dilation: Any = None,
    dimension_numbers: Any = None,
    *,
    feedback: jax.Array,
    **options: Any,
) -> jax.Array:
    """`jax.lax.conv_general_dilated`, whose error goes back through another kernel.

    All else as in `through`; the limit is `feedback=rhs`.

    Args:
        lhs: the images.
        rhs: the kernel.
        window_strides: as in JAX.
        padding: as in JAX.
        lhs_dilation: as in JAX.
        rhs_dilation: as in JAX.
        dimension_numbers: as in JAX.
        feedback: of the kernel's shape.
        **options: JAX's others, such as `feature_group_count` and `precision`.
    """
    op = partial(
        jax.lax.conv_general_dilated,
        window_strides=window_strides,
        padding=padding,
        lhs_dilation=lhs_dilation,
        rhs_dilation=rhs_dilation,
        dimension_numbers=dimension_numbers,
        **options,
    )
    return through(op, lhs, rhs, feedback)


def dot_general(
    lhs: jax.Array, rhs: jax.Array, dimension_numbers: Any, *, feedback: jax.Array, **options: Any
) -> jax.Array:
    """`jax.lax.dot_general`, whose error goes back to `lhs` through other weights than `rhs`.

    This is what Flax's layers take for their `dot_general`. All else as in `through`.

    Args:
        lhs: the signal.
        rhs: the kernel.
        dimension_numbers: as in JAX.
        feedback: of the kernel's shape.
        **options: JAX's others, such as `precision` and `preferred_element_type`.

    Returns:
        As JAX's.

    Example:
        >>> from functools import partial
        >>> import jax.numpy as jnp
        >>> from flax import linen as nn
        >>> layer = nn.Dense(2, dot_general=partial(dot_general, feedback=jnp.ones((3, 2))))
    """
    op = partial(jax.lax.dot_general, dimension_numbers=dimension_numbers, **options)
    return through(op, lhs, rhs, feedback)


def einsum(
    subscripts: str, x: jax.Array, kernel: jax.Array, *, feedback: jax.Array, **options: Any
) -> jax.Array:
    """`jax.numpy.einsum` of a signal and a kernel, whose error goes back through other weights.

    All else as in `through`; the limit is `feedback=kernel`.

    Args:
        subscripts: of two operands, such as "btn,nhd->bthd" for the heads of an attention.
        x: the signal.
        kernel: the weights.
        feedback: of the kernel's shape.
        **options: JAX's others, such as `precision`.

    Returns:
        As JAX's.

    Example:
        >>> import jax.numpy as jnp
        >>> x, kernel = jnp.ones((2, 5, 3)), jnp.ones((3, 4, 6))
        >>> einsum("btn,nhd->bthd", x, kernel, feedback=jnp.ones((3, 4, 6))).shape
        (2, 5, 4, 6)
    """
    return through(partial(jnp.einsum, subscripts, **options), x, kernel, feedback)
