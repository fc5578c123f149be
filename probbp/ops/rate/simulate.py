"""Simulate a spiking network, and differentiate it by rates or through time."""

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from probbp.checks import check_choice, check_count
from probbp.ops.rate.inputs import Inputs
from probbp.ops.rate.neurons import Neuron, lif
from probbp.ops.rate.runs import STEPS, Layerwise, Rates, Shapes, Stepwise, Trace
from probbp.ops.substitute import substitute
from probbp.types import Tree

Network = Callable[..., Tree]


def simulate(
    network: Network,
    inputs: Inputs,
    num_steps: int,
    *,
    neuron: Neuron | None = None,
    gradient: Literal["rate", "bptt"] = "rate",
    order: Literal["time", "layer"] = "time",
    checkpoint: bool = False,
) -> Tree:
    """Return the mean over time of what a spiking network puts out.

    Exact: the value, whatever `gradient`. Estimated, with bias: the gradient by rates. It is that
    of backpropagation through time (with the same surrogate for a spike) for one step, for what
    lies after the last neurons, and for one layer of neurons with a constant input; elsewhere as
    far as errors and spikes are uncorrelated in time, which `agreement` measures. Higher
    derivatives are those of the static network, in which rates and gains are constants.

    Between its neurons the network may compute what it likes: dense and convolutional layers,
    pooling, sums of branches, normalisation. By rates, slopes of what is not linear are taken at
    the mean over time. Flax's modules serve as they are, unless they change a state: random masks,
    for one, must be drawn outside.

    Args:
        network: `network(spike, x)` is one step. It calls `spike(current)` for the spikes of a
            layer, see `Spike`, and returns a pytree of floating-point arrays. It may close over
            parameters, which are differentiated. Loops of JAX must not hold calls of `spike`.
        inputs: the number of a step, a scalar integer, to x, a pytree of floating-point arrays:
            `constant`, `bernoulli`, `events`, or your own.
        num_steps: number of steps T.
        neuron: the neurons, `lif()` by default.
        gradient: by rates, or by backpropagation through time.
        order: of execution. "time": all layers advance step by step, and memory does not grow with
            T. "layer": each layer goes through all steps before the next begins, in memory for a
            layer's spikes at all steps. Value and gradient are the same, unless the network takes
            averages over time.
        checkpoint: whether backpropagation through time stores about sqrt(T) states, and simulates
            again what is between them.

    Returns:
        The mean of the outputs of all steps. `jit`, `vmap` and both AD modes. By rates a gradient
        costs the simulation, with a directional derivative of the neurons alone, and a backward
        pass through one step's network.

    Raises:
        ValueError: for an unknown `gradient` or `order`, `num_steps` below 1, `checkpoint` where it
            does nothing, and a network that calls `spike` differently when it is run again.
        TypeError: for inputs, currents or outputs that are not floating-point arrays.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from probbp.ops import rate
        >>> x = jax.random.normal(jax.random.key(0), (8, 5))
        >>> def loss(weights, gradient="rate"):
        ...     def network(spike, x):
        ...         return spike(x @ weights["in"]) @ weights["out"]
        ...
        ...     return jnp.sum(rate.simulate(network, rate.constant(x), 32, gradient=gradient))
        >>> weights = {"in": jnp.ones((5, 4)), "out": jnp.ones((4, 1))}
        >>> grad = jax.grad(loss)(weights)
        >>> through_time = jax.grad(loss)(weights, "bptt")
        >>> bool(jnp.allclose(grad["in"], through_time["in"], rtol=1e-3))
        True

    Reference:
        Yu et al., 2024, arXiv:2410.11488, section 4. Gains as directional derivatives, which serve
        any neuron and its parameters, are ours.
    """
    num_steps = _check(num_steps, gradient, order, checkpoint)
    neuron = lif() if neuron is None else neuron
    through_time = gradient == "bptt"
    plan, like = _plan(network, inputs, neuron)

    if order == "layer":
        found = _layer_by_layer(network, inputs, num_steps, plan, through_time)
    else:
        found = _step_by_step(network, inputs, num_steps, plan, like, through_time, checkpoint)
    rates = Rates(neuron, found.traces, found.averages, num_steps)
    surrogate = network(rates, _mean_input(inputs, num_steps, found.x))
    # Through time this last run is of use only to modules that wait for `is_last`.
    return found.output if through_time else substitute(found.output, surrogate)


