"""The words that the rooms of probbp share."""

import inspect
from collections.abc import Callable
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
