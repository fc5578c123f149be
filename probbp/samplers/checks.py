"""Bad input, told at the door in words."""

import inspect
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from probbp.types import LogDensity, Tree, keyed


def check_position(position: Tree) -> None:
    """Require floating-point leaves, and at least one."""
    leaves = jax.tree_util.tree_leaves_with_path(position)
    if not sum(jnp.size(leaf) for _, leaf in leaves):
        raise ValueError(
            "The position holds no parameter to sample: give it at least one floating-point array."
        )
    for path, leaf in leaves:
        dtype = jnp.result_type(leaf)
        if not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(
                f"Langevin moves need floating-point positions, but "
                f"position{jax.tree_util.keystr(path)} has dtype {dtype}. Cast it "
                "(`x.astype(float)`), or sum a discrete variable out of the log density."
            )


def check_logdensity(logdensity_fn: LogDensity, position: Tree) -> None:
    """Require a real scalar."""
    out = jax.eval_shape(keyed(logdensity_fn, jax.random.key(0)), position)
    if not isinstance(out, jax.ShapeDtypeStruct):
        raise TypeError(
            f"logdensity_fn must return one scalar, not {type(out).__name__}; "
            "drop auxiliary outputs (`lambda x: logdensity_fn(x)[0]`)."
        )
    if out.shape != () or not jnp.issubdtype(out.dtype, jnp.floating):
        raise TypeError(
            f"logdensity_fn must return a floating-point scalar, got shape {out.shape} and dtype "
            f"{out.dtype}. Sum the terms of the log density (`jnp.sum`)."
        )


def check_start(logdensity: jax.Array) -> None:
    """Require a finite log density where a chain starts, unless it is being traced."""
    if not isinstance(logdensity, Tracer) and not np.all(np.isfinite(logdensity)):
        raise ValueError(
            f"The log density at the start is {logdensity}: a chain can't leave such a point. "
            "Start inside the support (for a NumPyro model: initialize_model, or Kernel's "
            "init_strategy), and look for overflow there."
        )


def check_key(logdensity_fn: LogDensity, position: Tree) -> None:
    """Require a value that does not depend on the log density's key, unless it is being traced."""
    one, other = (keyed(logdensity_fn, jax.random.key(seed)) for seed in (0, 1))
    if one is logdensity_fn:
        return
    values = one(position), other(position)
    if not isinstance(values[0], Tracer) and not np.allclose(*values, rtol=1e-5, atol=1e-5):
        raise ValueError(
            f"The log density depends on its random key ({values[0]} and {values[1]} for two keys),"
            " so that no chain can keep it. A key may enter derivatives alone, as in probbp.ops. "
            "What is random in the value must be a latent site, or have its key held fast "
            "(functools.partial)."
        )


def check_step_size(step_size: float | jax.Array) -> None:
    """Require a positive, finite step size, unless it is being traced."""
    if not isinstance(step_size, Tracer):
        value = np.asarray(step_size)
        if not np.all(np.isfinite(value) & (value > 0)):
            raise ValueError(
                f"step_size must be positive and finite, got {step_size}. It is BlackJAX's h (drift"
                " h * gradient, noise sqrt(2 h)); `probbp.sample` finds one by itself."
            )


def check_estimator(estimator: Any) -> None:
    """Require a function of a function: an estimator, not its name, and not what makes one."""
    way_out = "Pass what a function of probbp.estimators returns, such as estimator=forward()."
    if not callable(estimator):
        raise TypeError(f"estimator must be a function, got {estimator!r}. {way_out}")
    try:
        signature = inspect.signature(estimator)
    except (TypeError, ValueError):  # a builtin without a signature
        return
    try:
        signature.bind(jax.numpy.sum)
    except TypeError:
        raise TypeError(
            f"estimator must take a function, and {getattr(estimator, '__name__', estimator)} "
            f"takes {signature}. {way_out}"
        ) from None


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Require one of the choices."""
    if value not in choices:
        raise ValueError(f"Unknown {name}={value!r}: choose one of {', '.join(choices)}.")


def check_count(name: str, value: int) -> None:
    """Require a positive integer."""
    if value < 1 or value != int(value):
        raise ValueError(f"{name} must be a positive integer, got {value}.")


def check_floor(floor: float) -> None:
    """Require a floor that is not negative."""
    if not floor >= 0:
        raise ValueError(
            f"floor must not be negative, got {floor}; 0 takes the curvature as it is."
        )


def check_num_keys(num_chains: int, num_steps: int) -> None:
    """Require that each step of each chain has a key of its own."""
    if num_chains * num_steps >= 2**32:
        raise ValueError(
            f"{num_chains} chains of {num_steps} steps need 2**32 keys or more, and would share "
            "some. Take thinning, or several runs with keys of their own."
        )
