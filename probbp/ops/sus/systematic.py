"""Systematic sampling: a random few entries of each row, a fixed number of slots, exact odds.

Madow, 1949, doi:10.1214/aoms/1177729988.
"""

import jax
import jax.numpy as jnp

_FAN_OUT = 16


def systematic(
    uniform: jax.Array, lengths: jax.Array, num_slots: int, spacing: float | jax.Array = 1.0
) -> tuple[jax.Array, jax.Array]:
    """Choose at most `num_slots` entries of each row, with given probabilities.

    The entries are laid end to end, each as long as it is likely, and every entry that holds one of
    the points u s, (u + 1) s, (u + 2) s, ... is chosen. With the spacing s = 1 an entry is hit with
    a probability that is its length, exactly; one that is longer than s is always chosen, once. The
    number of points is the sum of the lengths over s, rounded down or up. Where it exceeds
    `num_slots` the points are spread further apart, so that nothing overflows.

    A point is found by descending through sums of 16, 256, ... entries: no sort and no cumulative
    sum of the row.

    Args:
        uniform: (...), one number in [0, 1) a row.
        lengths: (..., n), at least zero.
        num_slots: how many points are looked up.
        spacing: (...), or a number: s.

    Returns:
        `indices`, (..., num_slots), integers in ascending order, n in slots that stay empty; and
        the spacing that was used, (...), at least s: entry j is chosen with probability
        min(1, lengths_j / spacing).

    Example:
        >>> import jax.numpy as jnp
        >>> indices, spacing = systematic(jnp.array(0.3), jnp.array([0.5, 1.0, 0.2, 0.3]), 2)
        >>> indices.tolist(), float(spacing)
        ([0, 1], 1.0)
    """
    num_entries = lengths.shape[-1]
    levels = [lengths]  # the entries, their sums by 16, the sums of these, ...
    while levels[-1].shape[-1] > _FAN_OUT:
        # A product with ones: XLA vectorises it on CPUs, and no sum over a short axis.
        ones = jnp.ones(_FAN_OUT, lengths.dtype)
        levels.append(jnp.dot(_families(levels[-1]), ones, precision="highest"))
    total = jnp.sum(levels[-1], axis=-1)
    spacing = jnp.maximum(spacing, total / num_slots)
    slots = jnp.arange(num_slots, dtype=uniform.dtype)
    points = (uniform[..., None] + jnp.expand_dims(slots, range(uniform.ndim))) * spacing[..., None]
    # `rest` is how far behind the start of the current node a point lies.
    indices, rest = jnp.zeros(points.shape, jnp.int32), points
    for level in reversed(levels):
        children = jnp.take_along_axis(
            _families(level), indices[..., None], axis=-2, mode="promise_in_bounds"
        )
        child, rest = _find(children, rest)
        indices = _FAN_OUT * indices + child
    is_hit = (points < total[..., None]) & (indices < num_entries)
    before = jnp.concatenate([jnp.full_like(indices[..., :1], -1), indices[..., :-1]], axis=-1)
    is_hit = is_hit & (indices != before)
    return jnp.where(is_hit, indices, num_entries), spacing


def _families(level):
    """Return (..., n) as (..., n / 16, 16), filled up with zeros."""
    *rows, length = level.shape
    padding = -length % _FAN_OUT
    if padding:
        level = jnp.pad(level, [(0, 0)] * len(rows) + [(0, padding)])
    return level.reshape(*rows, -1, _FAN_OUT)


def _find(lengths, rest):
    """Return which of the lengths, laid end to end, a point falls on, and how far behind its start.

    A sum for each, written out: XLA makes one loop of them, and none of `jnp.cumsum`.
    """
    end = start = jnp.zeros_like(rest)
    index = jnp.zeros(rest.shape, jnp.int32)
    for i in range(_FAN_OUT - 1):  # a point that rounding leaves behind the last belongs to it
        end = end + lengths[..., i]
        is_behind = end <= rest
        index = index + is_behind.astype(index.dtype)
        start = jnp.where(is_behind, end, start)
    return index, rest - start
