"""Attention whose backward pass keeps a random few of the weights: linear in the length.

Pankov & Harik, 2025, arXiv:2505.15080.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from probbp.ops.blocks import by_blocks
from probbp.ops.systematic import systematic

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


Sampling = Literal["systematic", "filled", "independent"]

_LOGITS_AT_ONCE = 2**20  # held in the forward pass, or `_LEAST_ROWS` rows of every head
_LEAST_ROWS = 32
_GATHERED_AT_ONCE = 2**20  # numbers in the backward pass, or four keys for every query


def dot_product_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None = None,
    mask: jax.Array | None = None,
    *,
    keep: float | None,
    rng_key: jax.Array | None = None,
    sampling: Sampling = "systematic",
    scale: float | None = None,
    is_causal: bool = False,
    query_seq_lengths: jax.Array | None = None,
    key_value_seq_lengths: jax.Array | None = None,
    local_window_size: int | tuple[int, int] | None = None,
) -> jax.Array:
    r"""Return `jax.nn.dot_product_attention`, whose gradient passes through few of its weights.

    The backward pass sees :math:`\hat W_{ij} = W_{ij} / q_{ij}` with probability :math:`q_{ij}` and
    0 otherwise, in place of the weight :math:`W_{ij}`, where

    .. math::
        q_{ij} = \min(1, c W_{ij}), \qquad
        dV_j = \sum_i \hat W_{ij} G_i, \qquad
        dS_{ij} = \hat W_{ij} (G_i \cdot V_j - G_i \cdot O_i),

    c is `keep`, G what comes back to the output O, and S the logits.

    Exact: the value, which does not depend on the key. Estimated, without bias: the gradient with
    respect to query, key, value and bias, through any number of layers that have independent keys.
    With one key for two layers it is biased.

    The variance falls with `keep` and with how peaked the weights are; its tails are heavy. Where
    they are so diffuse that a query attends to many more keys than `keep`, no choice of a few is
    quiet: `tests/benchmarks/sus.py` prints the curve. To choose `keep`, let
    `probbp.diagnostics.gradient_quality(rng_key, reverse(), loss, params)` measure the relative
    variance on a batch, `loss` having an argument `rng_key` that it splits among the layers: it
    adds to that of the batches, and is harmless where it is small beside it.

    The limit: `keep=None`, or at least the number of keys, has the exact derivative, of any order.
    Both compute in blocks of queries and never hold all weights.

    Args:
        query: (batch, time, heads, width), or without batch, like all that follows.
        key: (batch, keys, key heads, width); `heads` is a multiple of `key heads`.
        value: (batch, keys, key heads, width).
        bias: added to the logits, broadcastable to (batch, heads, time, keys).
        mask: booleans, broadcastable to the same; a query attends where it is true.
        keep: c, the expected number of weights that the gradient of a query and head passes
            through, at most. `None` keeps all.
        rng_key: of the draw. Give each layer, each step and, under `vmap`, each example its own;
            `jax.checkpoint` makes the same draw again. Without a key the derivative is the exact
            one, at its cost, so that evaluation needs none.
        sampling: how entries are drawn with these probabilities. "systematic" keeps at most
            `keep`, rounded up, whatever the draw, with less variance than independent draws.
            "filled" first raises c until the probabilities sum to about `keep`, which they don't
            where weights are above 1 / c: less variance again, for two more passes over the
            weights. "independent" are the paper's coin flips, one random number for every weight;
            if they keep more than `keep` + 4 sqrt(`keep`), so many of these are chosen at random,
            and weighted.
        scale: of the logits, 1 / sqrt(width) by default.
        is_causal: whether query t sees only keys up to t.
        query_seq_lengths: (batch,), beyond which the output is zero.
        key_value_seq_lengths: (batch,), beyond which keys are not seen.
        local_window_size: how many keys before and after its own place a query sees; an integer for
            both.

    Returns:
        The attention, shaped as `query`. Half precision is accumulated in single. Double precision
        is kept throughout, where JAX takes the softmax in single.

        The forward pass is quadratic in time, and makes the draw when it is to be
        differentiated. The backward pass is O(time * (keep + 4) * width) a head. Memory is
        O(time * (width + keep)) a head. `jit`, `vmap`, `jax.checkpoint` and both AD modes; second
        derivatives with `keep=None` only.

    Raises:
        ValueError: for shapes that do not fit, a mask that is not boolean, an unknown `sampling`,
            or `keep` not above zero.
        TypeError: for a `keep` or `scale` that is traced, and where a second derivative is taken.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from probbp.ops import sus
        >>> query, key, value = jax.random.normal(jax.random.key(0), (3, 2, 512, 4, 16))
        >>> def loss(value, rng_key):
        ...     mixed = sus.dot_product_attention(query, key, value, keep=32, rng_key=rng_key)
        ...     return jnp.sum(mixed**2)
        >>> estimate = jax.jit(jax.grad(loss))(value, jax.random.key(1))
        >>> exact = jax.grad(loss)(value, None)
        >>> bool(jnp.vdot(estimate, exact) > 0.9 * jnp.vdot(exact, exact))
        True

        In Flax, Linen's layers take a partial of it for `attention_fn`, made in a module's
        `__call__` with `rng_key=self.make_rng("sus")`. NNX's pass more keywords, and keys live in
        modules:

        >>> from flax import nnx
        >>> class Attention(nnx.Module):
        ...     def __init__(self, keep, *, rngs):
        ...         self.keep, self.rngs = keep, rngs.fork()
        ...     def __call__(self, query, key, value, mask=None, *, is_causal=False, **_):
        ...         options = {"keep": self.keep, "rng_key": self.rngs(), "is_causal": is_causal}
        ...         return sus.dot_product_attention(query, key, value, mask=mask, **options)
        >>> attention = Attention(32, rngs=nnx.Rngs(1))
        >>> layer = nnx.MultiHeadAttention(
        ...     4, 16, decode=False, rngs=nnx.Rngs(0), attention_fn=attention
        ... )

    Reference:
        Pankov & Harik, 2025, arXiv:2505.15080. The derivation in terms of tangents and the
        sampling other than "independent" are ours.
    """
    is_batched = jnp.ndim(query) == 4
    query, key, value = (
        _four_axes(name, x) for name, x in {"query": query, "key": key, "value": value}.items()
    )
    bias = None if bias is None else _four_axes("bias", bias)
    mask = None if mask is None else _four_axes("mask", mask)
    lengths = {
        "query_seq_lengths": query_seq_lengths,
        "key_value_seq_lengths": key_value_seq_lengths,
    }
    _check_shapes(query, key, value, bias, mask, lengths)
    batch, time, heads, width = query.shape
    num_keys, key_heads = key.shape[1:3]
    if sampling not in _RULES:
        raise ValueError(f"sampling must be one of {', '.join(_RULES)}, got {sampling!r}.")
    keep = math.inf if keep is None else _number("keep", keep)
    if not keep > 0:
        raise ValueError(f"keep must be above zero, got {keep}. keep=None keeps all weights.")
    if isinstance(local_window_size, int):
        local_window_size = (local_window_size, local_window_size)
    options = _Options(
        scale=width**-0.5 if scale is None else _number("scale", scale),
        is_causal=is_causal,
        window=local_window_size,
        keep=keep,
        sampling=sampling,
    )

    # Heads come first, in groups that share a key head; then time and width.
    def grouped(x):
        key_axis = 1 if x.shape[1] == 1 else key_heads
        return x.reshape(x.shape[0], key_axis, -1, *x.shape[2:])

    query = grouped(jnp.swapaxes(query, 1, 2))
    key, value = jnp.swapaxes(key, 1, 2), jnp.swapaxes(value, 1, 2)
    bias = None if bias is None else grouped(bias)
    mask = None if mask is None else grouped(mask)
    seen = _Seen(mask, query_seq_lengths, key_value_seq_lengths)
    if keep >= num_keys or rng_key is None:
        output, _ = _forward(options, query, key, value, bias, seen)
    else:
        output = _sparse(options, query, key, value, bias, seen, rng_key)
    output = jnp.swapaxes(output.reshape(batch, heads, time, width), 1, 2)
    if query_seq_lengths is not None:
        is_query = jnp.arange(time) < query_seq_lengths[:, None]
        output = output * is_query[:, :, None, None].astype(output.dtype)
    return output if is_batched else output[0]


# ---------------------------------------------------------------------------------------
# What is passed around.


class _Options(NamedTuple):
    """What is known when the program is traced."""

    scale: float
    is_causal: bool
    window: tuple[int, int] | None
    keep: float
    sampling: Sampling

    @property
    def num_slots(self) -> int:
        """How many weights of a query and head there is place for."""
        excess = 4 * math.sqrt(self.keep) if self.sampling == "independent" else 0
        return math.ceil(self.keep + excess)


class _Seen(NamedTuple):
    """Who sees whom, beside what `_Options` say.

    Attributes:
        mask: (batch | 1, key heads | 1, group | 1, time | 1, keys | 1).
        query_lengths: (batch,).
        key_lengths: (batch,).
    """

    mask: jax.Array | None
    query_lengths: jax.Array | None
    key_lengths: jax.Array | None


class _Rows(NamedTuple):
    """What the forward pass needs of some queries; time is the axis before the last.

    Attributes:
        index: (time, 1), their places.
        query: (batch, key heads, group, time, width).
        bias: (batch | 1, key heads | 1, group | 1, time | 1, keys | 1).
        mask: as `bias`.
        uniform: (batch, key heads, group, time, 1), where a sample is drawn.
    """

    index: jax.Array
    query: jax.Array
    bias: jax.Array | None
    mask: jax.Array | None
    uniform: jax.Array | None


class _Sample(NamedTuple):
    """The weights that were kept.

    Attributes:
        indices: (batch, key heads, group, time, slots), of their keys.
        weights: the same, W / q; zero in a slot that is empty.
        is_open: (batch, key heads, group, time, 1), whether the query sees any key; if it does not,
            its weights are all equal, and depend on no logit. `None` where all do.
    """

    indices: jax.Array
    weights: jax.Array
    is_open: jax.Array | None


# ---------------------------------------------------------------------------------------
# The forward pass.


def _forward(options, query, key, value, bias, seen, rng_key=None) -> tuple[jax.Array, Any]:
    """Return the output, shaped as the query, and with a key a `_Sample` of its weights."""
    *heads, time, _ = query.shape
    uniform = key_coins = None
    if rng_key is not None:
        key_rows, key_coins = jax.random.split(rng_key)
        wide = jnp.promote_types(key.dtype, jnp.float32)
        uniform = jax.random.uniform(key_rows, (*heads, time, 1), wide)
    rows = _Rows(jnp.arange(time)[:, None], query, bias, seen.mask, uniform)
    num_logits = math.prod(heads) * time * key.shape[-2]
    size = max(_LEAST_ROWS, _LOGITS_AT_ONCE * time // max(num_logits, 1))
    block = partial(_attend, options, seen, key_coins)
    return by_blocks(block, time, -(-time // size), rows, key, value)


def _attend(options, seen, key_coins, rows, key, value):
    """Return output and sample of some queries."""
    wide = jnp.promote_types(key.dtype, jnp.float32)
    logits = jnp.einsum("bkgth,bksh->bkgts", rows.query, key, preferred_element_type=wide)
    logits = logits * options.scale
    if rows.bias is not None:
        logits = (logits + rows.bias).astype(wide)
    is_seen = _is_seen(options, seen, rows, key.shape[-2])
    if is_seen is not None:
        # As in JAX: finite, so that a query that sees nothing weighs all keys alike.
        logits = jnp.where(is_seen, logits, -0.7 * jnp.finfo(jnp.float32).max)
    peak = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    weights = jnp.exp(logits - peak)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    output = jnp.einsum(
        "bkgts,bksh->bkgth", weights.astype(value.dtype), value, preferred_element_type=wide
    )
    output = (output / total).astype(value.dtype)
    if rows.uniform is None:
        return output, None

    rate = _RULES[options.sampling](options.keep, weights, total)
    inclusion = jnp.minimum(1, weights * (rate / total))
    if options.sampling == "independent":
        coins = jax.random.uniform(
            jax.random.fold_in(key_coins, rows.index[0, 0]), inclusion.shape, inclusion.dtype
        )
        inclusion = (coins < inclusion).astype(inclusion.dtype)
    indices, spacing = systematic(rows.uniform[..., 0], inclusion, options.num_slots)
    kept = jnp.take_along_axis(weights, indices, axis=-1, mode="fill", fill_value=0) / total
    kept = jnp.where(kept > 0, spacing[..., None] * jnp.maximum(kept, 1 / rate), 0)
    is_open = None
    if is_seen is not None:
        is_open = jnp.any(is_seen, axis=-1, keepdims=True)
        is_open = jnp.broadcast_to(is_open, (*output.shape[:-1], 1))
    return output, _Sample(jnp.minimum(indices, key.shape[-2] - 1), kept, is_open)


def _is_seen(options, seen, rows, num_keys):
    """Return which keys the queries see, broadcastable to the logits, or None for all."""
    columns = jnp.arange(num_keys)
    parts = [rows.mask]
    if options.is_causal:
        parts.append(columns <= rows.index)
    if options.window is not None:
        before, after = options.window
        parts.append((rows.index <= columns + before) & (rows.index >= columns - after))
    if seen.query_lengths is not None:
        parts.append(rows.index < seen.query_lengths[:, None, None, None, None])
    if seen.key_lengths is not None:
        parts.append(columns < seen.key_lengths[:, None, None, None, None])
    parts = [part for part in parts if part is not None]
    if not parts:
        return None
    is_seen = parts[0]
    for part in parts[1:]:
        is_seen = is_seen & part
    return is_seen


def _filled(keep, weights, total):
    """Return a c for which the probabilities sum to at most `keep`, and to less short of it.

    They sum to less than c as soon as one of them is cut at 1. Multiplying c by what is missing
    never exceeds `keep`, since the sum grows more slowly than c.
    """
    rate = jnp.full_like(total, keep)
    for _ in range(2):
        expected = jnp.sum(jnp.minimum(1, weights * (rate / total)), axis=-1, keepdims=True)
        rate = rate * (keep / expected)
    return rate


# name -> (keep, unnormalised weights, their sum) -> c
_RULES: dict[str, Callable] = {
    "systematic": lambda keep, weights, total: keep,
    "filled": _filled,
    "independent": lambda keep, weights, total: keep,
}


# ---------------------------------------------------------------------------------------
# The sparse derivative.


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _sparse(options, query, key, value, bias, seen, rng_key):
    """Return the output, differentiated through a sample of its weights."""
    return _forward(options, query, key, value, bias, seen)[0]


@partial(_sparse.defjvp, symbolic_zeros=True)
def _sparse_jvp(options, primals, tangents):
    query, key, value, bias, seen, rng_key = primals
    d_query, d_key, d_value, d_bias = tangents[:4]
    output, sample = _forward(options, query, key, value, bias, seen, rng_key)
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


# ---------------------------------------------------------------------------------------
# The door.


def _four_axes(name, x):
    x = jnp.asarray(x)
    if x.ndim not in (3, 4):
        raise ValueError(f"{name} must have three axes, or four with the batch, got {x.shape}.")
    return x if x.ndim == 4 else x[None]


def _number(name, x):
    try:
        return float(x)
    except TypeError:
        raise TypeError(
            f"{name} must be a number, known when the program is traced, got {x}. A scale that is "
            "learnt belongs on the query."
        ) from None


def _check_shapes(query, key, value, bias, mask, lengths):
    batch, time, heads, width = query.shape
    num_keys, key_heads = key.shape[1:3]
    if value.shape != key.shape or (key.shape[0], key.shape[3]) != (batch, width):
        raise ValueError(
            "query must be (batch, time, heads, width), key and value (batch, keys, key heads, "
            f"width), got {query.shape}, {key.shape} and {value.shape}."
        )
    if heads % key_heads:
        raise ValueError(f"{heads} heads are not a multiple of {key_heads} key heads.")
    full = (batch, heads, time, num_keys)
    for name, x in {"bias": bias, "mask": mask}.items():
        if x is not None and any(n not in (1, m) for n, m in zip(x.shape, full, strict=True)):
            raise ValueError(f"{name} must be broadcastable to {full}, got {x.shape}.")
    if mask is not None and mask.dtype != bool:
        raise ValueError(
            f"mask must be boolean, got {mask.dtype}: cast ones and zeros by astype(bool), and "
            "pass what is added to the logits as bias."
        )
    for name, x in lengths.items():
        if x is not None and (jnp.shape(x) != (batch,) or not jnp.issubdtype(x.dtype, jnp.integer)):
            raise ValueError(f"{name} must be integers of shape {(batch,)}, got {x}.")
