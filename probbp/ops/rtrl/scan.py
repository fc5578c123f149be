"""`jax.lax.scan` with the derivative of its last carry carried forward."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import eval_jaxpr
from jax.custom_derivatives import SymbolicZero, zero_from_primal
from jax.flatten_util import ravel_pytree

from probbp.checks import check_count
from probbp.ops.forward_only import forward_only
from probbp.types import Tree


def scan(
    f: Callable[[Tree, Tree], tuple[Tree, Tree]],
    init: Tree,
    xs: Tree = None,
    length: int | None = None,
    reverse: bool = False,
    unroll: int | bool = 1,
    *,
    batch_size: int | None = None,
    by_leaf: bool = False,
) -> tuple[Tree, Tree]:
    """Scan as `jax.lax.scan` does, in reverse mode without storing the states.

    Exact: the value, and every derivative of the last carry. What a loss needs goes into the carry,
    as `total + loss_t`. Differentiated are `init` and whatever `f` closes over; parameters that
    change on a schedule are that, with the schedule in `xs`. States may be pytrees, with integers
    and complex numbers in them. Loops that act on each other are the parts of one carry: all cross
    terms of their sensitivities are there, without which the gradient is wrong.

    Cost: one pass with a directional derivative for each of the P floating-point numbers that are
    differentiated, and (n + P) P numbers of memory for n of state, whatever the length. Data and
    parameters that are not differentiated cost nothing; without a derivative this is `lax.scan`.
    The rule is linear, so that both modes have it: a single `jax.jvp` costs as much as the
    gradient, `jax.jacfwd` no more. `jax.hessian`, which is forward over reverse mode, keeps the
    memory constant; reverse over reverse mode is right, but stores the pass.

    Args:
        f: carry and slice of `xs` to carry and output, as in `jax.lax.scan`.
        init: the first carry.
        xs: pytree of arrays with the time on the first axis.
        length: number of steps, where `xs` is `None`.
        reverse: whether time runs from the end of `xs`.
        unroll: as in `jax.lax.scan`.
        batch_size: how many columns of the sensitivity are carried at once; all by default. Memory
            is n x `batch_size`, and each batch repeats the pass.
        by_leaf: whether every array that is differentiated has a pass of its own, which carries
            only the parts of the state that it reaches. That is for cascades of loops with many
            parameters each.

    Returns:
        The last carry and the stacked outputs.

    Raises:
        TypeError: for a derivative with respect to `xs`, or to complex parameters, or one through
            the stacked outputs in reverse mode (forward mode has it).

    Example:
        >>> import jax, jax.numpy as jnp
        >>> def loss(rate, xs):  # of a moving average that predicts the next value
        ...     def step(carry, x):
        ...         mean, total = carry
        ...         return (mean + rate * (x - mean), total + (x - mean) ** 2), None
        ...
        ...     (_, total), _ = scan(step, (0.0, 0.0), xs)
        ...     return total
        >>> slope = jax.grad(loss)(0.5, jnp.sin(jnp.arange(1000.0)))
        >>> bool(slope < 0)
        True

    Reference:
        Bird & Polivoda, 2021, arXiv:2103.15589 (discrete forward sensitivities, several loops).
    """
    init, xs = jax.tree.map(jnp.asarray, (init, xs))
    if length is not None:
        length = check_count("length", length, 0)
    if batch_size is not None:
        batch_size = check_count("batch_size", batch_size)
    _check_lengths(xs, length)
    converted, consts = closure_converted(f, init, slice_of(xs))

    def plain(consts, init, xs):
        def step(carry, x):
            return converted(consts, carry, x)

        return jax.lax.scan(step, init, xs, length, reverse, unroll)

    def plain_jvp(primals, tangents):
        consts, init, xs = jax.tree.map(jnp.asarray, primals)
        *moved, xs_dot = tangents
        if any(map(is_moved, jax.tree.leaves(xs_dot))):
            raise TypeError(
                "rtrl.scan has no derivative with respect to xs, which would take a column for "
                "every step: use jax.lax.stop_gradient(xs), or jax.lax.scan."
            )
        leaves, treedef = jax.tree.flatten((consts, init))
        dots = jax.tree.leaves(moved)
        columns = [i for i, dot in enumerate(dots) if is_moved(dot)]

        def partly(indices):
            def run(some):
                filled = dict(zip(indices, some, strict=True))
                merged = [filled.get(i, leaf) for i, leaf in enumerate(leaves)]
                consts, init = treedef.unflatten(merged)
                return plain(consts, init, xs)

            return run, [leaves[i] for i in indices], [dots[i] for i in indices]

        parts = []
        for indices in [[i] for i in columns] if by_leaf else [columns]:
            run, some, some_dot = partly(indices)
            outputs, sensitivity = _pushed(run, some, batch_size)
            parts.append((outputs, _contracted(ravel_pytree(some_dot)[0], sensitivity)))
        (carry, ys), _ = parts[0]
        carry_dot = jax.tree.map(lambda *terms: sum(terms), *(dot for _, dot in parts))
        ys_dot = _outputs_dot(*partly(columns))
        return (carry, ys), (_with_integers(carry, carry_dot), _with_integers(ys, ys_dot))

    run = jax.custom_jvp(plain)
    run.defjvp(plain_jvp, symbolic_zeros=True)
    return run(consts, init, xs)


def _check_lengths(xs: Tree, length: int | None) -> None:
    """Require leaves with as many steps as there are."""
    lengths = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(xs)}
    if not lengths and length is None:
        raise ValueError("rtrl.scan takes as many steps as xs has, or length of them: pass one.")
    if () in lengths or len(lengths | ({(length,)} if length is not None else set())) > 1:
        raise ValueError(
            f"rtrl.scan takes the steps along the first axis of every leaf of xs, as many in each "
            f"and as length says; found leading axes {sorted(lengths)} and length={length}."
        )


def closure_converted(f: Callable, *examples: Tree) -> tuple[Callable, list[jax.Array]]:
    """Return `f(consts, *args)` for arguments like the examples, and what `f` closed over."""
    closed, shape = jax.make_jaxpr(f, return_shape=True)(*examples)
    jaxpr, structure = closed.jaxpr, jax.tree.structure(shape)  # what outlives a trace: no tracer

    def converted(consts, *args):
        out = eval_jaxpr(jaxpr, consts, *jax.tree.leaves(args))
        return jax.tree.unflatten(structure, out)

    return converted, closed.consts


def slice_of(xs: Tree) -> Tree:
    """Return the shapes of what a scan over `xs` hands on at each step."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), xs)


