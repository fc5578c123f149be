"""The words that the rooms of probbp share."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

import jax

Tree = Any
"""A pytree of floating-point arrays."""

LogDensity = Callable[[Tree], jax.Array]
"""An unnormalised log density: a position to a scalar.

It may take a keyword `rng_key`, with a default, for operations whose backward pass is random. Its
value must not depend on it.
"""


class ValueAndGrad(Protocol):
    """`jax.value_and_grad(fun)`, given a key first.

    The value is exact; the gradient is an estimate. With the key fixed the estimate is a
    deterministic vector field, which is why a Metropolis test can correct it. Where the function
    has an argument `rng_key`, it is handed a key that hangs on the estimator's.
    """

    def __call__(self, rng_key: jax.Array, params: Tree) -> tuple[Any, Tree]:
        """Return `(value, grad)`, or `((value, aux), grad)` for a function with `has_aux`."""
        ...


class Estimator(Protocol):
    """Makes the keyed value and gradient of a scalar function."""

    def __call__(self, fun: Callable, has_aux: bool = False) -> ValueAndGrad:
        """Return `fun`'s keyed value and gradient."""
        ...


WAYS_OUT = {
    "Reverse-mode differentiation does not work": (
        "A loop of dynamic length can be differentiated in forward mode: by probbp.fmala, "
        "probbp.line_fmala, probbp.pc_fmala or probbp.pc_line_fmala, or by "
        "estimator=probbp.estimators.forward(). NumPyro's autoguides start in reverse mode; "
        "AutoNormal(model, forward_mode_differentiation=True) does not. A loop of fixed length "
        "(jax.lax.scan) has both modes."
    ),
    "to a custom_vjp function": (
        "A function with a jax.custom_vjp can be differentiated in reverse mode: by probbp.mala, "
        "or by estimator=probbp.estimators.reverse(). For forward mode give it a jax.custom_jvp. "
        "diffrax.diffeqsolve has it with adjoint=diffrax.ForwardMode(), and "
        "jax.nn.dot_product_attention with implementation='xla'."
    ),
}
"""Words of JAX's two refusals to differentiate, to what can be done instead."""


@contextmanager
def ways_out() -> Iterator[None]:
    """Add to JAX's refusals to differentiate a note with what can be done instead.

    Example:
        >>> import jax
        >>> from probbp.types import ways_out
        >>> loop = lambda x: jax.lax.while_loop(lambda c: c < 3, lambda c: 2 * c, x)
        >>> try:
        ...     with ways_out():
        ...         jax.grad(loop)(1.0)
        ... except ValueError as error:
        ...     print("forward" in error.__notes__[-1])
        True
    """
    try:
        yield
    except (TypeError, ValueError) as error:
        for words, note in WAYS_OUT.items():
            if words in str(error) and note not in getattr(error, "__notes__", ()):
                error.add_note(note)
        raise


def keyed(fun: Callable, rng_key: jax.Array) -> Callable:
    """Return `fun` with its argument `rng_key` set, or `fun` itself if it has none of that name.

    A key that the caller has already set by `functools.partial` is left alone.

    Args:
        fun: any function.
        rng_key: a key.

    Example:
        >>> import jax
        >>> noise = keyed(lambda x, rng_key: x + jax.random.normal(rng_key), jax.random.key(0))
        >>> bool(noise(1.0) == noise(1.0))
        True
    """
    if isinstance(fun, partial) and "rng_key" in fun.keywords:
        return fun
    try:
        takes_key = "rng_key" in inspect.signature(fun).parameters
    except (TypeError, ValueError):  # a builtin without a signature
        return fun
    return partial(fun, rng_key=rng_key) if takes_key else fun
