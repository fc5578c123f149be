"""Runge and Kutta's method of fourth order, for the small differential equations of models.

Both AD modes, `jit` and `vmap` go through. For stiff or long problems take a solver such as
diffrax's.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from probbp.checks import check_count


def step(
    field: Callable[[jax.Array], jax.Array], state: jax.Array, h: float | jax.Array
) -> jax.Array:
    """Return the state of an autonomous differential equation a time h later.

    Args:
        field: `state -> derivative`.
        state: (dim,).
        h: length of the step; the error of an interval falls with its fourth power.

    Example:
        >>> import jax.numpy as jnp
        >>> round(float(step(lambda x: -x, jnp.ones(1), 0.1)[0]), 5)  # exp(-0.1)
        0.90484
    """
    k1 = field(state)
    k2 = field(state + h / 2 * k1)
    k3 = field(state + h / 2 * k2)
    k4 = field(state + h * k3)
    return state + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)


def solve(
    field: Callable[[jax.Array], jax.Array],
    initial: jax.Array,
    times: jax.Array,
    num_substeps: int = 4,
) -> jax.Array:
    """Return the states of an autonomous differential equation at given times.

    Args:
        field: `state -> derivative`.
        initial: state (dim,) at the first of the times.
        times: (times,).
        num_substeps: steps between two times.

    Returns:
        States (times, dim).

    Example:
        >>> import jax.numpy as jnp
        >>> times = jnp.linspace(0.0, 1.0, 5)
        >>> states = solve(lambda x: -x, jnp.ones(1), times)
        >>> bool(jnp.allclose(states[:, 0], jnp.exp(-times), atol=1e-5))
        True
    """
    num_substeps = check_count("num_substeps", num_substeps)

    def interval(state, duration):
        h = duration / num_substeps
        state, _ = jax.lax.scan(
            lambda state, _: (step(field, state, h), None), state, length=num_substeps
        )
        return state, state

    _, states = jax.lax.scan(interval, initial, jnp.diff(times))
    return jnp.concatenate([initial[None], states])