def spike_trains(
    network: Network, inputs: Inputs, num_steps: int, *, neuron: Neuron | None = None
) -> tuple[list[jax.Array], Tree]:
    """Return the spikes of all neurons at every step, to look at.

    Args:
        network: as in `simulate`.
        inputs: as in `simulate`.
        num_steps: as in `simulate`.
        neuron: as in `simulate`.

    Returns:
        For each call of `spike` an array (steps, ...), and the outputs of all steps. No
        derivatives.

    Example:
        >>> import jax.numpy as jnp
        >>> from probbp.ops import rate
        >>> inputs = rate.constant(jnp.array([0.9]))
        >>> trains, _ = rate.spike_trains(lambda spike, x: spike(x), inputs, 6)
        >>> trains[0][:, 0].tolist()
        [0.0, 1.0, 0.0, 1.0, 0.0, 1.0]
    """
    num_steps = _check(num_steps, "rate", "time", False)
    neuron = lif() if neuron is None else neuron
    plan, _ = _plan(network, inputs, neuron)

    def step(traces, t):
        spike = Stepwise(neuron, traces, through_time=False)
        output = network(spike, inputs(t))
        return spike.done(), (spike.spikes, output)

    _, recorded = jax.lax.scan(step, plan.start(with_gains=False), jnp.arange(num_steps))
    return jax.lax.stop_gradient(recorded)


class _Found(NamedTuple):
    """The last traces of a simulation, and the means over time."""

    traces: list[Trace]
    averages: list[jax.Array]
    x: Tree
    output: Tree


def _plan(network, inputs, neuron):
    """Return the layers, and the shapes of (averages, x, output) in one step."""
    plan = Shapes(neuron)

    def floating(name, tree):
        for leaf in jax.tree.leaves(tree):
            if not jnp.issubdtype(leaf.dtype, jnp.floating):
                raise TypeError(f"{name} must return floating-point arrays, got {leaf.dtype}.")
        return tree

    def once():
        x = floating("inputs", inputs(jnp.int32(0)))
        return x, floating("network", network(plan, x))

    return plan, (plan.averages, *jax.eval_shape(once))


def _step_by_step(network, inputs, num_steps, plan, like, through_time, checkpoint):
    def step(carry, t):
        traces, sums = carry
        spike = Stepwise(plan.neuron, traces, through_time)
        x = jax.lax.stop_gradient(inputs(t)) if not through_time else inputs(t)
        output = network(spike, x)
        if not through_time:
            output = jax.lax.stop_gradient(output)
        new = (spike.averages, jax.lax.stop_gradient(x), output)
        return (spike.done(), jax.tree.map(jnp.add, sums, new)), None

    def wide_zeros(leaf):
        return jnp.zeros(leaf.shape, jnp.promote_types(leaf.dtype, jnp.float32))

    carry = (plan.start(with_gains=not through_time), jax.tree.map(wide_zeros, like))
    steps = jnp.arange(num_steps)
    if checkpoint:
        length = math.isqrt(num_steps)
        whole = num_steps // length * length
        stretch = jax.checkpoint(lambda carry, steps: jax.lax.scan(step, carry, steps))
        carry, _ = jax.lax.scan(stretch, carry, steps[:whole].reshape(-1, length))
        carry, _ = stretch(carry, steps[whole:])
    else:
        carry, _ = jax.lax.scan(step, carry, steps)
    traces, sums = carry
    means = jax.tree.map(lambda total, leaf: (total / num_steps).astype(leaf.dtype), sums, like)
    return _Found(traces, *means)


def _layer_by_layer(network, inputs, num_steps, plan, through_time):
    def all_steps(t):
        spike = Layerwise(plan.neuron, plan.start(with_gains=not through_time), through_time)
        x = jax.lax.stop_gradient(inputs(t)) if not through_time else inputs(t)
        output = network(spike, x)
        if not through_time:
            output = jax.lax.stop_gradient(output)
        x, output = jax.lax.pmean((x, output), STEPS)
        return spike.done(), spike.averages, x, output

    mapped = jax.vmap(all_steps, axis_name=STEPS, out_axes=None)
    return _Found(*mapped(jnp.arange(num_steps)))


def _mean_input(inputs, num_steps, mean):
    """Return the mean input. What differentiates it costs nothing where it isn't differentiated."""

    def step(total, t):
        return jax.tree.map(jnp.add, total, inputs(t)), None

    total, _ = jax.lax.scan(step, jax.tree.map(jnp.zeros_like, mean), jnp.arange(num_steps))
    surrogate = jax.tree.map(lambda leaf: leaf / num_steps, total)
    return substitute(jax.lax.stop_gradient(mean), surrogate)


def _check(num_steps, gradient, order, checkpoint):
    num_steps = check_count("num_steps", num_steps)
    check_choice("gradient", gradient, ("rate", "bptt"))
    check_choice("order", order, ("time", "layer"))
    if checkpoint and (gradient, order) != ("bptt", "time"):
        raise ValueError(
            "checkpoint=True is for gradient='bptt' with order='time': by rates nothing is stored "
            "that it could save, and layer by layer the states are not in one loop."
        )
    return num_steps
