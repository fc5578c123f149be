"""A long axis computed a block at a time, forwards and backwards, without storing the blocks."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from probbp.types import Tree


def by_blocks(fun: Callable, time: int, num_blocks: int, rows: Tree, *whole: Any) -> Tree:
    """Return `fun(rows, *whole)`, computed for a block of the time axis at a time.

    In reverse mode each block is computed again, and only the arguments are stored.

    Args:
        fun: each output has time as its axis before the last.
        time: its length.
        num_blocks: how many blocks.
        rows: arrays with time, or 1, as their axis before the last.
        whole: other arguments.
    """
    if num_blocks <= 1:
        return fun(rows, *whole)
    size = -(-time // num_blocks)
    num_blocks = -(-time // size)

    def split(x):
        if x.shape[-2] != time:
            return jnp.broadcast_to(x, (num_blocks, *x.shape))
        padding = [(0, 0)] * x.ndim
        padding[-2] = (0, num_blocks * size - time)
        x = jnp.pad(x, padding).reshape(*x.shape[:-2], num_blocks, size, x.shape[-1])
        return jnp.moveaxis(x, -3, 0)

    def join(x):
        x = jnp.moveaxis(x, 0, -3)
        return x.reshape(*x.shape[:-3], num_blocks * size, x.shape[-1])[..., :time, :]

    block = jax.checkpoint(fun, prevent_cse=False)  # what prevents it is the loop
    blocks = jax.lax.map(lambda rows: block(rows, *whole), jax.tree.map(split, rows))
    return jax.tree.map(join, blocks)