def is_moved(tangent: Any) -> bool:
    """Whether a tangent of a rule with symbolic zeros is there."""
    # `jax.jvp` hands on Python numbers, which have no dtype.
    is_empty = getattr(tangent, "dtype", None) == jax.dtypes.float0
    return not (isinstance(tangent, SymbolicZero) or is_empty)


def _pushed(run: Callable, leaves: list[jax.Array], batch_size: int | None) -> tuple[Any, Tree]:
    """Return the outputs of a scan, and the derivative of the carry, columns on the first axis."""
    for leaf in leaves:
        if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
            raise TypeError(
                "rtrl.scan differentiates real parameters: make the complex ones inside the scan "
                "of their real and imaginary parts, jax.lax.complex(real, imag)."
            )
    flat, unravel = ravel_pytree(leaves)

    def inexact(some):
        carry, ys = run(some)
        return [leaf for leaf in jax.tree.leaves(carry) if _is_inexact(leaf)], (carry, ys)

    def column(index):
        tangent = unravel(jnp.zeros_like(flat).at[index].set(1))
        _, tangent_out, outputs = jax.jvp(inexact, (leaves,), (tangent,), has_aux=True)
        return outputs, tangent_out

    if batch_size is None or batch_size >= flat.size:
        return jax.vmap(column, out_axes=(None, 0))(jnp.arange(flat.size))
    # All batches would stack the outputs, P times: one pass more makes them.
    sensitivity = jax.lax.map(lambda i: column(i)[1], jnp.arange(flat.size), batch_size=batch_size)
    return run(leaves), sensitivity


def _contracted(dot: jax.Array, sensitivity: list[jax.Array]) -> list[jax.Array]:
    """Return the directional derivative: linear in `dot`, so that JAX can transpose it."""
    return [jnp.tensordot(dot, s, axes=1).astype(s.dtype) for s in sensitivity]


def _outputs_dot(run: Callable, leaves: list[jax.Array], dots: list[jax.Array]) -> list[jax.Array]:
    """Return the directional derivative of the stacked outputs, for forward mode."""

    def inexact(some):
        return [leaf for leaf in jax.tree.leaves(run(some)[1]) if _is_inexact(leaf)]

    # Under `checkpoint` reverse mode stores nothing for a derivative that it must refuse anyway.
    pushed = jax.checkpoint(lambda leaves, dots: jax.jvp(inexact, (leaves,), (dots,))[1])
    reason = (
        "rtrl.scan has no gradient through the stacked outputs, which would take the memory that "
        "it saves. Put the running loss in the carry, or use jax.lax.scan."
    )
    return pushed(leaves, forward_only(dots, reason))


def _with_integers(tree: Tree, tangents: list[jax.Array]) -> Tree:
    """Return the tangents of a tree's inexact leaves with those, empty, of the others."""
    given = iter(tangents)
    return jax.tree.map(
        lambda leaf: next(given) if _is_inexact(leaf) else zero_from_primal(leaf), tree
    )


def _is_inexact(leaf: jax.Array) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.inexact)
