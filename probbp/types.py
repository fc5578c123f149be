"""The words that the rooms of probbp share."""

from collections.abc import Callable
from typing import Any, Protocol

import jax

Tree = Any
"""A pytree of floating-point arrays."""

LogDensity = Callable[[Tree], jax.Array]
"""An unnormalised log density: a position to a scalar."""


class ValueAndGrad(Protocol):
    """`jax.value_and_grad(fun)`, given a key first.

    The value is exact; the gradient is an estimate. With the key fixed the estimate is a
    deterministic vector field, which is why a Metropolis test can correct it.
    """

    def __call__(self, rng_key: jax.Array, params: Tree) -> tuple[Any, Tree]:
        """Return `(value, grad)`, or `((value, aux), grad)` for a function with `has_aux`."""
        ...


class Estimator(Protocol):
    """Makes the keyed value and gradient of a scalar function."""

    def __call__(self, fun: Callable, has_aux: bool = False) -> ValueAndGrad:
        """Return `fun`'s keyed value and gradient."""
        ...
