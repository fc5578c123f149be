"""Spiking neurons: what a current does in one step of time."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from probbp.checks import check_choice, check_numbers
from probbp.ops.substitute import substitute
from probbp.types import Tree


class Neuron(NamedTuple):
    """A neuron, elementwise in its current.

    Attributes:
        init: an array, as the current, to the state before the first step.
        step: `(params, state, current)` to the next state and the spikes, of the current's shape.
            Each element hangs on its own current and state alone. Its derivative is what
            backpropagation through time would use, with a surrogate for that of the spike.
        params: pytree of numbers and arrays that broadcast to the current. JAX arrays are
            differentiated, and each costs a directional derivative a step; Python's numbers are
            not.
    """

    init: Callable[[jax.Array], Tree]
    step: Callable[[Tree, Tree, jax.Array], tuple[Tree, jax.Array]]
    params: Tree = ()


def lif(
    *,
    leak: float | jax.Array = 0.2,
    threshold: float | jax.Array = 1.0,
    reset: Literal["soft", "hard"] = "soft",
    detach_reset: bool = True,
    surrogate: Callable[[jax.Array], jax.Array] = lambda x: jax.nn.sigmoid(4 * x),
) -> Neuron:
    r"""Make the leaky integrate-and-fire neuron.

    .. math:: u_t = \lambda v_{t-1} + I_t, \qquad s_t = [u_t \ge \vartheta], \qquad
        v_t = u_t - \vartheta s_t \;\text{(soft)}, \quad u_t (1 - s_t) \;\text{(hard)}.

    Args:
        leak: lambda, the share of the potential that is left after a step. A time constant of tau
            steps is 1 - 1 / tau.
        threshold: theta, of the potential.
        reset: what a spike does to the potential: it takes away the threshold, or sets it to zero.
        detach_reset: whether the reset is not differentiated.
        surrogate: a smooth function of u - theta, which the spike is differentiated as; by default
            a sigmoid whose slope at the threshold is 1.

    Returns:
        A `Neuron`. With leak or threshold given as arrays, of one element or of any shape that
        broadcasts to the current, it can be trained in them.

    Raises:
        ValueError: for an unknown reset.

    Example:
        >>> import jax.numpy as jnp
        >>> neuron = lif(leak=0.5)
        >>> current = jnp.array([0.7, 1.2])
        >>> potential, spikes = neuron.step(neuron.params, neuron.init(current), current)
        >>> spikes.tolist()
        [0.0, 1.0]
    """
    check_choice("reset", reset, ("soft", "hard"))
    check_numbers("leak", leak, "[0, 1]", "It is the share of the potential that a step keeps.")
    check_numbers("threshold", threshold, "(0, inf)")

    def step(params: Any, state, current):
        potential = params["leak"] * state + current
        above = potential - params["threshold"]
        spikes = substitute((above >= 0).astype(current.dtype), surrogate(above))
        fired = jax.lax.stop_gradient(spikes) if detach_reset else spikes
        after = {"soft": potential - params["threshold"] * fired, "hard": potential * (1 - fired)}
        return after[reset], spikes

    return Neuron(jnp.zeros_like, step, {"leak": leak, "threshold": threshold})
