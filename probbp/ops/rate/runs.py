"""What a network is handed for its neurons: one for each way to run it."""

from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from probbp.ops.rate.neurons import Neuron
from probbp.ops.substitute import substitute
from probbp.types import Tree

# The network is a function of one step, and calls `spike` where its neurons are. So it can be run
# in several ways, by handing it another `spike`:
#
#  1. in abstract, to find the neurons and the shapes of their currents (`Shapes`);
#  2. step after step, the state of each layer carried along (`Stepwise`), or for all steps at once,
#     each layer scanning over the steps of its block of currents (`Layerwise`);
#  3. once, on mean inputs, where a neuron is a number and a slope (`Rates`). This is what is
#     differentiated.
#
# By rates, everything in 2. is cut off from differentiation, so that JAX stores nothing of it. The
# gain is the derivative of the rate with respect to a current that is held constant. It is found in
# the forward direction: with the tangent 1 for the current of every step, one directional
# derivative of `neuron.step` carries the tangent of the state on. For the leaky integrate-and-fire
# neuron that is the paper's recursion rho_t = 1 + a_t rho_{t-1}, and for any other its own.

STEPS = "probbp.ops.rate.steps"
"""The axis of time where a network runs for all steps at once."""


class Spike(Protocol):
    """What a network is handed: its neurons, and the mean over time."""

    is_last: bool
    """Whether this is the last time that the network is run: on mean inputs, with the averages of
    all steps. A module that keeps running statistics updates them then, and only then."""

    def __call__(self, current: jax.Array, neuron: Neuron | None = None) -> jax.Array:
        """Return the spikes of neurons that a current enters; of `simulate`'s kind by default.

        Layers are told apart by the order of the calls.
        """
        ...

    def average(self, x: jax.Array) -> jax.Array:
        """Return the mean of `x` over time, as far as it is known when a step is simulated.

        With `order="layer"` it is over all steps; with `order="time"` it is `x` itself. The
        gradient by rates has the mean over the simulation, differentiated as the `x` of mean
        inputs. It serves statistics of a batch, by which something is normalised.
        """
        ...


class Trace(NamedTuple):
    """What is carried of a layer.

    state: of the neurons.
    count: of the spikes so far.
    gains: for the current and for each parameter that is an array, the tangent of the state and the
        sum of the tangents of the spikes; nothing where time is differentiated through.
    """

    state: Tree
    count: jax.Array
    gains: list[tuple[Tree, jax.Array]]


class Shapes:
    """Spikes without a past, while the layers are written down."""

    is_last = False

    def __init__(self, neuron: Neuron):
        """Of the default neuron."""
        self.neuron = neuron
        self.layers: list[tuple[Any, jax.ShapeDtypeStruct, int]] = []
        self.averages: list[jax.ShapeDtypeStruct] = []

    def __call__(self, current: jax.Array, neuron: Neuron | None = None) -> jax.Array:
        """Write down the current's shape."""
        neuron = self.neuron if neuron is None else neuron
        if not isinstance(current, jax.Array) or not jnp.issubdtype(current.dtype, jnp.floating):
            raise TypeError(
                "spike takes a current, a floating-point JAX array, got "
                f"{type(current).__name__} of {jnp.result_type(current)}."
            )
        like = jax.ShapeDtypeStruct(current.shape, current.dtype)
        self.layers.append((neuron.init, like, 1 + len(_arrays(neuron))))
        return jnp.zeros_like(current)

    def average(self, x: jax.Array) -> jax.Array:
        """Write down the shape of an average."""
        self.averages.append(jax.ShapeDtypeStruct(x.shape, x.dtype))
        return x

    def start(self, with_gains: bool) -> list[Trace]:
        """Return the traces before the first step."""

        def trace(init, like, num_gains):
            # Counts in half precision would stop growing.
            zero = jnp.zeros(like.shape, jnp.promote_types(like.dtype, jnp.float32))
            state = init(jnp.zeros(like.shape, like.dtype))
            gain = (jax.tree.map(jnp.zeros_like, state), zero)
            return Trace(state, zero, [gain] * num_gains if with_gains else [])

        return [trace(*layer) for layer in self.layers]


