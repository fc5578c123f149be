"""L-BFGS by Optax, a fixed number of iterations, which can be compiled."""

from collections.abc import Callable

import jax
import optax

from probbp.types import Tree


def minimize(cost: Callable[[Tree], jax.Array], params: Tree, num_iterations: int) -> Tree:
    """Return parameters at which a smooth function without noise is small.

    Args:
        cost: parameters to a scalar.
        params: where to start.
        num_iterations: each of about one evaluation with its gradient, by reverse mode.
    """
    optimizer = optax.lbfgs(memory_size=20)
    value_and_grad = optax.value_and_grad_from_state(cost)

    def body(carry, _):
        params, state = carry
        value, grad = value_and_grad(params, state=state)
        updates, state = optimizer.update(
            grad, state, params, value=value, grad=grad, value_fn=cost
        )
        return (optax.apply_updates(params, updates), state), None

    carry = params, optimizer.init(params)
    (params, _), _ = jax.lax.scan(body, carry, length=num_iterations)
    return params
