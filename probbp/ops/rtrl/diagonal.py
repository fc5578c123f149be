r"""Recurrences whose units do not act on each other: one trace a parameter.

With :math:`h_i' = c(\theta_i, h_i, u)` for every unit i, the sensitivity is block-diagonal, and
carrying it forward takes as much memory as the parameters: linear recurrent units (Zucchet et al.,
2023, arXiv:2305.15947), IndRNN, leaky integrators.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from probbp.ops.rtrl.scan import closure_converted, is_moved, slice_of
from probbp.types import Tree


def diagonal_scan(
    cell: Callable[[Tree, Tree, Tree], Tree],
    params: Tree,
    init: Tree,
    xs: Tree,
    loss: Callable[[Tree, Tree], jax.Array],
) -> tuple[jax.Array, Tree]:
    """Sum a loss over a recurrence of independent units, its gradient carried forward.

    Exact: value and derivatives, in both modes, as of a `jax.lax.scan`. That units are independent
    is not a promise of the caller: `cell` is written for one unit, and mapped. The loss sees all of
    them, as a readout does. For one layer: below another such layer the errors come back through
    time, and this is not their gradient; make the stack one `probbp.ops.rtrl.scan`.

    Cost: for a state of k numbers a unit, k reverse passes through the cell and one through the
    loss a step; (k + 1) times the memory of the parameters, whatever the length.

    Args:
        cell: `(params, state, x) -> state` of one unit. It sees all of `x`, and closes over nothing
            that is differentiated.
        params: pytree of floating-point arrays, with the units on the first axis of each.
        init: pytree of floating-point arrays, with the units on the first axis. A complex state is
            two real numbers.
        xs: pytree of arrays with the time on the first axis.
        loss: `(states, x) -> scalar`, of all units' new states and the input that led there. What
            it closes over is differentiated too.

    Returns:
        The sum of the losses, and the last states.

    Raises:
        TypeError: for a derivative with respect to `xs`, or to what `cell` closes over.
        ValueError: where `params` and `init` differ in the number of units.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> def cell(params, state, x):  # a leaky integrator
        ...     return params["leak"] * state + params["gain"] @ x
        >>> params = {"leak": jnp.full(4, 0.9), "gain": jnp.ones((4, 2))}
        >>> xs = jnp.ones((1000, 2))
        >>> def total(params):
        ...     return diagonal_scan(cell, params, jnp.zeros(4), xs, lambda h, x: jnp.mean(h))[0]
        >>> jax.grad(total)(params)["gain"].shape
        (4, 2)
    """
    params, init, xs = jax.tree.map(jnp.asarray, (params, init, xs))
    _check_units(params, init)
    one_unit = jax.tree.map(lambda leaf: leaf[0], (params, init))
    one_params, one_state = (ravel_pytree(tree) for tree in one_unit)

    def flat_cell(params, state, x):
        new = cell(one_params[1](params), one_state[1](state), x)
        return _ravelled(new).astype(state.dtype)

    def flat_loss(states, x):
        return loss(jax.vmap(one_state[1])(states), x)

    flat_params, flat_init = (jax.vmap(_ravelled)(tree) for tree in (params, init))
    x = slice_of(xs)
    cell_fn, cell_consts = closure_converted(flat_cell, one_params[0], one_state[0], x)
    loss_fn, loss_consts = closure_converted(flat_loss, flat_init, x)
    cells = jax.vmap(cell_fn, in_axes=(None, 0, 0, None))
    zero = jnp.zeros_like(jax.eval_shape(flat_loss, flat_init, x))

    def plain(flat_params, flat_init, loss_consts, cell_consts, xs):
        def step(carry, x):
            states, total = carry
            states = cells(cell_consts, flat_params, states, x)
            return (states, total + loss_fn(loss_consts, states, x)), None

        return jax.lax.scan(step, (flat_init, zero), xs)[0]

    def plain_jvp(primals, tangents):
        flat_params, flat_init, loss_consts, cell_consts, xs = primals
        _require_unmoved(tangents[3:])
        moved = [i for i, dot in enumerate(tangents[2]) if is_moved(dot)]

        def loss_of(states, some, x):
            filled = dict(zip(moved, some, strict=True))
            consts = [filled.get(i, leaf) for i, leaf in enumerate(loss_consts)]
            return loss_fn(consts, states, x)

        pushed = jax.vmap(partial(_pushed, partial(cell_fn, cell_consts)), (0, 0, 0, None))
        some = [loss_consts[i] for i in moved]

        def step(carry, x):
            states, traces, total, grad, grad_some = carry
            states, traces = pushed(flat_params, states, traces, x)
            here, (slope, slope_some) = jax.value_and_grad(loss_of, (0, 1))(states, some, x)
            grad = grad + jnp.einsum("us,usc->uc", slope, traces)
            grad_some = jax.tree.map(jnp.add, grad_some, slope_some)
            return (states, traces, total + here, grad, grad_some), None

        traces = _first_traces(flat_params, flat_init)
        start = (flat_init, traces, zero, traces[:, 0] * 0, jax.tree.map(jnp.zeros_like, some))
        (states, traces, total, grad, grad_some), _ = jax.lax.scan(step, start, xs)

        # Linear in the tangents, so that JAX transposes it for reverse mode.
        dot = jnp.concatenate([_filled(tangents[0]), _filled(tangents[1])], axis=1)
        total_dot = jnp.vdot(grad, dot)
        for part, i in zip(grad_some, moved, strict=True):
            total_dot = total_dot + jnp.vdot(part, tangents[2][i])
        states_dot = jnp.einsum("usc,uc->us", traces, dot)
        return (states, total), (states_dot, total_dot.astype(total.dtype))

    run = jax.custom_jvp(plain)
    run.defjvp(plain_jvp, symbolic_zeros=True)
    states, total = run(flat_params, flat_init, loss_consts, cell_consts, xs)
    return total, jax.vmap(one_state[1])(states)


def _pushed(
    cell: Callable, params: jax.Array, state: jax.Array, trace: jax.Array, x: Tree
) -> tuple[jax.Array, jax.Array]:
    """Step a unit and its trace (states, parameters and first states)."""

    def both(params, state):
        new = cell(params, state, x)
        return new, new

    (by_params, by_state), new = jax.jacrev(both, (0, 1), has_aux=True)(params, state)
    return new, (by_state @ trace).at[:, : params.size].add(by_params)


def _first_traces(params: jax.Array, init: jax.Array) -> jax.Array:
    """Return traces with a column for each parameter of a unit and each entry of its first state.

    Args:
        params: (units, parameters).
        init: (units, states).
    """
    num_units, num_states = init.shape
    num_params = params.shape[1]
    first = jnp.eye(num_states, num_params + num_states, num_params, dtype=init.dtype)
    return jnp.broadcast_to(first, (num_units, *first.shape))


def _check_units(params: Tree, init: Tree) -> None:
    num_units = {leaf.shape[:1] for leaf in jax.tree.leaves((params, init))}
    if len(num_units) != 1 or () in num_units:
        raise ValueError(
            "diagonal_scan takes units on the first axis of every leaf of params and init, as many "
            f"in all; found leading axes {sorted(num_units)}."
        )


def _require_unmoved(tangents: Any) -> None:
    if any(map(is_moved, jax.tree.leaves(tangents))):
        raise TypeError(
            "diagonal_scan has no derivative with respect to xs or to what the cell closes "
            "over: give the cell its parameters by params, and take jax.lax.stop_gradient(xs)."
        )


def _ravelled(tree: Tree) -> jax.Array:
    return ravel_pytree(tree)[0]


def _filled(tangent: Any) -> jax.Array:
    """Return a tangent, or zeros for none."""
    return tangent if is_moved(tangent) else jnp.zeros(tangent.aval.shape, tangent.aval.dtype)
