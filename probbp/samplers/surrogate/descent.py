"""L-BFGS by Optax, which can be compiled and stops where nothing more is gained."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from probbp.types import Tree

STRETCH = 20
"""Iterations between two looks at what was gained."""


def minimize(
    cost: Callable[[Tree], jax.Array],
    params: Tree,
    num_iterations: int,
    least_gain: float = 0.0,
) -> Tree:
    """Return parameters at which a smooth function without noise is small.

    Args:
        cost: parameters to a scalar.
        params: where to start.
        num_iterations: at most; each of about one evaluation with its gradient, by reverse mode.
        least_gain: relative to the cost; where 20 iterations gain less, they are the last.
    """
    optimizer = optax.lbfgs(memory_size=20)
    value_and_grad = optax.value_and_grad_from_state(cost)

    def step(carry, _):
        params, state = carry
        value, grad = value_and_grad(params, state=state)
        updates, state = optimizer.update(
            grad, state, params, value=value, grad=grad, value_fn=cost
        )
        return (optax.apply_updates(params, updates), state), value

    def stretch(carry):
        i, gain, params, state = carry
        (params, state), values = jax.lax.scan(step, (params, state), length=STRETCH)
        gain = (values[0] - values[-1]) / jnp.abs(values[0])
        return i + STRETCH, gain, params, state

    def goes_on(carry):
        i, gain, _, _ = carry
        return (i < num_iterations) & (gain > least_gain)

    state = optimizer.init(params)
    carry = jnp.zeros((), int), jnp.full((), jnp.inf), params, state
    return jax.lax.while_loop(goes_on, stretch, carry)[2]
