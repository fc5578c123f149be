"""The rule of BLoB's code, which takes turns between loss and divergence.

Wang et al., 2024, arXiv:2406.11675.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from probbp.checks import check_count, check_number
from probbp.models.blob.divergence import divergence


class AlternatingState(NamedTuple):
    """State of `alternating`.

    Attributes:
        count: steps made.
        mean_state: state of the optimiser of M and B.
    """

    count: jax.Array
    mean_state: Any


def alternating(
    optimiser: optax.GradientTransformation,
    *,
    prior_scale: float,
    cycle: int,
    kl_learning_rate: float | Callable[[jax.Array], Any] = 0.01,
) -> optax.GradientTransformation:
    r"""Return the update rule of the paper's code, as an Optax transformation of SVI's parameters.

    Fed with the gradient of the mean negative log likelihood, step t makes two moves: `optimiser`
    moves M and B, and then, at the new M,

    .. math::
        M \leftarrow M - k \pi_i \nabla_M KL, \qquad
        G \leftarrow G - k (\nabla_G \mathrm{NLL} + \pi_i \nabla_G KL), \qquad
        \pi_i = \frac{2^i}{2^{c + 1} - 1}

    with i running from 1 to the cycle's length c, again and again. Half of the divergence falls on
    the last step of a cycle, a quarter on the one before: it acts as a kick.

    Args:
        optimiser: of M and B.
        prior_scale: sigma_p.
        cycle: c.
        kl_learning_rate: k, or a function of the number of steps made.

    Returns:
        A transformation of dictionaries with names that end in `_loc`, `_g` and `_B`.

    Raises:
        ValueError: for a cycle below 1.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax
        >>> rule = alternating(optax.adamw(1e-3), prior_scale=0.1, cycle=4)
        >>> params = {"w_loc": jnp.zeros((2, 4)), "w_g": jnp.ones((2, 4)), "w_B": jnp.ones((3, 2))}
        >>> state = rule.init(params)
        >>> updates, state = rule.update(params, state, params)
    """
    cycle = check_count("cycle", cycle)
    check_number("prior_scale", prior_scale, "(0, inf)")
    if not callable(kl_learning_rate):
        check_number("kl_learning_rate", kl_learning_rate, "[0, inf)")

    def means(tree):
        return {name: leaf for name, leaf in tree.items() if not name.endswith("_g")}

    def init(params):
        return AlternatingState(jnp.zeros((), jnp.int32), optimiser.init(means(params)))

    def update(updates, state, params=None):
        if params is None:
            raise ValueError("alternating needs the parameters: update(grads, state, params).")
        grads = updates
        moves, mean_state = optimiser.update(means(grads), state.mean_state, means(params))
        rate: Any = (
            kl_learning_rate(state.count) if callable(kl_learning_rate) else kl_learning_rate
        )
        # 2^i overflows in long cycles; 2^(i - c - 1) vanishes.
        i = state.count % cycle + 1
        weight = jnp.exp2((i - cycle - 1).astype(jnp.float32)) / (1 - 2.0 ** -(cycle + 1))
        moves = dict(moves)
        for name in params:
            if not name.endswith("_g"):
                continue
            loc = name.removesuffix("_g") + "_loc"
            kl_loc, kl_g = jax.grad(divergence, (0, 1))(
                params[loc] + moves[loc], params[name], prior_scale
            )
            moves[loc] = moves[loc] - (rate * weight * kl_loc).astype(kl_loc.dtype)
            moves[name] = (-rate * (grads[name] + weight * kl_g)).astype(kl_g.dtype)
        return moves, AlternatingState(state.count + 1, mean_state)

    return optax.GradientTransformation(init, update)


def rescaled_cycle(num_data: int, batch_size: int, *, gamma: float = 8.0) -> int:
    """Return the cycle's length that the paper's code takes, 100 N^(pi / gamma) / batch.

    It stands for the steps in an epoch: longer for few data, so that the divergence weighs less,
    shorter for many. The exact ELBO is the mean loss with KL / N at each step; the published rule
    has KL / cycle on average.

    Args:
        num_data: N.
        batch_size: examples a step.
        gamma: of the paper's scripts, 8.

    Example:
        >>> rescaled_cycle(640, 4)
        316
    """
    num_data, batch_size = check_count("num_data", num_data), check_count("batch_size", batch_size)
    check_number("gamma", gamma, "(0, inf)")
    return max(1, int(100 * num_data ** (math.pi / gamma) / batch_size))
