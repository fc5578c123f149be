"""What a spiking network sees at each step: functions of the step's number."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from probbp.checks import check_numbers, check_rng_key
from probbp.ops.substitute import substitute
from probbp.types import Tree

Inputs = Callable[[jax.Array], Tree]


def constant(x: Tree) -> Inputs:
    """Return the same currents at every step ("direct encoding").

    Args:
        x: array or pytree of arrays.

    Example:
        >>> import jax.numpy as jnp
        >>> constant(jnp.array([0.5, 2.0]))(3).tolist()
        [0.5, 2.0]
    """
    return lambda step: x


def bernoulli(rng_key: jax.Array, rates: jax.Array) -> Inputs:
    """Return random spikes, independent at every step.

    Made anew from the key at each step, so that no train is stored. Differentiated as the rates.

    Args:
        rng_key: a key.
        rates: probabilities of a spike in a step.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> inputs = bernoulli(jax.random.key(0), jnp.array([0.0, 0.25, 1.0]))
        >>> train = jax.vmap(inputs)(jnp.arange(1000))
        >>> [round(rate, 1) for rate in train.mean(0).tolist()]
        [0.0, 0.2, 1.0]
    """
    check_rng_key("rng_key", rng_key)
    check_numbers("rates", rates, "[0, 1]", "They are the probabilities of a spike.")

    def spikes(step):
        drawn = jax.random.bernoulli(jax.random.fold_in(rng_key, step), rates)
        return substitute(drawn.astype(rates.dtype), rates)

    return spikes


def events(train: Tree) -> Inputs:
    """Return a recorded stream.

    Args:
        train: floating-point array or pytree of them, (steps, ...). Beyond its end are no numbers
            (nan), so that a simulation that is longer than the stream shows.

    Example:
        >>> import jax.numpy as jnp
        >>> events(jnp.array([[0.0, 1.0], [1.0, 1.0]]))(1).tolist()
        [1.0, 1.0]
    """
    return lambda step: jax.tree.map(
        lambda leaf: jnp.asarray(leaf).at[step].get(mode="fill", fill_value=jnp.nan), train
    )
