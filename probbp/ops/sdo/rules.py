"""The sampler's loop, once for each way to choose the steps that a derivative goes through."""

# A step is x' = a x + b f(x, t, u) + s w. The derivative that it passes on is
#
#     x'_dot = (a + b G) x_dot + b k (J x_dot + f_dot - G x_dot) + s w_dot,
#
# J the network's Jacobian, f_dot what its parameters and controls add, G the surrogate's Jacobian
# (0 for the paper's path), k the weight of the step: 1 where it is kept, 0 where it is detached.
#
#  1. A stretch has k = 1 and is an ordinary scan. What is before and after it is a scan with
#     everything cut off, for whose value that of the path, a product of numbers, is substituted.
#  2. In a subset k is 1/p with probability p, independent in each step. The derivative is a product
#     over steps, and its expectation the product of expectations: exact. G is a control variate.
#  3. One random step of each sample has k = N. Products of two Jacobians do not occur: what is
#     expected is the exact derivative's first order around the path. The step's x is picked out of
#     a scan with everything cut off, and the network is called once more.
#  4. Each step alone is that expectation itself: the network sees an x with the path's derivative.

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from probbp.ops.sdo.path import Walk
from probbp.ops.substitute import substitute
from probbp.types import Tree

stop = jax.lax.stop_gradient


class Inputs(NamedTuple):
    """What a step is given; in a scan over steps all leaves have one more axis, in front.

    Attributes:
        index: number of the step.
        time: of training.
        coefficients: a, b and s.
        noise: w, (batch, ...) or `None`.
        control: u, a pytree of (batch, ...).
    """

    index: jax.Array
    time: jax.Array
    coefficients: tuple[jax.Array, jax.Array, jax.Array]
    noise: jax.Array | None
    control: Tree


class Sampler(NamedTuple):
    """A sampler before it runs.

    Attributes:
        network: `(closure, x, times (batch,), control) -> output`.
        closure: what the network closed over.
        inputs: of all steps.
        walk: the linear path.
        checkpoint: whether kept steps are recomputed in reverse mode.
    """

    network: Callable[..., jax.Array]
    closure: Any
    inputs: Inputs
    walk: Walk
    checkpoint: bool

    def live(self, x: jax.Array, time: jax.Array, control: Tree) -> jax.Array:
        """Return the network's output."""
        return self.network(self.closure, x, jnp.broadcast_to(time, x.shape[:1]), control)

    def frozen(self, x: jax.Array, time: jax.Array, control: Tree) -> jax.Array:
        """Return the network's output as a constant."""
        closure, x, control = stop((self.closure, x, control))
        return self.network(closure, x, jnp.broadcast_to(time, x.shape[:1]), control)

    def scan(self, step: Callable, carry: Tree, xs: Tree) -> Tree:
        """Return the last carry of `step(carry, x) -> carry`."""
        step = jax.checkpoint(step) if self.checkpoint else step
        return jax.lax.scan(lambda carry, x: (step(carry, x), None), carry, xs)[0]


def stretch(sampler: Sampler, x: jax.Array, begin: int, end: int) -> jax.Array:
    """Keep the steps from `begin` up to `end`."""

    def step(x, inputs):
        return _advance(x, sampler.live(x, inputs.time, inputs.control), inputs)

    x = _detached(sampler, x, 0, begin)
    x = sampler.scan(step, x, _between(sampler.inputs, begin, end))
    return _detached(sampler, x, end, len(sampler.inputs.index))


def subset(rng_key: jax.Array, sampler: Sampler, x: jax.Array, probability: float) -> jax.Array:
    """Keep each step with a probability, weighted by its inverse."""
    kept = jax.random.bernoulli(rng_key, probability, sampler.inputs.index.shape)

    def step(x, args):
        inputs, is_kept = args

        def live(x):
            output = sampler.live(x, inputs.time, inputs.control)
            passed_on = sampler.walk.slope(x, inputs.index)
            return substitute(output, passed_on + (output - passed_on) / probability)

        def frozen(x):
            output = sampler.frozen(x, inputs.time, inputs.control)
            return substitute(output, sampler.walk.slope(x, inputs.index))

        return _advance(x, jax.lax.cond(is_kept, live, frozen, x), inputs)

    # What a branch leaves for reverse mode is stored for all steps, taken or not: so recompute.
    return sampler._replace(checkpoint=True).scan(step, x, (sampler.inputs, kept))


def one_each(rng_key: jax.Array, sampler: Sampler, x: jax.Array) -> jax.Array:
    """Keep one random step of each sample, weighted by the number of steps."""
    inputs, walk = sampler.inputs, sampler.walk
    num_steps, num_samples = len(inputs.index), x.shape[0]
    drawn = jax.random.randint(rng_key, (num_samples,), 0, num_steps)
    of_samples = (num_samples, *[1] * (x.ndim - 1))

    def step(carry, inputs):
        x, found = carry
        found = jnp.where((inputs.index == drawn).reshape(of_samples), x, found)
        return _advance(x, sampler.frozen(x, inputs.time, inputs.control), inputs), found

    start, xs = stop(((x, x), inputs))
    last, found = jax.lax.scan(lambda carry, xs: (step(carry, xs), None), start, xs)[0]

    seen = substitute(found, walk.until(x, inputs.noise, drawn))
    control = jax.tree.map(lambda leaf: leaf[drawn, jnp.arange(num_samples)], inputs.control)
    output = sampler.live(seen, inputs.time[drawn], control)
    weight = (num_steps * inputs.coefficients[1][drawn]).reshape(of_samples)
    term = walk.since(weight * (output - walk.slope(seen, drawn)), drawn)
    return substitute(last, walk.across(x, inputs.noise, 0, num_steps) + term)


def each_alone(sampler: Sampler, x: jax.Array) -> jax.Array:
    """Keep all steps, each by itself."""

    def step(carry, inputs):
        x, path = carry
        slope = partial(sampler.walk.slope, step=inputs.index)
        output = sampler.live(substitute(stop(x), path), inputs.time, inputs.control)
        x = _advance(x, substitute(output, output + slope(x) - slope(path)), inputs)
        return x, _advance(path, slope(path), inputs)

    return sampler.scan(step, (x, x), sampler.inputs)[0]


def _advance(x: jax.Array, output: jax.Array, inputs: Inputs) -> jax.Array:
    a, b, s = inputs.coefficients
    x = a * x + b * output
    return x if inputs.noise is None else x + s * inputs.noise


def _between(inputs: Inputs, begin: int, end: int) -> Inputs:
    return jax.tree.map(lambda leaf: leaf[begin:end], inputs)


def _detached(sampler: Sampler, x: jax.Array, begin: int, end: int) -> jax.Array:
    if begin == end:
        return x
    noise = sampler.inputs.noise
    inputs = _between(sampler.inputs, begin, end)
    inputs = inputs._replace(control=_without_derivative(inputs.control))

    def step(x, inputs):
        return _advance(x, sampler.frozen(x, inputs.time, inputs.control), inputs), None

    last = jax.lax.scan(step, *stop((x, inputs)))[0]
    return substitute(last, sampler.walk.across(x, noise, begin, end))


@jax.custom_jvp
def _without_derivative(controls):
    return controls


@partial(_without_derivative.defjvp, symbolic_zeros=True)
def _refuse(primals, tangents):
    raise TypeError(
        "Controls of steps that are not kept would have a derivative of zero. Take "
        "keep_step='each', 'random', Subset or 'all', or cut the controls off by "
        "jax.lax.stop_gradient."
    )
