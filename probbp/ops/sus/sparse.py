"""The backward pass through a sample of the weights."""

from functools import partial

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from probbp.ops.sus.blocks import by_blocks
from probbp.ops.sus.forward import forward

# One head: W = softmax(S), O = W V, and G what comes back to O.
#
#  1. The exact backward pass is dV_j = sum_i W_ij G_i and dS_ij = W_ij (G_i . V_j - D_i), where
#     D_i = sum_j W_ij G_i . V_j = G_i . O_i: known from the forward pass, at O(width) a query.
#  2. So all of it is linear in W. Replace W_ij by W_ij / q_ij with probability q_ij, else by 0: the
#     mean over draws is the exact pass. With q_ij = min(1, c W_ij) the terms of a query
#     are sum_j q_ij <= c on average, and W_ij / q_ij = max(W_ij, 1 / c).
#  3. The same as a map of tangents, with the kept weights for W,
#         dO_i = sum_j W_ij dS_ij V_j - (sum_j W_ij dS_ij) O_i + sum_j W_ij dV_j,
#     is linear in (dS, dV), and its transpose is 1. So it is given as a custom_jvp, and JAX makes
#     reverse mode of it: what the tangents gather, the cotangents scatter.
#  4. Residuals are the arguments, O, and the indices and weights of what was kept. What is gathered
#     by them has width as a further axis, and must not be stored: hence `jax.checkpoint` around
#     the loop's body.

_GATHERED_AT_ONCE = 2**20  # numbers, or four keys for every query


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def sparse(options, query, key, value, bias, seen, rng_key):
    """Return the output, differentiated through a sample of its weights."""
    return forward(options, query, key, value, bias, seen)[0]


@partial(sparse.defjvp, symbolic_zeros=True)
def _sparse_jvp(options, primals, tangents):
    query, key, value, bias, seen, rng_key = primals
    d_query, d_key, d_value, d_bias = tangents[:4]
    output, sample = forward(options, query, key, value, bias, seen, rng_key)
    sample = sample._replace(weights=_once_differentiable(sample.weights))
    if bias is None or isinstance(d_bias, SymbolicZero):
        d_bias = None
    else:
        d_bias = _look_up(d_bias, sample.indices)
    wide = sample.weights.dtype
    d_query, d_key, d_value = (
        jnp.zeros(d.shape, wide) if isinstance(d, SymbolicZero) else d.astype(wide)
        for d in (d_query, d_key, d_value)
    )
    time, num_slots = sample.indices.shape[-2:]
    num_blocks = min(-(-num_slots // 4), -(-query.size * num_slots // _GATHERED_AT_ONCE))
    block = partial(_tangent, options)
    rows = (sample, query, output, d_query, d_bias)
    tangent = by_blocks(block, time, num_blocks, rows, key, value, d_key, d_value)
    return output, tangent.astype(output.dtype)


def _tangent(options, rows, key, value, d_key, d_value):
    """Return the tangent of some queries' output, linear in what begins with d_."""
    (indices, weights, is_open), query, output, d_query, d_bias = rows
    wide = weights.dtype

    @jax.vmap  # over the batch
    @jax.vmap  # and key heads
    def gather(table, indices):
        return table.at[indices].get(mode="promise_in_bounds")

    keys, values = gather(key, indices).astype(wide), gather(value, indices).astype(wide)
    d_logits = jnp.einsum("...h,...sh->...s", d_query, keys)
    d_logits += jnp.einsum("...h,...sh->...s", query.astype(wide), gather(d_key, indices))
    d_logits *= options.scale
    if d_bias is not None:
        d_logits += d_bias
    moved = weights * d_logits
    if is_open is not None:
        moved = jnp.where(is_open, moved, 0)
    tangent = jnp.einsum("...s,...sh->...h", moved, values)
    tangent -= jnp.sum(moved, axis=-1, keepdims=True) * output.astype(wide)
    return tangent + jnp.einsum("...s,...sh->...h", weights, gather(d_value, indices))


def _look_up(table, indices):
    """Return what `table` has at `indices` along its last axis; other axes broadcast."""
    if table.shape[-1] == 1:
        return table
    look_up = jnp.take
    for axis in range(-2, -table.ndim - 1, -1):
        look_up = jax.vmap(look_up, in_axes=(None if table.shape[axis] == 1 else 0, 0))
    shared = [axis for axis in range(table.ndim) if table.shape[axis] == 1]
    return look_up(jnp.squeeze(table, shared), indices)


@jax.custom_jvp
def _once_differentiable(x):
    return x


@_once_differentiable.defjvp
def _refuse(primals, tangents):
    raise TypeError(
        "sus.dot_product_attention has first derivatives only: those of the kept weights are not "
        "the attention's. Use keep=None where second derivatives are taken."
    )
