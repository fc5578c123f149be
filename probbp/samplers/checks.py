"""Bad input, told at the door in words."""

import os
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from probbp.types import LogDensity, Tree, keyed

A_LOG_DENSITY = "Pass one that maps a position to a scalar."


def check_position(position: Tree, name: str = "position") -> None:
    """Require floating-point leaves, and at least one."""
    leaves = jax.tree_util.tree_leaves_with_path(position)
    if not sum(np.size(leaf) for _, leaf in leaves):
        raise ValueError(
            f"The {name} holds no parameter to sample: give it at least one floating-point array."
        )
    for path, leaf in leaves:
        dtype = leaf.dtype if hasattr(leaf, "dtype") else np.asarray(leaf).dtype
        if not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(
                f"Langevin moves need floating-point positions, but "
                f"{name}{jax.tree_util.keystr(path)} has dtype {dtype}. Cast it "
                "(`x.astype(float)`), or sum a discrete variable out of the log density."
            )


def scalar(logdensity_fn: LogDensity) -> Callable[..., jax.Array]:
    """Return the log density, which requires of its value that it is a real scalar.

    So that it need not be traced for that alone.
    """
    if keyed(logdensity_fn, jax.random.key(0)) is logdensity_fn:
        return lambda position: _required_scalar(logdensity_fn(position))

    def with_key(position: Tree, rng_key: jax.Array | None = None) -> jax.Array:
        fun = logdensity_fn if rng_key is None else keyed(logdensity_fn, rng_key)
        return _required_scalar(fun(position))

    return with_key


def _required_scalar(out: Any) -> Any:
    if not isinstance(out, jax.Array | np.ndarray | np.generic | float | int | complex):
        raise TypeError(
            f"logdensity_fn must return one scalar, not {type(out).__name__}; "
            "drop auxiliary outputs (`lambda x: logdensity_fn(x)[0]`)."
        )
    shape, dtype = jnp.shape(out), jnp.result_type(out)
    if shape != () or not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(
            f"logdensity_fn must return a floating-point scalar, got shape {shape} and dtype "
            f"{dtype}. Sum the terms of the log density (`jnp.sum`)."
        )
    return out


def check_start(logdensity: jax.Array) -> None:
    """Require a finite log density where a chain starts, unless it is being traced."""
    if not isinstance(logdensity, Tracer) and not np.all(np.isfinite(logdensity)):
        raise ValueError(_words_of_start(logdensity))


def check_start_in_trace(logdensity: jax.Array) -> None:
    """Warn, when a program runs that is being traced, of a start with no finite log density.

    By a callback, so that this is for hosts which trace a whole run with its start.
    """

    def warn(logdensity):
        if not np.all(np.isfinite(logdensity)):
            warnings.warn(_words_of_start(logdensity), stacklevel=2)

    if isinstance(logdensity, Tracer):
        jax.debug.callback(warn, logdensity)


def _words_of_start(logdensity):
    return (
        f"The log density at the start is {logdensity}: a chain can't leave such a point. Start "
        "inside the support (for a NumPyro model: initialize_model, or Kernel's init_strategy), "
        "and look for overflow there."
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
        if not (is_real(value) and np.all(np.isfinite(value) & (value > 0))):
            raise ValueError(
                f"step_size must be positive and finite, got {step_size!r}. It is BlackJAX's h "
                "(drift h * gradient, noise sqrt(2 h)); `probbp.sample` finds one by itself."
            )


def check_folder(name: str, folder: str | os.PathLike[str] | None) -> None:
    """Require the name of a folder, or none."""
    if folder is not None and not (isinstance(folder, str | os.PathLike) and os.fspath(folder)):
        raise ValueError(
            f"{name} must be the path of a folder, or None to write nothing, got {folder!r}."
        )


def is_real(value: object) -> bool:
    """Whether a value, or all of an array, is real and a number, neither truth nor text."""
    dtype = np.asarray(value).dtype
    return jnp.issubdtype(dtype, np.floating) or jnp.issubdtype(dtype, np.integer)


def check_num_keys(num_chains: int, num_steps: int) -> None:
    """Require that each step of each chain has a key of its own."""
    if num_chains * num_steps >= 2**32:
        raise ValueError(
            f"{num_chains} chains of {num_steps} steps need 2**32 keys or more, and would share "
            "some. Take thinning, or several runs with keys of their own."
        )
