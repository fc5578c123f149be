"""The forward pass: attention in blocks of queries, and a sample of its weights."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from probbp.ops.sus.blocks import by_blocks
from probbp.ops.sus.systematic import systematic

Sampling = Literal["systematic", "filled", "independent"]

_LOGITS_AT_ONCE = 2**21  # held, or `_LEAST_ROWS` rows of every head
_LEAST_ROWS, _MOST_ROWS = 32, 128


class Options(NamedTuple):
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


class Seen(NamedTuple):
    """Who sees whom, beside what `Options` say.

    Attributes:
        mask: (batch | 1, key heads | 1, group | 1, time | 1, keys | 1).
        query_lengths: (batch,).
        key_lengths: (batch,).
    """

    mask: jax.Array | None
    query_lengths: jax.Array | None
    key_lengths: jax.Array | None


class Rows(NamedTuple):
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


class Sample(NamedTuple):
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


def forward(options, query, key, value, bias, seen, rng_key=None) -> tuple[jax.Array, Any]:
    """Return the output, shaped as the query, and with a key a `Sample` of its weights."""
    *heads, time, _ = query.shape
    uniform = key_coins = None
    if rng_key is not None:
        key_rows, key_coins = jax.random.split(rng_key)
        wide = jnp.promote_types(key.dtype, jnp.float32)
        uniform = jax.random.uniform(key_rows, (*heads, time, 1), wide)
    rows = Rows(jnp.arange(time)[:, None], query, bias, seen.mask, uniform)
    num_logits = math.prod(heads) * time * key.shape[-2]
    size = _LOGITS_AT_ONCE * time // max(num_logits, 1)
    size = min(max(_LEAST_ROWS, size), _MOST_ROWS)
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

    rate = RULES[options.sampling](options.keep, weights, total)
    if options.sampling == "systematic":
        # As long as they are: a weight above 1 / c is longer than the spacing, and hit for sure.
        lengths, asked = weights, (total / rate)[..., 0]
    else:
        lengths, asked = jnp.minimum(1, weights * (rate / total)), 1.0
    if options.sampling == "independent":
        coins = jax.random.uniform(
            jax.random.fold_in(key_coins, rows.index[0, 0]), lengths.shape, lengths.dtype
        )
        lengths = (coins < lengths).astype(lengths.dtype)
    indices, spacing = systematic(rows.uniform[..., 0], lengths, options.num_slots, asked)
    kept = jnp.take_along_axis(weights, indices, axis=-1, mode="fill", fill_value=0) / total
    kept = jnp.where(kept > 0, (spacing / asked)[..., None] * jnp.maximum(kept, 1 / rate), 0)
    is_open = None
    if is_seen is not None:
        is_open = jnp.any(is_seen, axis=-1, keepdims=True)
        is_open = jnp.broadcast_to(is_open, (*output.shape[:-1], 1))
    return output, Sample(jnp.minimum(indices, key.shape[-2] - 1), kept, is_open)


def _is_seen(options, seen, rows, num_keys):
    """Return which keys the queries see, broadcastable to the logits, or None for all."""
    # As many axes as the logits have: `jax.numpy_rank_promotion("raise")` refuses fewer.
    columns, index = jnp.arange(num_keys)[None, None, None, None], rows.index[None, None, None]
    parts = [rows.mask]
    if options.is_causal:
        parts.append(columns <= index)
    if options.window is not None:
        before, after = options.window
        parts.append((index <= columns + before) & (index >= columns - after))
    if seen.query_lengths is not None:
        parts.append(index < seen.query_lengths[:, None, None, None, None])
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
RULES: dict[str, Callable] = {
    "systematic": lambda keep, weights, total: keep,
    "filled": _filled,
    "independent": lambda keep, weights, total: keep,
}
