"""A log density with the value of all rows and the gradient of some.

The value is exact, the gradient that of a mini-batch that hangs on a key: what a Metropolis test
needs. A mini-batch's log density is the prior, with the log Jacobians, and the likelihood of its
rows times N / n, as `numpyro.plate` scales it.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.lax import stop_gradient

from probbp.numpyro.calls import Plates, Rows
from probbp.types import Tree

Density = Callable[[Tree, jax.Array | None, Rows], jax.Array]
"""`(position, key of the model, rows) -> log density`; a plate without rows holds them all."""

KeyedLogDensity = Callable[..., jax.Array]
"""A log density with a keyword `rng_key=None`, on which its gradient may hang, its value not."""


def draw_rows(rng_key: jax.Array, plates: Plates) -> Rows:
    """Draw each plate's rows: uniform, independent, with replacement, in time of their number.

    NumPyro's own draw is without replacement and takes time of the size of the plate, which would
    cost more than the gradient. Unbiased are both; the variance of ours is that of n rows of an
    endless table, N - 1 over N - n times that without replacement.
    """
    keys = jax.random.split(rng_key, len(plates))
    return {
        name: jax.random.randint(key, (subsample_size,), 0, size)
        for key, (name, (size, subsample_size)) in zip(keys, plates.items(), strict=True)
    }


def over_all_rows(density: Density, plates: Plates, batch_size: int | None) -> KeyedLogDensity:
    r"""Return the log density of all rows, with those of one block in memory at a time.

    It is the mean of the log densities of consecutive blocks, weighted by their number of rows:
    since each is prior + N / b times the likelihood of its b rows, the prior counts once. Blocks
    are taken of the largest plate; the others are whole in each.
    """
    if batch_size is None:
        return lambda position, rng_key=None: density(position, rng_key, {})
    name, (size, _) = max(plates.items(), key=lambda item: item[1][0])
    batch_size = min(batch_size, size)
    num_blocks, rest = divmod(size, batch_size)

    def logdensity_fn(position, rng_key=None):
        @jax.checkpoint  # in reverse mode, too, one block's activations
        def block_fn(rows):
            return density(position, rng_key, {name: rows})

        blocks = jax.lax.map(
            lambda first: block_fn(first + jnp.arange(batch_size)),
            batch_size * jnp.arange(num_blocks),
        )
        total = batch_size / size * jnp.sum(blocks)
        if rest:
            total += rest / size * block_fn(size - rest + jnp.arange(rest))
        return total

    return logdensity_fn


def with_gradient_of_rows(
    density: Density, plates: Plates, whole: KeyedLogDensity
) -> KeyedLogDensity:
    """Return `whole` with the gradient of a mini-batch that hangs on the key.

    Without a key it is `whole`, gradient and all.
    """

    def logdensity_fn(position, rng_key=None):
        if rng_key is None:
            return whole(position)
        key_rows, key_model = jax.random.split(rng_key)
        value = whole(stop_gradient(position), key_model)
        part = density(position, key_model, draw_rows(key_rows, plates))
        return value + jnp.where(jnp.isfinite(part), part - stop_gradient(part), 0.0)

    return logdensity_fn


def check_rows(density: Density, plates: Plates, batch_size: int | None, position: Tree) -> None:
    """Require that mini-batches average to all rows, unless something is being traced.

    Two ways through all the rows must give the same value: as one, and in blocks of another length.
    """
    name, (size, subsample_size) = max(plates.items(), key=lambda item: item[1][0])
    other = subsample_size if batch_size != subsample_size else subsample_size + 1
    values = [over_all_rows(density, plates, length)(position) for length in (batch_size, other)]
    if any(isinstance(value, Tracer) for value in values):
        return
    one, two = values
    tolerance = jnp.sqrt(jnp.finfo(one.dtype).eps) * (1 + jnp.abs(one))
    if jnp.isfinite(one) and not jnp.abs(one - two) <= tolerance:
        raise ValueError(
            f"The log density of all rows is {one}, but its mini-batches over the plate {name!r} "
            f"average to {two}, so that their gradients would be biased. A row's likelihood may "
            "depend on that row alone (no statistics of the mini-batch), and whatever depends on "
            "the rows, a numpyro.factor too, belongs inside the plate, which then scales it."
        )
