"""`jax.nn.dot_product_attention` with the sparse backward pass: its arguments, and their checks."""

import math

import jax
import jax.numpy as jnp

from probbp.checks import check_choice, check_count, check_number, check_rng_key
from probbp.ops.sus.forward import RULES, Options, Sampling, Seen, forward
from probbp.ops.sus.sparse import sparse


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
    quiet: `tests/benchmarks/sus.py` prints the curve. `suggested_keep` measures it on a batch.

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
    if rng_key is not None:
        check_rng_key("rng_key", rng_key)
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
    check_choice("sampling", sampling, tuple(RULES))
    if rng_key is not None:
        check_rng_key("rng_key", rng_key)
    keep = math.inf if keep is None else _number("keep", keep)
    check_number("keep", keep, "(0, inf]", "keep=None keeps all weights.")
    window = None if local_window_size is None else _window(local_window_size)
    factor: float = width**-0.5 if scale is None else _number("scale", scale)
    check_number("scale", factor, "(-inf, inf)")
    options = Options(
        scale=factor,
        is_causal=is_causal,
        window=window,
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
    seen = Seen(mask, query_seq_lengths, key_value_seq_lengths)
    if keep >= num_keys or rng_key is None:
        output, _ = forward(options, query, key, value, bias, seen)
    else:
        output = sparse(options, query, key, value, bias, seen, rng_key)
    output = jnp.swapaxes(output.reshape(batch, heads, time, width), 1, 2)
    if query_seq_lengths is not None:
        is_query = jnp.arange(time)[None] < query_seq_lengths[:, None]
        output = output * is_query[:, :, None, None].astype(output.dtype)
    return output if is_batched else output[0]


def _four_axes(name, x):
    x = jnp.asarray(x)
    if x.ndim not in (3, 4):
        raise ValueError(f"{name} must have three axes, or four with the batch, got {x.shape}.")
    return x if x.ndim == 4 else x[None]


def _number(name, x):
    try:
        return float(x)
    except (TypeError, ValueError):
        raise TypeError(
            f"{name} must be a number, known when the program is traced, got {x}. A scale that is "
            "learnt belongs on the query."
        ) from None


def _window(size):
    """Return how far a query sees back and ahead."""
    both = size if isinstance(size, tuple) else (size, size)
    way_out = "One integer is for both sides, None for no window."
    if len(both) != 2:
        raise ValueError(f"local_window_size must be (back, ahead), got {size}. {way_out}")
    back, ahead = (check_count("local_window_size", n, 0, way_out=way_out) for n in both)
    return back, ahead


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
