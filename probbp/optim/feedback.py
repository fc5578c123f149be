r"""What feedback weights ask of an optimiser: to be left alone, and decay in the right dose.

Song, Xu & Lafferty, 2021, arXiv:2106.06044. A network :math:`f = p^{-1/2} \beta^T \psi(W x)` of
width p, errors sent back through b instead of :math:`\beta`, learns without decay and hardly
aligns: the cosine between b and :math:`\beta` falls like 1 / p. Decay of :math:`\beta` aligns them,
and what counts is its total in proportion to the root of the width,

.. math:: \kappa = \frac{1}{\sqrt p} \sum_t \eta_t \lambda_t.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from probbp.checks import check_count, check_number
from probbp.types import Tree


def alignment_budget(
    learning_rate: optax.ScalarOrSchedule,
    weight_decay: optax.ScalarOrSchedule,
    num_steps: int,
    width: int,
) -> jax.Array:
    r"""Return :math:`\kappa`, the total weight decay over the root of the width.

    For the linear network with :math:`X X^T = \gamma I`, targets of length Y and decay
    :math:`\lambda`, the alignment follows from it,

    .. math:: (\lambda + \gamma) q + \gamma^2 q^3 / 3 = Y \kappa, \qquad
        \cos(b, \beta) = \sqrt{\gamma} q / \sqrt{1 + \gamma q^2},

    with an error of :math:`\lambda / (\lambda + \gamma + \gamma^2 q^2)` of Y as long as the decay
    is on. `examples/papers/feedback.py` prints both beside simulations. That is the theory's
    parametrisation. Where readout and feedback weights have variance 1 / p, without the root in
    front, and one learning rate serves all, it holds for this budget divided by p, and for
    `weight_decay` divided by p as lambda: the same alignment takes p times as large a dose.

    Args:
        learning_rate: eta, a number or a schedule.
        weight_decay: lambda, as `optax.add_decayed_weights` or `optax.adamw` have it: a step takes
            eta * lambda of the weights away. A number or a schedule.
        num_steps: how many.
        width: p, the units of the layer that receives the error.

    Example:
        >>> round(float(alignment_budget(0.01, 0.5, num_steps=2_000, width=100)), 3)
        1.0
    """
    num_steps, width = check_count("num_steps", num_steps), check_count("width", width)
    for name, value in {"learning_rate": learning_rate, "weight_decay": weight_decay}.items():
        if not callable(value):
            check_number(name, value, "[0, inf)")
    steps = jnp.arange(num_steps)

    def over_time(value: Any) -> Any:
        return jax.vmap(value)(steps) if callable(value) else value

    doses = jnp.broadcast_to(over_time(learning_rate) * over_time(weight_decay), (num_steps,))
    return jnp.sum(doses) / width**0.5


def decay_until_aligned(
    budget: float, learning_rate: float, weight_decay: float, width: int
) -> optax.Schedule:
    """Make the schedule of a weight decay that stops when its budget is spent.

    The decay aligns the layer with its feedback weights and holds the error up; once it is off, the
    error goes to zero, and the alignment stays. A budget of 1 / Y to 4 / Y aligns the linear
    network of `alignment_budget` with gamma = 1 and a decay of 0.5 to 0.52 to 0.86, whatever its
    width. The schedule goes to `optax.add_decayed_weights`, masked to the kernels whose errors go
    through feedback weights.

    Args:
        budget: kappa, see `alignment_budget`.
        learning_rate: eta.
        weight_decay: lambda, while it is on.
        width: p.

    Returns:
        A schedule: `weight_decay` for kappa sqrt(p) / (eta lambda) steps, then 0.

    Raises:
        ValueError: for a budget that is negative, or a rate or decay that is not positive.

    Example:
        >>> import optax
        >>> schedule = decay_until_aligned(1.0, learning_rate=0.01, weight_decay=0.5, width=100)
        >>> float(schedule(1_999)), float(schedule(2_000))
        (0.5, 0.0)
        >>> optimiser = optax.chain(optax.add_decayed_weights(schedule), optax.sgd(0.01))
    """
    check_number("budget", budget, "[0, inf)", "No decay is budget=0.")
    check_number("learning_rate", learning_rate, "(0, inf)")
    check_number("weight_decay", weight_decay, "(0, inf)", "No decay is budget=0.")
    width = check_count("width", width)
    # A hair less, so that a budget that is a whole number of steps is not one step more.
    num_steps = math.ceil(budget * width**0.5 / (learning_rate * weight_decay) - 1e-6)
    constants = [optax.constant_schedule(weight_decay), optax.constant_schedule(0.0)]
    return optax.join_schedules(constants, [num_steps])


def is_trained(params: Tree, name: str = "feedback") -> Tree:
    """Return a mask: False for feedback weights, True for all else.

    As it stands it is what Optax takes for a mask: `optax.adamw(1e-3, mask=is_trained)` decays all
    but the feedback weights. Their gradient is zero, so that nothing else moves them in Optax's
    common optimisers; `frozen` is for all.

    Args:
        params: pytree.
        name: what the path to feedback weights has in it: a key or an attribute.

    Example:
        >>> is_trained({"layer": {"kernel": 1.0, "feedback": 2.0}})
        {'layer': {'feedback': False, 'kernel': True}}
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: name not in [_key(step) for step in path], params
    )


def frozen(
    transformation: optax.GradientTransformation, name: str = "feedback"
) -> optax.GradientTransformationExtraArgs:
    """Return the transformation, which leaves feedback weights where they are.

    Whatever it does to the rest (decay, noise, normalisation), they stay to the bit, and have no
    optimiser state.

    Args:
        transformation: for all other parameters.
        name: as in `is_trained`.

    Example:
        >>> import optax
        >>> params = {"kernel": 1.0, "feedback": 2.0}
        >>> optimiser = frozen(optax.adamw(0.1))
        >>> updates, _ = optimiser.update(params, optimiser.init(params), params)
        >>> float(updates["feedback"])
        0.0
    """

    def labels(params):
        return jax.tree.map(lambda leaf: "trained" if leaf else "kept", is_trained(params, name))

    return optax.partition({"trained": transformation, "kept": optax.set_to_zero()}, labels)


def _key(step: Any) -> Any:
    """Return the name in a step of a path, be it a dictionary's, an attribute's or a position."""
    fields = ("key", "name", "idx")
    return next((getattr(step, field) for field in fields if hasattr(step, field)), step)