class Stepwise:
    """The neurons in one step."""

    is_last = False

    def __init__(self, neuron: Neuron, traces: list[Trace], through_time: bool):
        """With the traces so far."""
        self.neuron, self.before, self.through_time = neuron, traces, through_time
        self.traces: list[Trace] = []
        self.spikes: list[jax.Array] = []
        self.averages: list[jax.Array] = []

    def __call__(self, current: jax.Array, neuron: Neuron | None = None) -> jax.Array:
        """Advance the next layer."""
        trace = _next_of(self.before, len(self.traces), current)
        neuron = self.neuron if neuron is None else neuron
        trace, spikes = self._advance(neuron, trace, current)
        self.traces.append(trace)
        self.spikes.append(spikes)
        return spikes

    def average(self, x: jax.Array) -> jax.Array:
        """Return `x`, and write it down."""
        self.averages.append(jax.lax.stop_gradient(x))
        return x

    def done(self) -> list[Trace]:
        """Return the traces of all layers."""
        if len(self.traces) < len(self.before):
            raise ValueError(
                _DIFFERS + f" It called {len(self.traces)} of {len(self.before)} times."
            )
        return self.traces

    def _advance(self, neuron, trace, current):
        return _advance(neuron, trace, current, self.through_time)


class Layerwise(Stepwise):
    """The neurons in all steps, under `jax.vmap` with the axis `STEPS`."""

    def average(self, x: jax.Array) -> jax.Array:
        """Return the mean over the steps, and write it down."""
        return super().average(jax.lax.pmean(x, STEPS))

    def _advance(self, neuron, trace, current):
        block = jax.lax.all_gather(current, STEPS)
        trace, spikes = jax.lax.scan(
            lambda trace, current: _advance(neuron, trace, current, self.through_time), trace, block
        )
        return trace, spikes[jax.lax.axis_index(STEPS)]


class Rates:
    """The neurons as rates, with gains for slopes."""

    is_last = True

    def __init__(
        self, neuron: Neuron, traces: list[Trace], averages: list[jax.Array], num_steps: int
    ):
        """With what was found in the simulation."""
        self.neuron, self.traces, self.num_steps = neuron, traces, num_steps
        self.averages = iter(averages)
        self.num_calls = 0

    def __call__(self, current: jax.Array, neuron: Neuron | None = None) -> jax.Array:
        """Return the next layer's rates."""
        trace = _next_of(self.traces, self.num_calls, current)
        self.num_calls += 1
        neuron = self.neuron if neuron is None else neuron
        rate = (trace.count / self.num_steps).astype(current.dtype)
        moved = [current, *_arrays(neuron)]
        if not trace.gains:
            return rate
        slopes = [(total / self.num_steps).astype(current.dtype) for _, total in trace.gains]
        return substitute(
            rate,
            sum(slope * x.astype(current.dtype) for slope, x in zip(slopes, moved, strict=True)),
        )

    def average(self, x: jax.Array) -> jax.Array:
        """Return the next average, differentiated as `x`."""
        return substitute(next(self.averages), x)


def _arrays(neuron):
    """Return the parameters that may be differentiated."""
    return [leaf for leaf in jax.tree.leaves(neuron.params) if isinstance(leaf, jax.Array)]


def _advance(neuron, trace, current, through_time):
    """Return a layer's next trace and its spikes."""
    leaves, treedef = jax.tree.flatten(neuron.params)
    moved = [i for i, leaf in enumerate(leaves) if isinstance(leaf, jax.Array)]
    arrays = [jnp.broadcast_to(leaves[i], current.shape).astype(current.dtype) for i in moved]
    inputs = [current, *arrays] if through_time else jax.lax.stop_gradient([current, *arrays])

    def step(state, current, *arrays):
        filled = dict(zip(moved, arrays, strict=True))
        params = treedef.unflatten([filled.get(i, leaf) for i, leaf in enumerate(leaves)])
        return neuron.step(params, state, current)

    state, spikes = step(trace.state, *inputs)
    gains = []
    for which, (state_dot, total) in enumerate(trace.gains):
        dots = [jnp.full_like(x, i == which) for i, x in enumerate(inputs)]
        _, (state_dot, dot) = jax.jvp(step, (trace.state, *inputs), (state_dot, *dots))
        gains.append((state_dot, total + dot))
    return Trace(state, trace.count + jax.lax.stop_gradient(spikes), gains), spikes


_DIFFERS = "The network calls `spike` differently from run to run, as no pure function does."


def _next_of(traces, number, current):
    if number >= len(traces) or traces[number].count.shape != current.shape:
        raise ValueError(_DIFFERS + f" Call {number + 1} has a current of shape {current.shape}.")
    return traces[number]
